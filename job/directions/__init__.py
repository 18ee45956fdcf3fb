"""Residuals of a model and the directions computed from them."""
