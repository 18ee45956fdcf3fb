"""Holding a job: one runner at a time, here and at its checkpoint, from which an empty workspace is filled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from job.config.schema import Settings
from job.errors import HeldError, JobError, Stopped
from job.storage.events import Events
from job.storage.jobs import refuse_other_settings
from job.storage.run_folder import RunFolder
from job.system.signals import StopSignals
from job.upload.targets import s3_options

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from job.mirror import LeaseKeeper, Mirror

# What the last snapshot may take, in seconds and in times that a lease lasts without a sign of life.
_LAST_SECONDS, _LAST_LEASES = 300.0, 2.5
# After a stop signal the platform does not wait long.
_STOPPED_SECONDS = 8.0


def open_checkpoint(settings: Settings, report: Callable[[str], None]) -> Mirror:
    """Return the mirror that the settings name; nothing is sent yet.

    Raises:
        UsageError: The URI names no such place.
        DeliveryError: Credentials are missing or unusable.
    """
    from job.mirror import MirrorOptions, open_mirror

    assert settings.checkpoint is not None
    options = MirrorOptions(required=settings.require_checkpoint, s3=s3_options(settings))
    return open_mirror(settings.checkpoint, options, report)


class JobLock:
    """A job that this run holds.

    All methods do nothing where there is no checkpoint.
    """

    def __init__(self, claim: LeaseKeeper | None = None) -> None:
        """Hold a job, with the claim on its checkpoint if it has one."""
        self._claim = claim

    def keep(self) -> None:
        """Have the checkpoint brought up to date soon; nobody waits for it."""
        if self._claim is not None:
            self._claim.request()

    def discard(self) -> None:
        """Have the checkpoint forget the job, which came to nothing."""
        if self._claim is not None:
            self._claim.discard()

    def check(self) -> None:
        """Return at once if the run may go on.

        Raises:
            HeldError: Another run has taken the job over.
            DeliveryError: The checkpoint is required and has been down for too long.
        """
        if self._claim is not None:
            self._claim.check()

    def outward(self) -> AbstractContextManager[None]:
        """Return a block for what others see, as deliveries, which a lease that may have expired does not allow."""
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
    """Hold a job for the block, its run folder brought up to date from the checkpoint.

    Args:
        folder: The run folder; need not be there.
        identity: What the job is, as in job.json.
        settings: Where the checkpoint is, and how it is reached.
        events: Where progress goes.
        signals: By which the main thread is told that the lease is lost.
        beside_others: The checkpoint may hold other jobs on the same model.

    Raises:
        HeldError: Another run holds it, or has taken it over meanwhile.
        DeliveryError: The checkpoint cannot be reached, or is required and has been down for too long.
        UsageError: The checkpoint holds a job on the same model with other settings.
    """
    with folder.held():
        if settings.checkpoint is None:
            yield JobLock()
            return
        with open_checkpoint(settings, events.say) as mirror:
            if not beside_others and not folder.job_file.exists():
                # What names no files came to nothing.
                mirrored = {head.job_id: head.identity for head in mirror.jobs() if head.files}
                if folder.path.name not in mirrored:
                    refuse_other_settings(settings.checkpoint, mirrored, identity)
            claim = mirror.claim(folder, identity, events.say)
            yield from _kept(folder, claim, signals)


def _kept(folder: RunFolder, claim: LeaseKeeper, signals: StopSignals) -> Iterator[JobLock]:
    """Yield the hold and take the last snapshot after it."""
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
        # What preflight has refused leaves nothing that another machine could go on from.
        final = folder.prompts_file.exists() and not any(isinstance(error, HeldError) for error in lost)
        # A first signal now must not cut the last snapshot; a second one still leaves at once.
        with signals.shielded():
            claim.close(final=final, seconds=_STOPPED_SECONDS if hurry else patience, hurry=hurry)
