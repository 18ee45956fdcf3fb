"""TODO job.architectures."""
