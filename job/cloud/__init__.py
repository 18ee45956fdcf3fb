"""Rented GPUs: launch and destroy machines from outside, end the rental from inside. Needs no torch."""
