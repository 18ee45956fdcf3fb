"""TODO job.proof."""
