"""Local records of launches, so that no rented instance is forgotten."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from job.cloud.credentials import Platform
from job.cloud.ownership import Pending
from job.cloud.provider import MachineNeeds, Terms
from job.records import Record
from job.storage.atomic import write_atomically


class Rented(Record):
    """One instance of a launch.

    Attributes:
        at: Unix time of the rental.
        ended: Unix time of its end, None while it exists.
        ending: Reason to destroy it, until it is seen to be gone; else "".
        sure: Certainly of this launch; others are never destroyed automatically.
        seen: The platform has listed it, so "no such instance" means that it is gone.
    """

    id: str
    at: float
    dollars: float
    ended: float | None = None
    why: str = ""
    ending: str = ""
    sure: bool = True
    seen: bool = False

    def cost(self, now: float) -> float:
        """Return the dollars of its time by the offer's price."""
        return ((self.ended or now) - self.at) / 3600 * self.dollars


class Launch(Record):
    """A launch; holds no secret, only the names of variables that do.

    Attributes:
        label: Its name, and the prefix of its instances' labels.
        command: Arguments of its ENTRYPOINT.
        plain_env: Variables with public values.
        instances: Rented instances in order; the last is the current one.
        pending: Unconfirmed creations.
        checkpoint: The job's mirror by its settings; None: by the command's words.
    """

    # Rented with exactly these; secrets in them were refused.
    VERBATIM = frozenset({"label", "image", "command", "plain_env", "checkpoint"})

    label: str
    platform: Platform
    needs: tuple[MachineNeeds, ...]
    terms: Terms
    image: str
    command: tuple[str, ...]
    env: tuple[str, ...] = ()
    plain_env: dict[str, str] = Field(default_factory=dict)
    volume: str | None = None
    instances: tuple[Rented, ...] = ()
    pending: tuple[Pending, ...] = ()
    checkpoint: str | None = None

    @property
    def resumable(self) -> bool:
        """Whether another machine finds this one's work: a folder requires a volume."""
        place = self.checkpoint or self._checkpoint_word
        if place is None:
            return False
        return not place.startswith("file:") or (self.volume is not None and place.startswith("file:///workspace/"))

    @property
    def _checkpoint_word(self) -> str | None:
        for word, following in zip(self.command, (*self.command[1:], ""), strict=True):
            if word == "--checkpoint":
                return following
            if word.startswith("--checkpoint="):
                return word.partition("=")[2]
        return self.plain_env.get("ABLITERATE_CHECKPOINT")

    @property
    def left(self) -> tuple[Rented, ...]:
        """Instances not known to have ended."""
        return tuple(rented for rented in self.instances if rented.ended is None)

    def spent(self, now: float) -> float:
        """Return the dollars of all instances' time by the offers' prices."""
        return sum(rented.cost(now) for rented in self.instances)


@dataclass
class LaunchFile:
    """A launch's record on disk, rewritten at every change."""

    launch: Launch
    path: Path

    def update(self, **changes: tuple[Rented, ...] | tuple[Pending, ...]) -> None:
        """Change fields of the launch and write it."""
        self.launch = self.launch.model_copy(update=changes)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, (self.launch.model_dump_json(indent=2) + "\n").encode())

    def add(
        self, asked: Pending, id: str, *, dollars: float | None = None, ending: str = "", sure: bool = True
    ) -> None:
        """Record a created instance; one to be destroyed at once goes before the current one."""
        new = Rented(
            id=id, at=asked.at or time.time(), dollars=asked.dollars or dollars or 0.0, ending=ending, sure=sure
        )
        former = self.launch.instances
        instances = (*former[:-1], new, *former[-1:]) if ending else (*former, new)
        pending = tuple(other for other in self.launch.pending if other.label != asked.label)
        self.update(instances=instances, pending=pending)

    def change(self, rented: Rented, **changes: str | float | bool) -> None:
        """Change fields of an instance."""
        changed = rented.model_copy(update=changes)
        self.update(instances=tuple(changed if one.id == rented.id else one for one in self.launch.instances))

    def note_end(self, why: str, id: str | None = None) -> None:
        """Record that an instance, by default the latest, has ended by itself."""
        for rented in self.launch.left:
            if rented.id == (id or self.launch.instances[-1].id):
                self.change(rented, ended=time.time(), why=why, ending="")


def new_label() -> str:
    """Return a unique label."""
    return f"abliterate-{secrets.token_hex(4)}"


def records_folder(env: Mapping[str, str] | None = None) -> Path:
    """Return the folder of launch records: $ABLITERATION_LAUNCHES, or below the user's state."""
    env = os.environ if env is None else env
    if env.get("ABLITERATION_LAUNCHES"):
        return Path(env["ABLITERATION_LAUNCHES"])
    return Path(env.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "abliterate" / "launches"


def find_launch(folder: Path, name: str, platform: Platform) -> LaunchFile | None:
    """Return the launch with this label or instance id."""
    for record in _launches(folder):
        ids = [rented.id for rented in record.launch.instances]
        if record.launch.platform == platform and name in (record.launch.label, *ids):
            return record
    return None


def recorded_ids(folder: Path) -> frozenset[str]:
    """Return the ids of all recorded instances."""
    return frozenset(rented.id for record in _launches(folder) for rented in record.launch.instances)


def _launches(folder: Path) -> Iterator[LaunchFile]:
    for path in sorted(folder.glob("*.json")):
        try:
            yield LaunchFile(Launch.model_validate_json(path.read_bytes()), path)
        except (OSError, ValidationError):
            continue  # no record, or one of another version
