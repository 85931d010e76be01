"""Optimizations that change the network before it is trained, graph to graph; imports only network, spec, validation."""
