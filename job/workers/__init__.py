"""TODO job.workers."""
