"""TODO job.model."""
