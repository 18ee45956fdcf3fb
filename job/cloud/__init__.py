"""Rented GPUs: the end of a rental from inside, and launchers from outside. Needs no torch."""
