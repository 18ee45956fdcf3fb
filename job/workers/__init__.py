"""Evaluating trials in other processes and on other machines."""
