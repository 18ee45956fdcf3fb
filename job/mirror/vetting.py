"""Vetting of a checkpoint's job.json: only values proven by its identity, none that this machine must decide.

Others may be able to write to a checkpoint. The job's name is the hash of its identity, and all settings of the edit
are compared with that first. Other settings are taken only if listed in `job.config.origins`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from job.config.load import leaves, nested
from job.config.origins import EDIT, HERE, JOB, PROMPT_SETS, TRUST, require_named_code
from job.config.schema import REFERENCE_SETS, TEXTS, Settings
from job.config.scorers import CROSS_ENTROPY
from job.config.sections import PromptSettings
from job.data.sources import BUILTIN, named_identity, source_identity
from job.errors import JobError, UsageError
from job.model.files import is_in_history, parse_model
from job.records import JobRecord, Record
from job.storage.atomic import read_record, write_record
from job.storage.identity import EXTENDING, as_identified, job_id, model_identity
from job.storage.run_folder import JOB_ID, RunFolder
from job.system.hub_client import REPOSITORY

_COMMIT = re.compile(r"[0-9a-f]{40}")
_PATHS = ("/", "./", "../", "~")


def proven(record: JobRecord, job: str) -> tuple[JobRecord, dict[str, Any]]:
    """Return a job.json restricted to trusted values, and the dropped ones. Raises JobError if it is inconsistent."""
    identity = record.identity
    if not JOB_ID.fullmatch(job) or record.job_id != job or job_id(identity) != job:
        raise JobError(f"its identity is not that of job {job}")
    pinned = {name: identity[name] for name in ("reproduces", "searches") if name in identity}
    if record.reproduces != pinned.get("reproduces") or record.searches != pinned.get("searches", True):
        raise JobError("its identity does not name what it reproduces")
    if wrong := sorted({*_other_settings(record), *_other_inputs(record), *_other_commit(record)}):
        raise JobError(f"its settings differ from its identity: {', '.join(wrong)}")
    said, given = leaves(_local_paths(record)), leaves(_without_inputs(identity))
    followed = _of_former_version(record)
    left_out = {
        name: value
        for name, value in said.items()
        if name in HERE or (_is_unproven(name, given) and followed.get(name) != value)
    }
    # The identity fills in what the settings omit, and cannot be forged.
    silent = {name: given[name] for name in given.keys() - said.keys() if name in EDIT | JOB}
    kept = nested({**silent, **{name: value for name, value in said.items() if name not in left_out}})
    redacted = tuple(name for name in record.redacted if name in kept)
    resolution = record.resolution and record.resolution.model_copy(update={"scorers": None})  # pinned anew here
    updated = {"settings": kept, "redacted": redacted, "resolution": resolution}
    return record.model_copy(update=updated), left_out


def _other_settings(record: JobRecord) -> Iterator[str]:
    given = leaves(_without_inputs(record.identity))
    said = leaves(_without_inputs(record.settings))
    # Settings of this side are never taken, and differ where an earlier machine had others.
    yield from (name for name in given.keys() & said.keys() - HERE if as_identified(name, said[name]) != given[name])


def _is_unproven(name: str, given: Mapping[str, Any]) -> bool:
    """Return whether a setting is missing from the identity but should be in it, as in former versions."""
    section = name.partition(".")[0]
    return name in EDIT and name not in given and section not in {*EXTENDING, *PROMPT_SETS, "model"}


def _of_former_version(record: JobRecord) -> dict[str, Any]:
    """Return what a job that a former version began follows although its identity does not name it.

    Those versions left out the method where it was TPE, which such a job keeps to (`job.search.method`).
    """
    begun = record.resolution
    return {"search.method": "tpe"} if begun is not None and begun.method is None else {}


def _without_inputs(table: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name != "model" and name not in PROMPT_SETS}


def _other_inputs(record: JobRecord) -> Iterator[str]:
    """Yield model and prompt sets that contradict the identity; local contents are not read."""
    model, named = record.identity.get("model"), record.settings.get("model")
    if named is not None and not _is_named(model, str(named)):
        yield "model"
    for name in PROMPT_SETS:
        given, said = record.identity.get(name), record.settings.get(name)
        if said is None or (given is None and name in _unused_sets(record)):
            continue
        if not isinstance(given, Mapping):
            yield name
            continue
        try:
            found = named_identity(PromptSettings.model_validate(_local_prompts(said, given)))
        except (ValidationError, JobError):
            yield name
            continue
        differs = any(value != given[key] for key, value in found.items() if key != "sha256" and key in given)
        if differs or ("sha256" in given) != ("sha256" in found):
            yield name


def _unused_sets(record: JobRecord) -> set[str]:
    """Return the prompt sets that a job does not use, by its identity."""
    identity, unused = leaves(_without_inputs(record.identity)), set[str]()
    if not identity.get("directions.orthogonalize_directions", False):
        unused.update(REFERENCE_SETS)
    if CROSS_ENTROPY not in (identity.get("search.objectives") or ()):
        unused.add(TEXTS)
    return unused


def _is_named(model: Any, named: str) -> bool:
    if isinstance(model, Mapping) and "repository" in model:
        found = REPOSITORY.fullmatch(named)
        return found is not None and (found["name"], found["revision"]) == (model["repository"], model.get("revision"))
    return named.startswith("/")  # a folder, whose contents are compared where they are


def _other_commit(record: JobRecord) -> Iterator[str]:
    commit, revision = record.model_commit, str(model_of(record).get("revision"))
    if commit and (not _COMMIT.fullmatch(commit) or (_COMMIT.fullmatch(revision) and commit != revision)):
        yield "model_commit"


def model_of(record: JobRecord) -> Mapping[str, Any]:
    """Return the model in a job's identity, {} without one."""
    model = record.identity.get("model")
    return model if isinstance(model, Mapping) else {}


