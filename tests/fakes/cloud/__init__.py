"""Rental platforms on the loopback interface, by their documentation."""

from tests.fakes.cloud.platform import KEY, Platform
from tests.fakes.cloud.runpod import RunPodServer
from tests.fakes.cloud.vast import VastServer

__all__ = ["KEY", "Platform", "RunPodServer", "VastServer"]
