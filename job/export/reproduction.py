"""reproduce.json: everything to make an export again, without hosts, paths or prompts.

Files of others are untrusted input: settings of the edit are taken by an allow-list and validated, and nothing that
decides what this machine runs, reaches or delivers to (`job.config.origins`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from job.config.load import FixedSettings, leaves, nested
from job.config.origins import EDIT, NAMED, PROMPT_SETS, TRUST, require_named_code
from job.config.schema import Settings
from job.data.prompts import Prompt, PromptSets
from job.data.sources import BUILTIN
from job.errors import UsageError
from job.model.files import parse_model
from job.records import (
    DATE,
    ChoiceFigures,
    EditParameters,
    ExportFormat,
    Figures,
    JobRecord,
    PullBack,
    Record,
    Resolution,
    SearchMethod,
    Trial,
)
from job.storage.identity import AS_BEFORE, short_hash

# Parts of a job's identity with fields of their own.
_PROMPTS, _MODEL = "_prompts", "model"
# Where a file does not say otherwise.
_METHOD = "search.method"
_FORMER: dict[str, Any] = {**leaves(AS_BEFORE), _METHOD: "tpe"}
_AS_TAKEN = ("column", "prefix", "suffix", "system_prompt", "max_characters")
_WHERE = ("dataset", "revision", "config", "builtin", "sha256")


_SHA256 = r"^[0-9a-f]{64}$"
_COMMIT = r"^([0-9a-f]{40})?$"
_NAME = r"^[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?$"
_WORD = r"^[A-Za-z0-9_][\w.+-]*$"
_NORM = r"^[A-Za-z0-9_.]+$"
_OPTION = r"^[a-z_]{1,40}$"


class _Origin(Record):
    """Origin of a model or a prompt set, as an untrusted file may state it."""

    repository: str | None = Field(None, pattern=r"^[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*$")
    dataset: str | None = Field(None, pattern=_NAME)
    commit: str | None = Field(None, pattern=_COMMIT)
    config: str | None = Field(None, pattern=r"^[\w.-]+$")
    builtin: str | None = Field(None, pattern=_WORD)
    sha256: str | None = Field(None, pattern=_SHA256)


class _Taken(Record):
    """Rows and column of a prompt set, as an untrusted file may state them."""

    split: str = Field(pattern=r"^[\w.-]+$")
    start: int = Field(ge=0)
    stop: int | None = Field(None, ge=1)
    column: str | None = Field(None, pattern=r"^[^/#\x00-\x1f]+$")
    prefix: str = ""
    suffix: str = ""
    system_prompt: str | None = None
    max_characters: int | None = Field(None, ge=1)


class _Resolved(Record):
    """Resolution of a first start, as an untrusted file may state it."""

    dtype: Literal["bfloat16", "float16", "float32"]
    rows: int = Field(ge=1, le=1 << 24)
    layers: int = Field(ge=1, le=1 << 16)
    response_prefix: str = ""
    search_rows: int | None = Field(None, ge=1, le=1 << 24)
    together: int | None = Field(None, ge=1, le=1 << 24)
    norms: tuple[Annotated[str, Field(pattern=_NORM)], ...] = ()
    prefix_tokens: tuple[Annotated[int, Field(ge=0, lt=1 << 24)], ...] | None = Field(None, max_length=1 << 12)
    date: str | None = Field(None, pattern=DATE)
    options: dict[Annotated[str, Field(pattern=_OPTION)], bool] | None = Field(None, max_length=16)
    turn_end: int | None = Field(None, ge=0, lt=1 << 24)
    batch: int | None = Field(None, ge=1, le=1 << 16)
    ahead: int | None = Field(None, ge=0, le=1 << 8)
    racing: int | None = Field(None, ge=0, le=1 << 24)
    topic_words: bool | None = None
    evasions: bool | None = None
    pull_back: PullBack | None = None
    choice: Literal["bounds"] | None = None
    choice_rows: int | None = Field(None, ge=1, le=1 << 24)
    scorers: dict[Literal["nli", "classifier"], Annotated[str, Field(pattern=_COMMIT)]] | None = None
    method: SearchMethod | None = None


class _Shown(Record):
    """Printed or compared parts of an untrusted file."""

    versions: dict[Annotated[str, Field(pattern=_WORD)], Annotated[str, Field(pattern=_WORD)]]
    weights: dict[Annotated[str, Field(pattern=_WORD)], Annotated[str, Field(pattern=_SHA256)]]


class PromptsRecord(Record):
    """A prompt set in reproduce.json.

    Attributes:
        source: A public dataset (dataset, commit, config), local files (sha256) or built-in prompts (builtin, sha256);
            empty if private.
    """

    source: dict[str, str]
    taken: dict[str, Any]
    count: int
    sha256: str


class Reproduction(Record):
    """reproduce.json.

    Attributes:
        model: The base model: repository and commit of a public one, SHA-256 over a folder's files.
        base_model: Its name on the Hub, None without one or if private.
        behaviour: The removed behaviour, in the user's words.
        prompts: All prompt sets, by the setting's name.
        settings: All other settings that affect the result.
        base: Metrics of the base model on the report split.
        reused_prompts: Report prompts also used by the direction or the search; omitted if 0.
        choice: Figures of a finalist on the prompts held out for the choice; omitted if None.
        weights: SHA-256 of every weight file.
    """

    version: Literal[1] = 1
    versions: dict[str, str]
    model: dict[str, str]
    base_model: str | None
    behaviour: str
    prompts: dict[str, PromptsRecord]
    settings: dict[str, Any]
    startup_trials: int
    trials: int
    resolution: Resolution
    trial: Trial
    edit: EditParameters
    base: Figures
    edited: Figures
    format: ExportFormat
    reused_prompts: int = Field(0, ge=0, exclude_if=lambda count: count == 0)
    choice: ChoiceFigures | None = Field(None, exclude_if=lambda figures: figures is None)
    weights: dict[str, str]

    @property
    def digest(self) -> str:
        """Short hash that identifies this reproduction."""
        return short_hash(self.model_dump_json())


def reproduction(
    record: JobRecord,
    settings: Settings,
    prompts: PromptSets,
    *,
    trial: Trial,
    trials: int,
    edit: EditParameters,
    figures: tuple[Figures, Figures],
    form: ExportFormat,
    choice: ChoiceFigures | None = None,
    method: SearchMethod,
) -> Reproduction:
    """Return an export's reproduction, without hashes of its weights.

    `figures` are the base model's and its own; `method` is what the search turned out to be.
    """
    assert record.resolution is not None
    assert record.startup_trials is not None
    identity = record.identity
    model = dict(identity[_MODEL])
    repository = model.pop("repository", None)
    if repository is not None:
        model = {"repository": repository} if record.model_public else {}
        model["commit"] = record.model_commit or ""
    return Reproduction(
        versions=record.versions,
        model=model,
        base_model=base_model_name(record, settings),
        behaviour=settings.card.behaviour,
        prompts={name: _prompts_record(name, identity[name], prompts) for name in settings.prompt_sets()},
        settings=_edit_settings(identity, method),
        startup_trials=record.startup_trials,
        trials=trials,
        resolution=record.resolution,
        trial=trial,
        edit=edit,
        base=figures[0],
        edited=figures[1],
        format=form,
        reused_prompts=prompts.reused,
        choice=choice,
        weights={},
    ).cleaned()


def _edit_settings(identity: Mapping[str, Any], method: SearchMethod) -> dict[str, Any]:
    settings = {name: value for name, value in identity.items() if not name.endswith(_PROMPTS) and name != _MODEL}
    found = {name: value for name, value in leaves(settings).items() if name in EDIT - NAMED}
    found.pop(_METHOD, None)
    return nested(found if method == _FORMER[_METHOD] else {**found, _METHOD: method})


def base_model_name(record: JobRecord, settings: Settings) -> str | None:
    """Return the base model's name on the Hub, None without one or if private."""
    return settings.card.base_model or (record.identity[_MODEL].get("repository") if record.model_public else None)


