"""Rental platforms on the loopback interface, as their documentation describes them."""

from tests.cloud.platform import KEY, Platform
from tests.cloud.runpod import RunPodServer
from tests.cloud.vast import VastServer

__all__ = ["KEY", "Platform", "RunPodServer", "VastServer"]
