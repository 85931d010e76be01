"""The life of a job: what users and workers may change, and everything that belongs to it.

Imports access, database, settings, spec, storage and validation.
"""
