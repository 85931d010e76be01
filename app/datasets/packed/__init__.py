"""The packed format, which API and worker read. Imports errors, network, spec and validation only."""