def _local_paths(record: JobRecord) -> dict[str, Any]:
    """Return the settings with local prompts marked, so that they cannot be taken for Hub datasets."""
    settings = dict(record.settings)
    for name in PROMPT_SETS:
        given = record.identity.get(name)
        if settings.get(name) is not None and isinstance(given, Mapping):
            settings[name] = _local_prompts(settings[name], given)
    return settings


def _local_prompts(said: Any, given: Mapping[str, Any]) -> Any:
    if "sha256" not in given or not isinstance(said, Mapping):
        return said
    spec = str(said.get("spec"))
    return {**said, "spec": spec if spec.startswith((*_PATHS, BUILTIN)) else f"./{spec}"}


def require_same_contents(record: JobRecord, settings: Settings, *, prompts: bool) -> None:
    """Raise UsageError if local inputs differ from the job's; `prompts` includes the prompt files."""
    model = model_of(record)
    if "sha256" in model and Path(settings.model).is_dir() and model_identity(settings) != model:
        raise UsageError(
            f"{settings.model} is not the model of job {record.job_id}", remedy="put that model at this path"
        )
    for name, source in settings.prompt_sets().items() if prompts else ():
        given = record.identity.get(name)
        if given is not None and "sha256" in given and source_identity(source)["sha256"] != given["sha256"]:
            raise UsageError(
                f"{source.spec} does not hold the {name} of job {record.job_id}",
                remedy="put those prompts at this path",
            )


def with_trust(
    record: JobRecord, settings: Settings, given: Mapping[str, Any], before: JobRecord | None = None
) -> None:
    """Raise UsageError if a job runs its model's own code untrusted, or trust would make it another job.

    `given` are this side's settings by dotted key; `before` is the job.json that was last trusted.
    """
    asked = bool(leaves(_without_inputs(record.identity)).get(TRUST, False))
    if given.get(TRUST) and not asked:
        raise UsageError(f"--set {TRUST} would make it another job", remedy="give it to `abliterate run`")
    if not asked:
        return
    model, options = model_of(record), f"--set {TRUST}=true"
    if "repository" in model:
        options += " --set model={0}"
    place = settings.model
    if "repository" in model and record.model_commit:
        place = f"{model['repository']}@{record.model_commit}"
    if not settings.loading.trust_remote_code:
        raise UsageError(
            f"job {record.job_id} runs the code that comes with {place}",
            remedy=f"read the code and, if you trust it, give {options.format(place)}",
        )
    if before is not None and before.model_commit not in (None, record.model_commit):
        raise UsageError(
            f"the checkpoint of job {record.job_id} now names {place}, whose code was not approved on this machine",
            remedy="check who else can write to the checkpoint",
        )
    if TRUST in given:
        require_named_code(model, record.model_commit, given.get("model"), options)


class KnownCode(Record):
    """trusted.json in a run folder: repository and commit of trusted code; never part of a checkpoint."""

    repository: str
    commit: str


def require_known_code(folder: RunFolder, record: JobRecord, settings: Settings, report: Callable[[str], None]) -> None:
    """Raise UsageError for code of a commit that neither this side nor the repository's history names.

    Raises ImpossibleJobError without such a repository or revision, or MachineError.
    """
    code, source = _code(record, settings), parse_model(settings.model)
    if code is None or code.commit == source.revision:
        return
    if folder.trusted_file.exists() and read_record(folder.trusted_file, KnownCode) == code:
        return
    if not is_in_history(source, code.commit, report):
        place = f"{code.repository}@{code.commit}"
        where = f"--checkpoint {settings.checkpoint} " if settings.checkpoint else ""
        raise UsageError(
            f"the code of {place} is named by the checkpoint of job {record.job_id} only: the commit is not in the "
            f"history of {settings.model}, and trust is for code that you have read",
            remedy=f"check who else can write to the checkpoint; if you have read that code and trust it, give "
            f"`abliterate resume {where}--set {TRUST}=true --set model={place}`",
        )


def note_known_code(folder: RunFolder, record: JobRecord, settings: Settings) -> None:
    """Record in the run folder which model code is trusted, so that the next start need not query the Hub."""
    code = _code(record, settings)
    if code is not None:
        write_record(folder.trusted_file, code)


def _code(record: JobRecord, settings: Settings) -> KnownCode | None:
    model = model_of(record)
    if not settings.loading.trust_remote_code or "repository" not in model or record.model_commit is None:
        return None
    return KnownCode(repository=str(model["repository"]), commit=record.model_commit)


def as_given(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return this side's settings as nested tables, without the model, which only confirms the job's."""
    return nested({name: value for name, value in given.items() if name != "model"})
