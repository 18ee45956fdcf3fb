"""Residual writers of a model, discovered by function and proven."""