def _prompts_record(name: str, identity: Mapping[str, Any], prompts: PromptSets) -> PromptsRecord:
    source = {key: identity[key] for key in _WHERE if identity.get(key) is not None}
    if "dataset" in source:
        source = {**source, "commit": prompts.commits.get(name, "")} if name in prompts.public else {}
        source.pop("revision", None)
    texts = prompts.of_setting(name)
    return PromptsRecord(
        source=source,
        taken={key: value for key, value in identity.items() if key not in _WHERE},
        count=len(texts),
        sha256=prompts_digest(texts),
    )


def prompts_digest(prompts: tuple[Prompt, ...]) -> str:
    """Return a hash of prompts in order, without their groups: those change no result."""
    digest = hashlib.sha256()
    for prompt in prompts:
        said = Prompt(user=prompt.user, system=prompt.system)
        digest.update(said.model_dump_json().encode() + b"\n")
    return digest.hexdigest()


def read_reproduction(path: Path) -> Reproduction:
    """Read a reproduce.json. Raises UsageError if it is none."""
    try:
        original = Reproduction.model_validate_json(path.read_bytes())
        check_reproduction(original)
    except RecursionError:
        raise UsageError(f"{path} is nested too deeply", remedy="give the reproduce.json of an export") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}", remedy="check --reproduce") from error
    except ValidationError as error:
        raise UsageError(
            f"{path} is not a reproduce.json of this version: {_first_error(error)}",
            remedy="give the reproduce.json of an export",
        ) from error
    return original


