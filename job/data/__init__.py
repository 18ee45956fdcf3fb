"""TODO job.data."""
