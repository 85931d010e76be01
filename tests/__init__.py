"""The tests: the same folders as app and worker, and suites over whole services."""
