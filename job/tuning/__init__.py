"""Measured batch layout."""
