"""TODO job.storage."""