def _first_error(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(key) for key in first["loc"] if isinstance(key, str) and key.isidentifier())
    return f"{field}: {first['msg']}" if field else first["msg"]


def check_reproduction(original: Reproduction) -> None:
    """Validate names and sizes before they reach paths, repositories or tensors. Raises ValidationError."""
    _Origin.model_validate(original.model)
    _Shown(versions=original.versions, weights=original.weights)
    _Resolved.model_validate(original.resolution.model_dump())
    for record in original.prompts.values():
        _Origin.model_validate(record.source)
        _Taken.model_validate(record.taken)


def fixed_settings(original: Reproduction, source: str) -> FixedSettings:
    """Return the settings that a reproduction fixes, without local and private sources. Raises UsageError."""
    settings = {**_FORMER, **leaves(original.settings)}
    values: dict[str, Any] = {
        **{name: value for name, value in settings.items() if name in EDIT - NAMED},
        "trials": original.trials,
        "startup_trials": original.startup_trials,
        "export_format": original.format,
        "card.behaviour": original.behaviour,
        "card.base_model": original.base_model,
    }
    origins: dict[str, Any] = {}
    if "repository" in original.model:
        origins["model"] = _at(original.model["repository"], original.model.get("commit"))
    for name, prompts in original.prompts.items():
        if name not in PROMPT_SETS:
            raise UsageError(f"{source} names prompts without settings", remedy="correct the file")
        rows, source_record = prompts.taken, prompts.source
        if "dataset" in source_record:
            config = f":{source_record['config']}" if source_record.get("config") else ""
            origins[f"{name}.spec"] = _at(source_record["dataset"], source_record.get("commit")) + config
        elif "builtin" in source_record:
            origins[f"{name}.spec"] = f"{BUILTIN}{source_record['builtin']}"
        stop = "" if rows.get("stop") is None else rows["stop"]
        values[f"{name}.split"] = f"{rows['split']}[{rows['start']}:{stop}]"
        values |= {f"{name}.{key}": rows[key] for key in _AS_TAKEN if rows.get(key) is not None}
    left_out = {name: value for name, value in settings.items() if name not in values}
    return FixedSettings(source, values, origins, left_out)


def _at(name: str, commit: str | None) -> str:
    return f"{name}@{commit}" if commit else name


def require_same_repository(original: Reproduction, settings: Settings, given: str | None) -> None:
    """Raise UsageError if MODEL is not the original's repository, or runs code that the user has not named."""
    repository, commit = original.model.get("repository"), original.model.get("commit")
    model = parse_model(settings.model)
    if repository is not None and model.kind == "hub" and model.name != repository:
        raise UsageError(
            f"MODEL is {model.name}, but the export was made from {_at(repository, commit)}",
            remedy="leave out MODEL, or give the one that the file names",
        )
    if settings.loading.trust_remote_code and model.kind == "hub" and repository is not None:
        options = f"MODEL as {{}} with --set {TRUST}=true"
        require_named_code(original.model, commit, given, options)


@dataclass(frozen=True)
class Again:
    """An export to reproduce; `searches` repeats the search, not only its chosen edit."""

    original: Reproduction
    searches: bool
    folder: Path

    @property
    def pinned(self) -> dict[str, Any]:
        """Fields of job.json that identify this job."""
        return {"reproduces": self.original.digest, "searches": self.searches}

    @property
    def resolved(self) -> dict[str, Any]:
        """Fields of job.json taken from the original."""
        model = self.original.model
        public = "repository" in model
        return {"resolution": self.original.resolution, "model_commit": model.get("commit"), "model_public": public}


def require_same_model(original: Reproduction, identity: Mapping[str, Any]) -> None:
    """Raise UsageError if the model's files differ from the original's."""
    expected = original.model.get("sha256")
    if expected is not None and identity[_MODEL].get("sha256") != expected:
        raise UsageError("the model differs from that of the export", remedy="give the folder of the same model")


def require_same_prompts(original: Reproduction, prompts: PromptSets) -> None:
    """Raise UsageError if a prompt set differs from the original's."""
    for name, record in original.prompts.items():
        if prompts_digest(prompts.of_setting(name)) != record.sha256:
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{name} differ from those of the export", remedy=f"give the same ones with {option}")


def environment_differences(original: Reproduction, versions: Mapping[str, str]) -> list[str]:
    """Return a line for every package whose version differs from the original's."""
    return [
        f"{name} was {version}, is {versions.get(name, 'missing')}"
        for name, version in original.versions.items()
        if versions.get(name) != version
    ]
