"""Data sets: their registry. Imports database, jobs, settings, spec and storage, and the two folders below."""
