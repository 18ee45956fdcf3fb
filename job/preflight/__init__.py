"""Checks for everything known to ruin a long run, made before the GPU hours are spent."""
