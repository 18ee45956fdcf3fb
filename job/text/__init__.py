"""TODO job.text."""
