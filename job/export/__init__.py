"""TODO job.export."""
