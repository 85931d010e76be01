"""What a job will do, worked out before anything is trained; imports settings, schemas and what it plans with.

That is spec, rewrites, pruning, compression and network: integers and graphs, no tensors.
"""
