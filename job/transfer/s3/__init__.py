"""Delivery to an S3 bucket: resumable, verified, and marked complete by the manifest, which goes last."""

from job.transfer.s3.capabilities import S3Capabilities, probe
from job.transfer.s3.options import S3Options
from job.upload.s3 import Delivery, deliver

__all__ = ["Delivery", "S3Capabilities", "S3Options", "deliver", "probe"]
