"""TODO job.organism."""
