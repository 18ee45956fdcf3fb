"""TODO job.transfer."""
