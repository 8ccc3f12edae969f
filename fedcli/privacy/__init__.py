"""Differential privacy: what noise guarantees, and where it comes from."""
