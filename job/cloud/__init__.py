"""Rented GPUs: launching and destroying machines from outside, ending the rental from inside. Needs no torch."""
