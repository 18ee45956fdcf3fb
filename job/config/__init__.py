"""TODO job.config."""
