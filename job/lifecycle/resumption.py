"""Continuing a job from its run folder or its mirror alone, with settings that only extend it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from job.config.load import asked_ends, leaves
from job.config.origins import HERE, TRUST, left_out_line
from job.config.schema import ENDS, Settings
from job.lifecycle.locate import Whereabouts
from job.lifecycle.start import JobStart
from job.mirror.vetting import as_given, require_same_contents, with_trust
from job.records import JobRecord
from job.storage.identity import stored
from job.storage.jobs import job_settings
from job.storage.run_folder import RunFolder
from job.system.tempdirs import scratch


def resumption(
    where: Whereabouts,
    ends: Mapping[str, str | None] | None = None,
    say: Callable[[str], None] = lambda _: None,
    **others: object,
) -> JobStart:
    """Return what a job is continued with, from its run folder or its checkpoint alone.

    Of a checkpoint, only what may come from one is taken (`job.mirror.vetting`).

    Args:
        where: The job.
        ends: `when_done` and `when_failed` as given on the command line; what an earlier start was given is not used.
        say: Told what was not taken from the checkpoint.
        **others: Settings that only extend it.

    Raises:
        UsageError: There is no such job, or it runs code that is not trusted here.
        DeliveryError: The checkpoint cannot be reached, or is not what it was.
    """
    options = {name: value for name, value in (ends or {}).items() if value is not None}
    # As for all settings, --set counts last, then options, then the environment.
    given = {**where.given, **asked_ends(options), **others}
    given |= {name: value for name, value in where.assigned.items() if name in ENDS}
    folder, record, settings = (
        _found_here(where, given) if where.checkpoint is None else _found_there(where, given, say)
    )
    first = record
    used = {name: value for name, value in leaves(settings.model_dump(mode="json")).items() if name in HERE}

    def opened() -> tuple[JobRecord, Settings]:
        # The run folder may have been filled from the checkpoint since, which may have changed meanwhile.
        record, found = folder.read_job(), job_settings(folder, whole=True, **as_given({**used, **given}))
        with_trust(record, found, given, before=first)
        if where.checkpoint is not None:
            require_same_contents(record, found, prompts=not folder.prompts_file.exists())
        return record.model_copy(update={"settings": stored(found)}), found

    return JobStart(folder, record.identity, settings, opened, names_code=TRUST in given)


def _found_here(where: Whereabouts, given: Mapping[str, Any]) -> tuple[RunFolder, JobRecord, Settings]:
    folder = where.folder()
    record, settings = folder.read_job(), job_settings(folder, whole=True, **as_given(given))
    with_trust(record, settings, given)
    return folder, record, settings


def _found_there(
    where: Whereabouts, given: Mapping[str, Any], say: Callable[[str], None]
) -> tuple[RunFolder, JobRecord, Settings]:
    """Return what the mirror says of a job, with the folder that it would have here."""
    with where.mirror() as mirror, scratch("mirror") as place:
        head = where.mirrored(mirror)
        folder = RunFolder(where.workspace / head.job_id)
        fetched = mirror.fetch(head.job_id, place)
        record = fetched.folder.read_job()
        here = as_given({**_of_this_side(folder), **given})
        settings = job_settings(fetched.folder, whole=True, **here, workspace=str(where.workspace))
        with_trust(record, settings, given, before=folder.read_job() if folder.job_file.exists() else None)
        require_same_contents(record, settings, prompts=not fetched.folder.prompts_file.exists())
    if line := left_out_line(mirror.uri, fetched.left_out, leaves(settings.model_dump(mode="json"))):
        say(line)
    return folder, record, settings


def _of_this_side(folder: RunFolder) -> dict[str, Any]:
    """Return what a run folder on this machine says of this machine; nothing where there is none."""
    if not folder.job_file.exists():
        return {}
    return {name: value for name, value in leaves(folder.read_job().settings).items() if name in HERE - {"workspace"}}
