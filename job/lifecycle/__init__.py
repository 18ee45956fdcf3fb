"""Begin, hold, resume and end a job."""
