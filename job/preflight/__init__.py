"""Checks for known causes of failed long runs, before GPU hours are spent."""
