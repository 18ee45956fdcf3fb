"""Edits of residual writers, compiled once and applied by hooks."""
