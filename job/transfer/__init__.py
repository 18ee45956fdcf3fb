"""Resumable, verified transfers to and from the Hub, S3 and folders."""
