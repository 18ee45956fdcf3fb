"""Delivery of exports to targets."""
