"""TODO job.system."""
