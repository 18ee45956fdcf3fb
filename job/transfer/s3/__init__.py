"""An S3 bucket: its capabilities, multipart uploads that resume, verification."""

from job.transfer.s3.capabilities import S3Capabilities, probe
from job.transfer.s3.options import S3Options

__all__ = ["S3Capabilities", "S3Options", "probe"]
