"""TODO job.report."""
