"""reproduce.json: all that it takes to make an export again, and nothing that names a host, a path or a prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from job.errors import UsageError
from job.prompts import Prompt, PromptSets
from job.records import EditParameters, ExportFormat, Figures, JobRecord, Record, Resolution, Trial
from job.settings import FixedSettings, Settings

# What of a job's identity stands in fields of its own.
_PROMPTS, _MODEL = "_prompts", "model"
_AS_TAKEN = ("column", "prefix", "suffix", "system_prompt", "max_characters")
_WHERE = ("dataset", "revision", "config", "sha256")


class PromptsRecord(Record):
    """A prompt set as reproduce.json names it.

    Attributes:
        source: A public dataset (dataset, commit, config) or local files (sha256); empty for what must not be named.
        taken: Which rows and column of it, and what was made of each.
        count: Number of prompts.
        sha256: Of the prompts themselves.
    """

    source: dict[str, str]
    taken: dict[str, Any]
    count: int
    sha256: str


class Reproduction(Record):
    """reproduce.json.

    Attributes:
        versions: Versions of this package and of the libraries that decide results.
        model: The base model: repository and commit of a public one, sha256 over the files of a folder.
        base_model: Its name on the Hub, None where it has none or must not be named.
        behaviour: What was removed, in the user's words.
        prompts: All prompt sets, by the setting's name.
        settings: All other settings that decide the result.
        startup_trials: Trials at the start of the search without the sampler.
        trials: Trials that the search had made.
        resolution: What the first start resolved.
        trial: The chosen trial.
        edit: Its edit.
        base: Figures of the base model on the report split.
        edited: Figures of the export on it.
        format: What was exported.
        weights: sha256 of every file of weights.
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
    weights: dict[str, str]

    @property
    def digest(self) -> str:
        """Short name of this reproduction."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]


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
) -> Reproduction:
    """Return what it takes to make an export again, without hashes of its weights.

    Args:
        record: job.json, with everything resolved.
        settings: The settings.
        prompts: The prompts.
        trial: The exported trial.
        trials: Trials that the search has made.
        edit: The trial's edit.
        figures: Those of the base model and of the export.
        form: What was exported.
    """
    assert record.resolution is not None
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
        settings={name: value for name, value in identity.items() if not name.endswith(_PROMPTS) and name != _MODEL},
        startup_trials=record.startup_trials,
        trials=trials,
        resolution=record.resolution,
        trial=trial,
        edit=edit,
        base=figures[0],
        edited=figures[1],
        format=form,
        weights={},
    ).cleaned()


def base_model_name(record: JobRecord, settings: Settings) -> str | None:
    """Return the base model's name on the Hub, None where it has none or must not be named."""
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
    """Return a hash of prompts in their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(prompt.model_dump_json().encode() + b"\n")
    return digest.hexdigest()


def read_reproduction(path: Path) -> Reproduction:
    """Read a reproduce.json.

    Raises:
        UsageError: The file is none.
    """
    try:
        return Reproduction.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}", remedy="check --reproduce") from error
    except ValidationError as error:
        raise UsageError(
            f"{path} is no reproduce.json of this version: {error.errors()[0]['msg']}",
            remedy="give the reproduce.json of an export",
        ) from error


def fixed_settings(original: Reproduction, source: str) -> FixedSettings:
    """Return the settings that a reproduction fixes; local files and what is private are for the user to give."""
    values: dict[str, Any] = {
        **original.settings,
        "trials": original.trials,
        "startup_trials": original.startup_trials,
        "export_format": original.format,
        "card.behaviour": original.behaviour,
        "card.base_model": original.base_model,
    }
    origins: dict[str, Any] = {}
    if "repository" in original.model:
        origins["model"] = f"{original.model['repository']}@{original.model['commit']}"
    for name, prompts in original.prompts.items():
        taken, where = prompts.taken, prompts.source
        if "dataset" in where:
            config = f":{where['config']}" if where.get("config") else ""
            origins[f"{name}.spec"] = f"{where['dataset']}@{where['commit']}{config}"
        stop = "" if taken["stop"] is None else taken["stop"]
        values[f"{name}.split"] = f"{taken['split']}[{taken['start']}:{stop}]"
        values |= {f"{name}.{key}": taken[key] for key in _AS_TAKEN if taken[key] is not None}
    return FixedSettings(source, values, origins)


@dataclass(frozen=True)
class Again:
    """An export that is to be made again.

    Attributes:
        original: Its reproduce.json.
        searches: The search is made again too, not only its chosen edit.
    """

    original: Reproduction
    searches: bool

    @property
    def pinned(self) -> dict[str, Any]:
        """What in job.json tells this job from the original and from others."""
        return {"reproduces": self.original.digest, "searches": self.searches}

    @property
    def resolved(self) -> dict[str, Any]:
        """What in job.json comes from the original instead of from today."""
        model = self.original.model
        public = "repository" in model
        return {"resolution": self.original.resolution, "model_commit": model.get("commit"), "model_public": public}


def require_same_model(original: Reproduction, identity: Mapping[str, Any]) -> None:
    """Refuse to reproduce from another model.

    Raises:
        UsageError: The model's files are others.
    """
    wanted = original.model.get("sha256")
    if wanted is not None and identity[_MODEL].get("sha256") != wanted:
        raise UsageError(
            "the model is not the one that the export was made from", remedy="give the folder of the same model"
        )


def require_same_prompts(original: Reproduction, prompts: PromptSets) -> None:
    """Refuse to reproduce from other prompts.

    Raises:
        UsageError: A prompt set is another.
    """
    for name, record in original.prompts.items():
        if prompts_digest(prompts.of_setting(name)) != record.sha256:
            option = "--" + name.replace("_", "-")
            raise UsageError(
                f"{name} are not those that the export was made from", remedy=f"give the same ones with {option}"
            )


def environment_differences(original: Reproduction, versions: Mapping[str, str]) -> list[str]:
    """Return a line for every package whose version is not the original's."""
    return [
        f"{name} was {version}, is {versions.get(name, 'missing')}"
        for name, version in original.versions.items()
        if versions.get(name) != version
    ]
