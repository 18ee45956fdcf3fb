"""Evaluation of tasks by worker processes, here and on other machines."""
