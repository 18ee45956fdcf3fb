"""Delivery to an S3 bucket: resumable, verified, and marked complete by the manifest, which goes last."""

from job.upload.s3.capabilities import S3Capabilities, probe
from job.upload.s3.delivery import Delivery, deliver
from job.upload.s3.options import S3Options

__all__ = ["Delivery", "S3Capabilities", "S3Options", "deliver", "probe"]
