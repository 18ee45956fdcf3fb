"""Find a command's job in the workspace or at a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.config.load import assigned, environment_values, leaves, load_settings
from job.config.origins import HERE
from job.errors import UsageError
from job.storage.identity import extends
from job.storage.jobs import find_job
from job.storage.run_folder import RunFolder
from job.system.tempdirs import scratch

if TYPE_CHECKING:
    from job.mirror import Head, Mirror


@dataclass(frozen=True)
class Whereabouts:
    """The location of a job.

    Attributes:
        job: Its name, None if it is the only one.
        checkpoint: Its mirror, None if it is in the workspace.
        assignments: Settings as ``key=value`` that extend it, or configure access to the checkpoint.
    """

    workspace: Path
    job: str | None = None
    checkpoint: str | None = None
    assignments: tuple[str, ...] = ()

    def folder(self) -> RunFolder:
        """Return the job's run folder. Raises UsageError if there is none, or several and none is named."""
        return find_job(self.workspace, self.job)

    @property
    def given(self) -> dict[str, Any]:
        """Settings given on this side, by dotted key. Raises UsageError if one would make it another job."""
        found = self.assigned
        for name in found:
            if not _may_be_given(name):
                raise UsageError(f"--set {name} would make it another job", remedy="give it to `abliterate run`")
        if self.checkpoint is None:
            return found
        machine = {name: value for name, value in environment_values().items() if name in HERE - {"workspace"}}
        return {**machine, **found, "checkpoint": self.checkpoint}

    @property
    def assigned(self) -> dict[str, Any]:
        """Settings from `--set`, by dotted key."""
        return leaves(assigned(self.assignments))

    @contextmanager
    def mirror(self) -> Iterator[Mirror]:
        """Yield the opened checkpoint."""
        from job.lifecycle.lock import open_checkpoint

        assignments = [text for text in self.assignments if text.partition("=")[0].strip() != "model"]
        settings = load_settings({"model": "-", "checkpoint": self.checkpoint}, assignments=assignments).settings
        with open_checkpoint(settings, lambda _: None) as mirror:
            yield mirror

    def mirrored(self, mirror: Mirror) -> Head:
        """Return the job's head at a checkpoint. Raises UsageError if there is none, or several and none is named."""
        heads = {head.job_id: head for head in mirror.jobs() if head.files}
        names = ", ".join(heads)
        if self.job is None and len(heads) > 1:
            raise UsageError(f"{mirror.uri} holds several jobs: {names}", remedy="name one with --job")
        name = self.job or next(iter(heads), "")
        if name not in heads:
            raise UsageError(
                f"there is no job {self.job or ''}".rstrip() + f" at {mirror.uri}",
                remedy=f"choose from: {names}" if names else "check --checkpoint",
            )
        return heads[name]


def _may_be_given(name: str) -> bool:
    """Return whether a setting extends a job, concerns this machine, or confirms the job."""
    return extends(name) or name in HERE or name == "model"


@contextmanager
def status_folder(where: Whereabouts) -> Iterator[tuple[RunFolder, bool | None]]:
    """Yield a job's folder, and whether it runs (None: see its lock). Raises UsageError or DeliveryError."""
    if where.checkpoint is None:
        yield where.folder(), None
        return
    with where.mirror() as mirror, scratch("mirror") as place:
        fetched = mirror.fetch(where.mirrored(mirror).job_id, place)
        yield fetched.folder, fetched.running
