"""The job's container image: the one place that holds its name."""

from __future__ import annotations

from job import __version__
from job.errors import UsageError

# A release is built with its owner's name here (.github/workflows/release.yml); a clone has no image of its own.
NAME = "ghcr.io/OWNER/abliteration-job"
PLACEHOLDER = f"{NAME}:VERSION"


def image_of_release() -> str:
    """Return the image of this release, "" in a build that names no owner."""
    return "" if _is_placeholder(NAME) else f"{NAME}:{__version__}"


def chosen_image(given: str) -> str:
    """Return the given image, else that of this release. Raises UsageError if there is neither."""
    image = given or image_of_release()
    if not image or _is_placeholder(image):
        raise UsageError(
            "there is no image to run",
            remedy=f"build one, push it and give --image {PLACEHOLDER}, or set ABLITERATION_IMAGE",
        )
    return image


def _is_placeholder(image: str) -> bool:
    return "OWNER/" in image or image.endswith(":VERSION")
