"""TODO job.search."""
