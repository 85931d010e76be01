"""Packed data sets as batches on the device. Imports of app network, spec and the packed format."""
