"""Processes, signals, locks, temporary folders, fail-points and the Hub client."""
