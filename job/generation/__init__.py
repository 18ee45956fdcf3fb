"""TODO job.generation."""
