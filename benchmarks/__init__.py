"""Reproducible measurements; each prints a table and uses the model organism."""
