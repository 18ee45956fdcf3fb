"""TODO job.tuning."""
