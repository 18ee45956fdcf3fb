"""Everything that people read about a job."""
