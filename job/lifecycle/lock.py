"""Hold a job: one runner at a time, here and at its checkpoint, which fills an empty workspace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from job.config.schema import Settings
from job.errors import DeliveryError, HeldError, JobError, MachineError, Stopped
from job.storage.events import Events
from job.storage.jobs import refuse_other_settings
from job.storage.run_folder import RunFolder
from job.system.signals import StopSignals
from job.upload.targets import s3_options

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from job.mirror import LeaseKeeper, Mirror

T = TypeVar("T")

# Time limit of the last snapshot, in seconds and in lease durations.
_LAST_SECONDS, _LAST_LEASES = 300.0, 2.5
# After a stop signal the platform does not wait long.
_STOPPED_SECONDS = 8.0


def open_checkpoint(settings: Settings, report: Callable[[str], None]) -> Mirror:
    """Return the settings' mirror, without connecting. Raises UsageError or DeliveryError."""
    from job.mirror import MirrorOptions, open_mirror

    assert settings.checkpoint is not None
    options = MirrorOptions(required=settings.require_checkpoint, s3=s3_options(settings))
    return open_mirror(settings.checkpoint, options, report)


class JobLock:
    """A job held by this run; methods do nothing without a checkpoint."""

    def __init__(self, claim: LeaseKeeper | None = None) -> None:
        self._claim = claim

    def keep(self) -> None:
        """Request a checkpoint soon, without waiting."""
        if self._claim is not None:
            self._claim.request()

    def discard(self) -> None:
        """Remove the job from the checkpoint: it came to nothing."""
        if self._claim is not None:
            self._claim.discard()

    def check(self) -> None:
        """Raise HeldError if another run took over, or DeliveryError if a required checkpoint is down too long."""
        if self._claim is not None:
            self._claim.check()

    def outward(self) -> AbstractContextManager[None]:
        """Return a context for public actions such as deliveries, which an expired lease forbids."""
        return self._claim.outward() if self._claim is not None else nullcontext()


@contextmanager
def held(
    folder: RunFolder,
    identity: Mapping[str, Any],
    settings: Settings,
    events: Events,
    signals: StopSignals,
    *,
    beside_others: bool = True,
) -> Iterator[JobLock]:
    """Hold a job for the block, with its run folder, which need not exist, updated from the checkpoint.

    `beside_others` allows other jobs on the same model there. Raises HeldError if another run holds it or took it over,
    UsageError if the checkpoint holds a job on the same model with other settings, MachineError if the checkpoint
    cannot be used, or DeliveryError if it is required and has been down too long.
    """
    with folder.held():
        if settings.checkpoint is None:
            yield JobLock()
            return
        with as_in_preflight(lambda: open_checkpoint(settings, events.say)) as mirror:
            claim = as_in_preflight(lambda: _claimed(mirror, folder, identity, settings, events, beside_others))
            yield from _hold(folder, claim, signals)


def as_in_preflight(step: Callable[[], T]) -> T:
    """Return a step's value. Raises MachineError for a DeliveryError, which preflight blames on the machine, too."""
    try:
        return step()
    except DeliveryError as error:
        raise MachineError(str(error), remedy=error.remedy) from error


def _claimed(
    mirror: Mirror,
    folder: RunFolder,
    identity: Mapping[str, Any],
    settings: Settings,
    events: Events,
    beside_others: bool,
) -> LeaseKeeper:
    assert settings.checkpoint is not None
    if not beside_others and not folder.job_file.exists():
        # A head without files came to nothing.
        mirrored = {head.job_id: head.identity for head in mirror.jobs() if head.files}
        if folder.path.name not in mirrored:
            refuse_other_settings(settings.checkpoint, mirrored, identity)
    return mirror.claim(folder, identity, events.say)


def _hold(folder: RunFolder, claim: LeaseKeeper, signals: StopSignals) -> Iterator[JobLock]:
    """Yield the lock, then take the last snapshot."""
    lost: list[JobError] = []

    def on_lost(error: JobError) -> None:
        lost.append(error)
        signals.interrupt(str(error))

    claim.start(on_lost)
    hurry, patience = False, min(_LAST_SECONDS, _LAST_LEASES * claim.head.lease.expiry_s)
    try:
        yield JobLock(claim)
    except Stopped:
        hurry = True
        if lost:
            raise lost[0] from None
        raise
    finally:
        # A job refused by preflight has nothing to continue elsewhere.
        final = folder.prompts_file.exists() and not any(isinstance(error, HeldError) for error in lost)
        # A first signal must not interrupt the last snapshot; a second one still exits at once.
        with signals.shielded():
            claim.close(final=final, seconds=_STOPPED_SECONDS if hurry else patience, hurry=hurry)
