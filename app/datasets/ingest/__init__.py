"""Checking and packing of uploads, and built-in and synthetic data. Imports packed, parent_death, settings and spec."""
