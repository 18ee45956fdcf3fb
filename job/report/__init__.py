"""Reports, charts and status of a job."""
