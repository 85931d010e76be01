"""The host side of jobs: claims, leases, trainers, files; it alone has credentials.

Imports database, datasets, jobs, parent_death, settings, spec and storage of app, `worker.checkpoint`, and never torch.
"""
