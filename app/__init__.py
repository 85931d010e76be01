"""What API and worker agree on, and the API. Imports no torch and nothing of the worker."""
