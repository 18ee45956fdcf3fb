"""TODO job.evaluate."""
