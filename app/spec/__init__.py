"""What a job says, as typed objects: data, network, training, optimizations; imports only network and validation."""
