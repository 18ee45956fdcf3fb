"""Moving files to and from the Hub, S3 and folders: resumable and verified."""
