"""Interface of mirror stores: immutable objects, and one head per job replaced by compare-and-swap."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from job.errors import DeliveryError
from job.mirror.options import SnapshotPace
from job.mirror.records import MirroredFile


@dataclass(frozen=True)
class Stored:
    """A head as read.

    Attributes:
        token: Version token of the store.
        age_s: Least seconds since it was written, by the server's clock; None: unknown.
    """

    data: bytes
    token: str
    age_s: float | None = None


class OversizedError(Exception):
    """An object exceeds its recorded size. Internal."""


class ConflictError(Exception):
    """Another head (`found`, or None) is current, so it was not replaced. Internal."""

    def __init__(self, found: Stored | None) -> None:
        super().__init__("another runner has replaced the head")
        self.found = found


@dataclass(frozen=True)
class Proof:
    """Capabilities proved of a store, without leaving anything there.

    Attributes:
        fenced: Whether the server rejects writes of a runner that lost the lease.
        quirks: Missing capabilities, for people.
    """

    what: str
    fenced: bool
    quirks: tuple[str, ...] = ()


def changed(source: Path) -> DeliveryError:
    """Return the error for a file that is no longer what the snapshot holds."""
    return DeliveryError(f"{source.name} changed during the upload", remedy="the next snapshot sends it again")


class MirrorStore(Protocol):
    """A store of mirrors; every failure is a `DeliveryError`."""

    uri: str
    pace: SnapshotPace

    def probe(self) -> Proof:
        """Prove that mirrors can be stored here, leaving nothing behind. Raises DeliveryError."""

    def prepare(self) -> None:
        """Create what the first head needs."""

    def jobs(self) -> list[str]:
        """Return the jobs with a head."""

    def read(self, job: str) -> Stored | None:
        """Return a job's head or None. Raises MirrorError if it is above the size limit."""

    def names(self, job: str) -> list[str]:
        """Return the names of a job's files except the head, relative to the job."""

    def stage(self, job: str, objects: Mapping[str, tuple[Path, MirroredFile]], check: Callable[[], None]) -> None:
        """Upload objects from their sources, resumably; `check` is called before each, and may end it."""

    def replace(self, job: str, data: bytes, expected: Stored | None, remove: Collection[str]) -> Stored:
        """Replace the expected head, publish and remove objects; return the head. Raises ConflictError for another."""

    def sweep(self, job: str, keep: AbstractSet[str]) -> None:
        """Remove leftovers of earlier runners; only with the lease."""

    def fetch(self, job: str, entry: MirroredFile, target: Path) -> None:
        """Download an object to a file, unverified. Raises FileNotFoundError or OversizedError."""

    def close(self) -> None:
        """Close connections."""
