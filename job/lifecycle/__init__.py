"""TODO job.lifecycle."""
