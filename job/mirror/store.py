"""What every kind of mirror can do: keep immutable objects, and one head a job that is replaced by compare-and-swap."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from job.mirror.options import SnapshotPace
from job.mirror.records import MirroredFile


@dataclass(frozen=True)
class Stored:
    """A head as it was found.

    Attributes:
        data: Its bytes.
        token: Names this very state of it to the store.
        age_s: Seconds since it was written, at least, by the server's own clock; None: not known.
    """

    data: bytes
    token: str
    age_s: float | None = None


class OversizedError(Exception):
    """An object holds more than its head says; no more of it is read. Never seen outside."""


class ConflictError(Exception):
    """A head was not replaced because another one stands there: never seen outside.

    Attributes:
        found: What stands there, None if nothing.
    """

    def __init__(self, found: Stored | None) -> None:
        super().__init__("another head stands there")
        self.found = found


@dataclass(frozen=True)
class Proof:
    """What was proved of a place for a mirror, without leaving anything there.

    Attributes:
        what: In words.
        fenced: Whether the server keeps a runner that has lost the lease from writing.
        quirks: What the server does not do, for people.
    """

    what: str
    fenced: bool
    quirks: tuple[str, ...] = ()


class MirrorStore(Protocol):
    """A place for mirrors; every failure of it is a `DeliveryError`."""

    uri: str
    pace: SnapshotPace

    def probe(self) -> Proof:
        """Prove that a mirror can be kept here, and leave nothing behind.

        Raises:
            DeliveryError: It cannot.
        """

    def prepare(self) -> None:
        """Make what is needed before the first head can be written."""

    def jobs(self) -> list[str]:
        """Return the names of the jobs that have a head here."""

    def read(self, job: str) -> Stored | None:
        """Return a job's head, None if there is none.

        Raises:
            MirrorError: It is larger than any head.
        """

    def names(self, job: str) -> list[str]:
        """Return the names of all that is kept for a job beside its head, relative to the job."""

    def stage(self, job: str, objects: Mapping[str, tuple[Path, MirroredFile]], check: Callable[[], None]) -> None:
        """Bring objects to where a head can name them; slow, and safe to be cut: the next call goes on.

        Args:
            job: The job.
            objects: Where to read each, by its name.
            check: Called before each of them and, where possible, now and then; what it raises ends all.
        """

    def replace(self, job: str, data: bytes, expected: Stored | None, remove: Collection[str]) -> Stored:
        """Put a head where the expected one still stands, with all that has been staged, and remove objects.

        Returns:
            What stands there now.

        Raises:
            ConflictError: Another head stands there; that may be one of ours whose answer got lost.
        """

    def sweep(self, job: str, keep: AbstractSet[str]) -> None:
        """Remove what earlier runners have left half done; only for who has the lease."""

    def fetch(self, job: str, entry: MirroredFile, target: Path) -> None:
        """Write an object's contents to a file, unverified.

        Raises:
            FileNotFoundError: There is no such object.
            OversizedError: It is larger than the entry says.
        """

    def close(self) -> None:
        """Let go of connections."""
