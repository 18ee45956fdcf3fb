"""TODO job.scoring."""
