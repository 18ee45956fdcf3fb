"""Residuals of a model and the directions found in them."""
