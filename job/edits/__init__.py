"""TODO job.edits."""
