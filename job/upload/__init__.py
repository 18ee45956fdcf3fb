"""Delivery of an export to where it is wanted."""
