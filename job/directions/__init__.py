"""TODO job.directions."""
