"""Low rank, separable and 8-bit layers, in integers: which, how many, at what cost; imports app.pruning and below."""
