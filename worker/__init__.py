"""The worker: what runs jobs. Imports what app and it agree on, never the API."""
