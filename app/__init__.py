"""What API and worker agree on, and the API; imports no torch and nothing of the worker."""
