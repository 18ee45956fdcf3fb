"""TODO job.cli."""
