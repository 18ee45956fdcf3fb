"""S3 buckets: capabilities, resumable multipart uploads, verification."""

from job.transfer.s3.capabilities import S3Capabilities, probe
from job.transfer.s3.options import S3Options

__all__ = ["S3Capabilities", "S3Options", "probe"]
