"""Identity of a job: all inputs that determine the result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from job.config.origins import HERE
from job.config.schema import ENDS, REFERENCE_SETS, TEXTS, Settings
from job.config.scorers import TASKS, judging
from job.data.sources import source_identity
from job.errors import UsageError
from job.model.files import no_model_folder, parse_model, refuse_links_out
from job.records import DEFAULT_OBJECTIVES
from job.storage.atomic import ensure_folder, sha256_file, write_atomically
from job.text.redaction import redact, redacted

# Settings that only extend a job or say where things go; all others are part of its identity.
EXTENDING = frozenset(
    {
        *(name for name in HERE if "." not in name),
        "behaviour",
        "upload",
        "export_format",
        "max_kl",
        "max_refusals",
        "card",
        "hub",
        "s3",
        "judge",
        "trials",
        "tune",
        "max_hours",
        "max_cost",
    }
)

# The same, of settings that are otherwise part of it.
EXTENDING_WITHIN = {
    "scoring": frozenset(
        {"detectors", "nli_model", "classifier", "thinking_tokens", "tasks", "tasks_limit", "tasks_folder"}
    )
}

# Left out where they are the defaults, so that jobs keep the names from before there were such settings. Such a job of
# a former version keeps its former ways (`Resolution.choice`, `.evasions`, `.method`, `.pull_back` and `.racing`).
AS_BEFORE: dict[str, dict[str, Any]] = {
    "search": {"method": "auto", "racing": True, "objectives": [*DEFAULT_OBJECTIVES]},
    "scoring": {"evasions": None, "words": [], "pattern": None, "classifier_labels": []},
    "ablation": {"pull_back": "auto"},
    "choice": {"held_out": 0.2},
}

# What the first start's workers decide if nothing is asked for (`job.stages.model`) goes by what every job did
# before: a job keeps its name on a machine with other workers, and one of a former version continues.
BY_RULE = {"trials_per_batch": 4, "search.ahead": 0}

PACKAGES = ("abliteration-job", "torch", "transformers", "optuna", "safetensors", "tokenizers")

MEMO = ".hashes.json"


def _folder_digest(folder: Path, memo: Path, *, write: bool) -> str:
    """Return a hash of a model folder's files, cached in `memo` by size and time."""
    known: dict[str, str] = {}
    if memo.exists():
        try:
            known = json.loads(memo.read_text())
        except json.JSONDecodeError:
            known = {}
    hashes: dict[str, str] = {}
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")):
        stat = path.stat()
        key = f"{redact(str(path.resolve()))}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
        hashes[key] = known.get(key) or sha256_file(path)
        digest.update(f"{path.name} {hashes[key]}\n".encode())
    if write and not hashes.keys() <= known.keys():
        write_atomically(memo, json.dumps({**known, **hashes}).encode())
    return digest.hexdigest()


def short_hash(text: str) -> str:
    """Return the first 12 digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def job_id(identity: Mapping[str, Any]) -> str:
    """Return the job's name: the start of its identity's hash."""
    return short_hash(json.dumps(identity, sort_keys=True))


def versions() -> dict[str, str]:
    """Return the versions of packages that affect results."""
    return {name: metadata.version(name) for name in PACKAGES}


def model_identity(settings: Settings, *, write: bool = True) -> dict[str, Any]:
    """Return the model's part of a job's identity. Raises ImpossibleJobError or MachineError."""
    workspace = Path(settings.workspace)
    source = parse_model(settings.model)
    if source.kind == "folder" and not Path(source.name).is_dir():
        raise no_model_folder(source)
    if write:
        ensure_folder(workspace)
    if source.kind == "hub":
        return dict(redacted({"repository": source.name, "revision": source.revision}))
    refuse_links_out(Path(source.name))
    return {"sha256": _folder_digest(Path(source.name), workspace / MEMO, write=write)}


def identify(settings: Settings, *, write: bool = True) -> dict[str, Any]:
    """Return a job's identity from its settings. Raises ImpossibleJobError or MachineError."""
    prompts = {name: source_identity(source) for name, source in settings.prompt_sets().items()}
    model = model_identity(settings, write=write)
    unused = {*REFERENCE_SETS, TEXTS} - prompts.keys()
    asked = settings.model_dump(mode="json", exclude={*EXTENDING, *unused})
    asked = {name: as_identified(name, value) for name, value in asked.items()}
    asked["search"] = {name: as_identified(f"search.{name}", value) for name, value in asked["search"].items()}
    for section, names in EXTENDING_WITHIN.items():
        asked[section] = {name: value for name, value in asked[section].items() if name not in names}
    for section, former in AS_BEFORE.items():
        asked[section] = {
            name: value for name, value in asked[section].items() if name not in former or former[name] != value
        }
    if scorers := scorer_identity(settings, write=write):
        asked["scorers"] = scorers
    # Records are written without secrets, and a job is known by the hash of what is written.
    return dict(redacted({**asked, **prompts, "model": model}))


def scorer_identity(settings: Settings, *, write: bool = True) -> dict[str, Any]:
    """Return what the search's scorers read beside responses: their models, local ones by content.

    Raises ImpossibleJobError or MachineError.
    """
    scoring, names = settings.scoring, [one.scorer for one in judging(settings.search.objectives)]
    models = {"nli": scoring.nli_model, "classifier": scoring.classifier}
    found: dict[str, Any] = {
        name: _scorer_model(settings, model, write=write) for name, model in models.items() if name in names and model
    }
    if "judge" in names:
        asked = settings.judge.question or settings.card.behaviour
        found["judge"] = {"model": settings.judge.model, "question": asked}
    if TASKS in settings.search.objectives:
        folder = scoring.tasks_folder
        files = sorted(Path(folder).glob("*.yaml")) if folder is not None else []
        own = {path.name: sha256_file(path) for path in files}
        found[TASKS] = {"names": scoring.tasks, "limit": scoring.tasks_limit, "own": own}
    return dict(redacted(found))


def _scorer_model(settings: Settings, name: str, *, write: bool) -> dict[str, Any]:
    return model_identity(settings.model_copy(update={"model": name}), write=write)


def require_same_scorers(identity: Mapping[str, Any], settings: Settings) -> None:
    """Raise UsageError if the search's scorers are not those that a job began with."""
    given, found = identity.get("scorers", {}), scorer_identity(settings)
    for name in sorted(given.keys() | found.keys()):
        if given.get(name) != found.get(name):
            raise UsageError(
                f"the scorer {name} is not the one that this job began with",
                remedy=f"set what {name} reads as at the first start: another one would measure something else",
            )


def as_identified(name: str, value: Any) -> Any:
    """Return a setting's value, by dotted key, as it stands in a job's identity."""
    return BY_RULE.get(name) if value is None else value


def stored(settings: Settings) -> dict[str, Any]:
    """Return the settings stored in job.json, without those about one start's machine."""
    return settings.model_dump(mode="json", exclude=set(ENDS))


def extends(name: str) -> bool:
    """Return whether a setting, by dotted key, only extends a job."""
    section, _, rest = name.partition(".")
    return section in EXTENDING or rest in EXTENDING_WITHIN.get(section, ())
