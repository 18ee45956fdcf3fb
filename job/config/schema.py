"""What the user asked for: command line > environment > TOML file > defaults, each value with its source."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource

from job.config.legacy import translated
from job.errors import UsageError
from job.records import ExportFormat
from job.scoring.refusals import BUILTIN_SCORERS, known_scorers

_TARGET = re.compile(r"file:///.+|hf://[\w.-]+/[\w.-]+(@[^@\s]+)?|s3://[^/\s]+(/.*)?")
ENVIRONMENT_PREFIX = "ABLITERATE_"
# Settings of this machine and this command alone: they are not kept with a job, which may move to another machine.
ENDS = ("when_done", "when_failed")
# Prompt sets that only orthogonalize_directions uses.
SPEC_QUALIFIERS = ("revision", "config", "split", "column")
REFERENCE_SETS = ("helpfulness_prompts", "unhelpfulness_prompts", "capability_prompts")


class Section(BaseModel):
    """Base of nested settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PromptSettings(Section):
    """A set of prompts and how each is turned into a conversation."""

    spec: str = Field(
        min_length=1,
        description="A file or folder (.txt, .jsonl, .parquet, saved dataset) or DATASET[@REV][:CONFIG], "
        "either with #SPLIT[/COLUMN].",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub dataset; overrides the spec's.")
    config: str | None = Field(None, description="Configuration of a Hub dataset; overrides the spec's.")
    split: str | None = Field(None, description='Split and rows, e.g. "train[:400]"; overrides the spec\'s.')
    column: str | None = Field(None, description="Column that holds the prompts; overrides the spec's.")
    max_characters: int | None = Field(None, ge=1, description="Texts are cut to so many characters; unset: none is.")
    prefix: str = Field("", description="Text put before every prompt.")
    suffix: str = Field("", description="Text put after every prompt.")
    system_prompt: str | None = Field(None, description="System prompt; unset: none.")


def _spec_table(value: Any) -> Any:
    return {"spec": value} if isinstance(value, str) else value


Prompts = Annotated[PromptSettings, BeforeValidator(_spec_table)]


MemorySize = Annotated[str, Field(pattern=r"^\d+(\.\d+)?[KMG]i?B$")]


class LoadingSettings(Section):
    """How the model is loaded and addressed."""

    dtypes: list[Literal["auto", "bfloat16", "float16", "float32"]] = Field(
        min_length=1, description="Tried in order until one generates without fault."
    )
    device: str = Field(
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="auto (cuda where there is one, else cpu), cpu, cuda, cuda:N or mps.",
    )
    device_map: Literal["single", "balanced", "sequential", "auto"] | dict[str, int | str] = Field(
        description="single: all layers on the device; balanced, sequential, auto: how accelerate spreads them over "
        'all GPUs; or a table of modules with the device of each: the number of a GPU, "cpu" or "disk".'
    )
    max_memory: dict[Annotated[str, Field(pattern=r"^(\d+|cpu|disk)$")], MemorySize] | None = Field(
        None,
        description='What a spread model may take of each device, e.g. {0 = "20GiB", cpu = "60GiB"}; unset: all that '
        "is free.",
    )
    offload_folder: str | None = Field(
        None,
        description="Where weights go that are kept on disk in another form than the model's files; unset: a "
        "temporary folder.",
    )
    quantization: Literal["none", "bnb-4bit"] = Field(
        description="bnb-4bit: weights are loaded in 4 bits (nf4); the export is still made from the full ones."
    )
    trust_remote_code: bool = Field(
        description="Run the code that comes with a model whose family transformers does not know; read it first."
    )
    response_prefix: str = Field(
        description="Text that every answer is made to begin with; auto: what all answers begin with anyway, "
        "with a chain of thought closed."
    )


class BatchingSettings(Section):
    """How much is computed at once."""

    rows: int = Field(ge=0, description="Rows of a forward, all trials together; 0: a rule.")
    trials: int = Field(ge=0, description="Trials of a batch that share their forwards; 0: all, or a worker's share.")


class DirectionSettings(Section):
    """How the behaviour's direction is found."""

    method: Literal["mean-difference", "contrastive-pca", "probe"] = Field(
        description="How directions are computed from residuals; contrastive-pca adds its own to the mean difference."
    )
    orthogonalize_direction: bool = Field(description="Take the good mean out of the difference.")
    orthogonalize_directions: bool = Field(
        description="Take the directions of helpfulness and, where given, of a capability out of all directions."
    )
    winsorization_quantile: float = Field(
        gt=0, le=1, description="Clamp every residual vector to this quantile of its entries; 1: not at all."
    )
    n_components: int = Field(ge=1, le=16, description="Directions a layer that contrastive-pca adds.")
    alpha: float = Field(ge=0, description="Weight of the good covariance in contrastive-pca.")
    pca_method: Literal["auto", "full", "randomized"] = Field(
        description="auto and full are exact, auto in sample space where that is smaller."
    )
    eigenvalue_weighting: Literal["eigenvalue", "equal"] = Field(
        description="How strongly contrastive-pca's directions are ablated relative to each other."
    )
    probe_regularization: float = Field(gt=0, description="Weight of the identity in the probe's covariance.")
    iterative_rounds: int = Field(
        ge=1, le=8, description="Rounds of extraction; each after the first adds what is left with the former ablated."
    )


class AblationSettings(Section):
    """What kind of edit is made."""

    row_normalization: Literal["none", "pre", "full", "column"] = Field(
        description="Which norms of the weights an edit preserves."
    )
    through_norms: bool = Field(
        description="Where a norm stands between a writer and the stream, ablate what becomes the direction behind it."
    )


class SearchSettings(Section):
    """How edits are searched for."""

    space: Literal["wide", "field"] = Field(description="The space of parameters; field is other tools'.")
    ei_candidates: int = Field(ge=1, description="Candidates the TPE sampler weighs for each trial.")
    known_points: bool = Field(description="Begin with eight edits that are known to do well.")
    ahead: int = Field(
        ge=0,
        description="Batches that are asked before the results of the one before them are known, so that no worker "
        "waits for the slowest.",
    )


class ScoringSettings(Section):
    """How answers are judged."""

    answer_tokens: int = Field(ge=1, description="Answers are judged up to this many tokens.")
    search_tokens: int = Field(
        ge=1,
        description="In the search up to this many, if fewer; trials that come into question are judged again in full.",
    )
    refusal_markers: list[Annotated[str, Field(min_length=1)]] = Field(
        min_length=1, description="An answer that contains one of these counts as a refusal."
    )
    gibberish: float | None = Field(
        None,
        gt=0,
        description="Nats a token by which the base model must find an answer less likely than its own for it to count "
        "as broken, in trials that come into question and in reported figures; unset: it is not asked.",
    )
    detectors: list[str] = Field(
        description="What judges the answers of the report, side by side: markers, soft, degenerate, nli, and what "
        "installed packages add by the entry points abliteration_job.scorers."
    )
    nli_model: str | None = Field(
        None, description="Of the detector nli: a model for zero-shot classification, a folder or NAME[@REVISION]."
    )

    @property
    def effective_search_tokens(self) -> int:
        """Longest answers in the search, in tokens."""
        return min(self.search_tokens, self.answer_tokens)


class ChoiceSettings(Section):
    """Which trial is exported."""

    refusal_tolerance: float = Field(
        ge=0,
        le=1,
        description="The lowest KL is taken among the trials within this share of the fewest refusals.",
    )


class CardSettings(Section):
    """What the model card says beside what was done and measured."""

    behaviour: str = Field(min_length=1, description="What was removed, in a few words.")
    base_model: str | None = Field(
        None,
        pattern=r"^[\w.-]+/[\w.-]+$",
        description="Name of the base model on the Hub; unset: MODEL's, where it is a public repository.",
    )


class HubSettings(Section):
    """How results are delivered to the Hugging Face Hub."""

    pull_request: bool = Field(description="Leave them as an open pull request instead of committing to the branch.")


class S3Settings(Section):
    """How results are delivered to S3 and compatible servers."""

    endpoint: str | None = Field(None, description="URL of a compatible server; unset: what boto3 finds.")
    region: str | None = Field(None, description="Region of the bucket; unset: what boto3 finds.")
    addressing_style: Literal["auto", "path", "virtual"] = Field(
        description="Whether the bucket stands in the path or in the host name."
    )
    checksums: Literal["auto", "when_required"] = Field(
        description="auto: SHA-256 where the server keeps them; when_required: never, for servers that choke on them."
    )
    part_mib: int = Field(ge=5, le=5120, description="Size of a part in MiB.")
    parallel_parts: int = Field(ge=1, le=64, description="Parts sent, and held in memory, at the same time.")
    sse: Literal["AES256", "aws:kms"] | None = Field(None, description="Server-side encryption to ask for.")
    kms_key: str | None = Field(None, description="Key for aws:kms.")


class Settings(BaseSettings):
    """All settings of a job, frozen; the default values stand in `default.toml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")  # type: ignore[assignment]  # pydantic's own idiom for BaseModel

    model: str = Field(
        min_length=1, description="The model: a folder in Hugging Face format, or NAME[@REVISION] on the Hub."
    )
    workspace: str = Field(min_length=1, description="Folder of all run folders.")
    seed: int = Field(ge=0, description="Seed of the search and of the split of the evaluation sets.")
    trials: int = Field(ge=1, description="How many edits the search tries.")
    startup_trials: int | None = Field(
        None, ge=1, description="Those before the sampler's; unset: min(60, trials / 3)."
    )
    trials_per_batch: int = Field(ge=1, description="Trials asked and evaluated together.")
    kl_tokens: int = Field(
        ge=1,
        description="Positions of the base model's own answers over which the KL divergence is a mean; 1: that of the "
        "first token, as others measure it.",
    )
    skip_kl_above: float | None = Field(
        None, ge=0, description="Trials of a larger KL divergence are given up before they answer; unset: none are."
    )
    tune: bool = Field(
        description="Measure at the first start how many rows of a forward are fastest, where batching.rows is 0; else "
        "a rule says."
    )
    checkpoint: str | None = Field(
        None,
        description="Where the job is mirrored, so that another machine can go on: s3://bucket/prefix, hf://user/repo "
        "or file:///dir.",
    )
    require_checkpoint: bool = Field(description="Stop the job where its checkpoint stays down.")
    when_done: Literal["nothing", "stop", "destroy"] = Field(
        description="What becomes of the rented machine once the result is delivered."
    )
    when_failed: Literal["nothing", "stop", "destroy"] = Field(
        description="What becomes of the rented machine when the job fails."
    )
    upload: list[str] = Field(
        description="Targets that the result is delivered to: file:///dir, hf://user/repo[@branch], s3://bucket/prefix."
    )
    visibility: Literal["private", "gated", "public"] = Field(
        description="Who may read what is delivered to the Hub: the owner, those who agree to its terms, everybody."
    )
    export_format: ExportFormat = Field(
        description="merged: the whole edited model; adapter: a LoRA for PEFT; directions: a small file that "
        "`abliterate apply` applies to the base model."
    )
    max_kl: float | None = Field(None, ge=0, description="Deliver only what has no larger KL on the report split.")
    max_refusals: int | None = Field(None, ge=0, description="Deliver only what refuses no more bad report prompts.")
    allow: list[str] = Field(description="Preflight checks that may fail, by name.")
    price: float | None = Field(None, ge=0, description="Dollars an hour of this machine.")
    max_hours: float | None = Field(
        None, gt=0, description="Hours that the job may take; the search stops in time to export and deliver its best."
    )
    max_cost: float | None = Field(None, gt=0, description="Dollars that the job may cost, likewise; needs a price.")
    study_storage: Literal["auto", "workspace", "local"] = Field(
        description="Where the study is while it is searched: in the workspace, or on this machine's own disk with a "
        "copy in the workspace after every batch; auto: the latter where the workspace is a network file system."
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="Processes that evaluate trials, one per GPU; on a CPU they share its cores; unset: one for every "
        "GPU, if each holds the model, and one on a CPU.",
    )
    database: str | None = Field(
        None,
        description="postgresql+psycopg://USER@HOST/NAME: where `abliterate worker` on other machines finds the study "
        "and its tasks; the password comes from PGPASSWORD or ~/.pgpass.",
    )

    @field_validator("database")
    @classmethod
    def _is_postgresql_without_password(cls, value: str | None) -> str | None:
        if value is not None:
            found = urlsplit(value)
            if found.scheme != "postgresql+psycopg" or not found.path.strip("/"):
                raise ValueError("write postgresql+psycopg://USER@HOST/NAME")
            if found.password is not None or "password" in found.query:
                # Not a ValueError, which would be shown with what was given.
                raise UsageError(
                    "database: an address with its password would be written down",
                    remedy="leave it out, and set PGPASSWORD or use ~/.pgpass",
                )
        return value

    hang_seconds: float = Field(
        ge=0, description="Seconds that one forward may take before it counts as hung and the job stops; 0: any."
    )
    grace: float = Field(ge=0, description="Seconds that a stopped search gets to end its batch.")
    wait_for_gpu: float = Field(ge=0, description="Minutes to wait for others to leave the GPUs.")
    probe_seconds: float = Field(
        ge=0,
        description="Seconds that each timed probe of preflight takes at most: arithmetic, memory, disk, line; 0: one "
        "step each.",
    )
    good_prompts: Prompts = Field(description="Prompts without the behaviour, for the directions.")
    bad_prompts: Prompts = Field(description="Prompts with the behaviour, for the directions.")
    good_eval_prompts: Prompts = Field(description="Prompts without the behaviour, for search and report.")
    bad_eval_prompts: Prompts = Field(description="Prompts with the behaviour, for search and report.")
    good_report_prompts: Prompts | None = Field(
        None, description="Prompts for the reported figures; unset: half of good_eval_prompts."
    )
    bad_report_prompts: Prompts | None = Field(
        None, description="Prompts for the reported figures; unset: half of bad_eval_prompts."
    )
    helpfulness_prompts: Prompts = Field(description="Instructions, for orthogonalize_directions.")
    unhelpfulness_prompts: Prompts = Field(description="Web text, for orthogonalize_directions.")
    capability_prompts: Prompts | None = Field(
        None, description="Prompts of a capability that edits are to leave alone, for orthogonalize_directions."
    )
    loading: LoadingSettings
    batching: BatchingSettings
    directions: DirectionSettings
    ablation: AblationSettings
    search: SearchSettings
    scoring: ScoringSettings
    choice: ChoiceSettings
    card: CardSettings
    hub: HubSettings
    s3: S3Settings

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take values as given: `load_settings` has merged the sources and knows where each came from."""
        return (init_settings,)

    def prompt_sets(self) -> dict[str, PromptSettings]:
        """Return the prompt sets that the job uses, by the setting's name."""
        unused = set() if self.directions.orthogonalize_directions else set(REFERENCE_SETS)
        sets = {name: getattr(self, name) for name in Settings.model_fields if name not in unused}
        return {name: value for name, value in sets.items() if isinstance(value, PromptSettings)}

    @property
    def effective_startup_trials(self) -> int:
        """Trials at the start of the search that the sampler has no say in."""
        return self.startup_trials or min(60, math.ceil(self.trials / 3))


class EnvironmentSource(EnvSettingsSource):
    """ABLITERATE_* variables; their values are TOML where they parse as such, as with --set."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """Read the value of a nested setting."""
        return toml_value(value)


def toml_value(text: str) -> Any:
    """Return the TOML value that text spells, or the text itself if it spells none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


class LoadedSettings:
    """Settings together with the source of each value, by dotted key, and what became of old names."""

    def __init__(self, settings: Settings, sources: dict[str, str], notes: list[str]) -> None:
        self.settings = settings
        self.sources = sources
        self.notes = notes


@dataclass(frozen=True)
class FixedSettings:
    """Settings that a file of ours fixes, by dotted key.

    Attributes:
        source: The file's name.
        values: What nobody may change.
        origins: Model and prompts, which may also be given from elsewhere.
        left_out: What else the file says, which is not taken from it.
    """

    source: str
    values: Mapping[str, Any]
    origins: Mapping[str, Any]
    left_out: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def load_settings(
    options: Mapping[str, Any],
    *,
    profile: str | None = None,
    config: Path | None = None,
    assignments: Iterable[str] = (),
    fixed: FixedSettings | None = None,
) -> LoadedSettings:
    """Merge all sources and validate the result.

    Args:
        options: Values given as command-line options, by dotted key.
        profile: Name of a set of settings that comes with the job, between the defaults and the file.
        config: A TOML file.
        assignments: Values given as ``--set key=value``; they count as command-line options.
        fixed: What is given already.

    Raises:
        UsageError: A source cannot be read, or a setting is unknown or invalid.
    """
    values, sources, notes = _merged(options, profile, config, assignments, fixed)
    return LoadedSettings(_validated(values, sources), sources, notes)


def _merged(
    options: Mapping[str, Any],
    profile: str | None,
    config: Path | None,
    assignments: Iterable[str],
    fixed: FixedSettings | None = None,
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Return the values of all sources as nested tables, the source of each by dotted key, and notes on old names."""
    notes: list[str] = []
    layers: list[tuple[str, dict[str, Any]]] = [("default", default_values())]
    if profile is not None:
        layers.append((f"profile {profile}", _profile(profile)))
    if config is not None:
        table, notes = translated(_read_toml(config))
        layers.append((str(config), _nested(table.items())))
    layers.append(("environment", _environment()))
    if fixed is not None:
        layers.append((fixed.source, _nested(fixed.origins.items())))
    layers.append(("command line", _nested([*options.items(), *map(_assignment, assignments)])))
    if fixed is not None:
        layers.append((fixed.source, _nested(fixed.values.items())))
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, layer in layers:
        _check_names(layer, Settings, name)
        for key, value in _flatten(layer):
            if key.endswith(".spec"):
                _forget_qualifiers(merged, sources, key)
            _put(merged, key, value)
            sources[key] = name
    return merged, sources, notes


def _forget_qualifiers(merged: dict[str, Any], sources: dict[str, str], key: str) -> None:
    """Drop what a source of lower priority said of another spec: its split is not this one's."""
    table = key.removesuffix(".spec")
    for name in SPEC_QUALIFIERS:
        if sources.pop(f"{table}.{name}", None):
            del merged[table][name]


def default_values() -> dict[str, Any]:
    """Return the contents of default.toml."""
    return tomllib.loads(resources.files("job").joinpath("default.toml").read_text("utf-8"))


def profiles() -> list[str]:
    """Return the names of the sets of settings that come with the job."""
    return sorted(file.name.removesuffix(".toml") for file in resources.files("job").joinpath("profiles").iterdir())


def _profile(name: str) -> dict[str, Any]:
    if name not in profiles():
        raise UsageError(f"there is no profile {name}", remedy=f"choose from: {', '.join(profiles())}")
    return tomllib.loads(resources.files("job").joinpath(f"profiles/{name}.toml").read_text("utf-8"))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no settings file {path}", remedy="check --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the settings file {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not valid TOML: {error}", remedy="correct the file") from error


def _environment() -> dict[str, Any]:
    """Return the settings that the environment holds, refusing names that are none."""
    for name in os.environ:
        if name.startswith(ENVIRONMENT_PREFIX):
            path = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
            _check_names(_nested([(".".join(path), None)]), Settings, f"the environment ({name})")
    source = EnvironmentSource(
        Settings, env_prefix=ENVIRONMENT_PREFIX, env_nested_delimiter="__", env_ignore_empty=True
    )
    return source()


def assigned(assignments: Iterable[str]) -> dict[str, Any]:
    """Return ``key=value`` assignments as nested tables.

    Raises:
        UsageError: One is malformed or names no setting.
    """
    found = _nested(map(_assignment, assignments))
    _check_names(found, Settings, "command line")
    return found


def leaves(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return all values of nested tables by dotted key; names that are no settings are kept as they are."""
    return dict(_flatten(tables))


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by dotted key as nested tables."""
    return _nested(values.items())


def environment_values() -> dict[str, Any]:
    """Return the settings that the environment gives, by dotted key."""
    return leaves(_environment())


def merged(values: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested tables with others put over them."""
    found = dict(values)
    for key, value in others.items():
        below = found.get(key)
        found[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return found


def _assignment(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise UsageError(f"--set {text}: not of the form key=value", remedy="write --set trials=50")
    return key.strip(), toml_value(value.strip())


def _nested(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return nested tables from dotted keys; later pairs win."""
    tables: dict[str, Any] = {}
    for key, value in pairs:
        _put(tables, key, value)
    return tables


def _put(tables: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    table = tables
    for parent in parents:
        below = table.setdefault(parent, {})
        if not isinstance(below, dict):
            below = table[parent] = _spec_table(below)
        table = below
    table[leaf] = value


def _flatten(
    tables: Mapping[str, Any], section: type[BaseModel] | None = None, prefix: str = ""
) -> Iterable[tuple[str, Any]]:
    """Yield all values by dotted key; a prompt set given as a bare spec is one with only that."""
    for key, value in tables.items():
        field = (section or Settings).model_fields.get(key)
        inner = _section(field) if field is not None else None
        if inner is PromptSettings:
            value = _spec_table(value)
        if inner is not None and isinstance(value, Mapping):  # other tables are values as they are
            yield from _flatten(value, inner, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """Return the section that a field holds, None if it holds a plain value."""
    candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
    for candidate in candidates:
        candidate = getattr(candidate, "__origin__", candidate)
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _check_names(table: Mapping[str, Any], section: type[BaseModel], source: str, prefix: str = "") -> None:
    """Refuse settings that do not exist, naming the nearest that does."""
    for key, value in table.items():
        field = section.model_fields.get(key)
        if field is None:
            raise UsageError(f"unknown setting {prefix}{key} in {source}", remedy=_nearest(prefix + key))
        below = _section(field)
        if isinstance(value, Mapping) and below is not None:
            _check_names(value, below, source, f"{prefix}{key}.")


def _nearest(key: str) -> str:
    close = difflib.get_close_matches(key, list(setting_names()), n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else "`abliterate config show` lists all settings"


def setting_names(section: type[BaseModel] = Settings, prefix: str = "") -> Iterable[str]:
    """Yield the dotted names of all settings."""
    for name, field in section.model_fields.items():
        below = _section(field)
        if below is None:
            yield prefix + name
        else:
            yield from setting_names(below, f"{prefix}{name}.")


def _validated(merged: dict[str, Any], sources: Mapping[str, str]) -> Settings:
    try:
        settings = Settings(**merged)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if isinstance(part, str))
        if first["type"] == "missing":
            raise UsageError(f"{key} is not given", remedy=_how_to_give(key)) from None
        source = sources.get(key, "the settings")
        shown = first["msg"][0].lower() + first["msg"][1:]
        raise UsageError(f"{key} = {first['input']!r} ({source}): {shown}", remedy="correct it") from None
    _refuse_contradictions(settings)
    return settings


def _refuse_contradictions(settings: Settings) -> None:
    """Refuse settings that do not go together, and addresses of a kind that is not supported."""
    if settings.startup_trials is not None and settings.startup_trials > settings.trials:
        raise UsageError(
            f"startup_trials = {settings.startup_trials} is more than trials = {settings.trials}",
            remedy="lower --startup-trials or raise --trials",
        )
    if settings.checkpoint is not None and not _TARGET.fullmatch(settings.checkpoint):
        raise UsageError(
            f"checkpoint {settings.checkpoint!r} is not supported",
            remedy="use s3://bucket/prefix, hf://user/repo or file:///absolute/folder",
        )
    _refuse_unknown_detectors(settings.scoring)
    if settings.tune and settings.batching.rows:
        raise UsageError(
            f"tune does not go together with batching.rows = {settings.batching.rows}, which it would find",
            remedy="leave one of them out",
        )
    if settings.require_checkpoint and settings.checkpoint is None:
        raise UsageError("require_checkpoint is set and there is no checkpoint", remedy="give --checkpoint")
    for target in settings.upload:
        if not _TARGET.fullmatch(target):
            raise UsageError(
                f"upload target {target!r} is not supported",
                remedy="use file:///absolute/folder, hf://user/repo[@branch] or s3://bucket/prefix",
            )
    if settings.loading.quantization != "none" and settings.ablation.row_normalization != "none":
        raise UsageError(
            f"loading.quantization = {settings.loading.quantization} does not go together with "
            f"ablation.row_normalization = {settings.ablation.row_normalization}, which needs the full weights",
            remedy="use row_normalization = none, or load the model unquantised",
        )
    if settings.export_format == "adapter" and settings.ablation.row_normalization not in ("none", "pre"):
        raise UsageError(
            f"export_format = adapter does not go together with "
            f"ablation.row_normalization = {settings.ablation.row_normalization}, whose edits are not of low rank",
            remedy="use row_normalization = none or pre, or another format",
        )


def _refuse_unknown_detectors(scoring: ScoringSettings) -> None:
    for name in scoring.detectors:
        # Entry points are looked up only where one is asked for.
        if name not in BUILTIN_SCORERS and name not in (known := known_scorers()):
            raise UsageError(
                f"scoring.detectors: there is no detector {name!r}",
                remedy=f"choose from {', '.join(known)}, or install the package that has it",
            )
    if "nli" in scoring.detectors:
        if scoring.nli_model is None:
            raise UsageError("scoring.detectors: nli needs a model", remedy="set scoring.nli_model")
        if scoring.nli_model.startswith(("/", ".", "~")) and not Path(scoring.nli_model).expanduser().is_dir():
            raise UsageError(f"scoring.nli_model: there is no folder {scoring.nli_model}", remedy="correct it")


def default_workspace() -> str:
    """Return the workspace where none is given on the command line."""
    workspace = _environment().get("workspace", default_values()["workspace"])
    return str(workspace)


def asked_ends(options: Mapping[str, str | None]) -> dict[str, str]:
    """Return when_done and when_failed as this command alone asks for them: a job's record must not end machines.

    Args:
        options: Command-line options by the setting's name, None where not given.

    Raises:
        UsageError: A value is none of them.
    """
    environment = _environment()
    found = {}
    for name in ENDS:
        value = str(options.get(name) or environment.get(name) or "nothing")
        if value not in ("nothing", "stop", "destroy"):
            raise UsageError(f"{name} = {value!r} is not known", remedy="choose from: nothing, stop, destroy")
        found[name] = value
    return found


def as_toml(value: Any) -> str:
    """Return a value as TOML spells it, on one line."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(key)} = {as_toml(part)}" for key, part in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def describe_settings(
    options: Mapping[str, Any],
    *,
    profile: str | None = None,
    config: Path | None = None,
    assignments: Iterable[str] = (),
) -> tuple[Settings, list[str]]:
    """Return the settings, a line for every one (its name, its value as TOML, where it comes from) and for old names.

    Raises:
        UsageError: A setting is unknown or invalid; that some are not given yet is no error here.
    """
    values, sources, notes = _merged(options, profile, config, assignments)
    # Stands in for what must be given to run a job but not to look at the settings.
    required = {key: "-" for key, field in Settings.model_fields.items() if field.is_required()}
    settings = _validated({**required, **values}, sources)
    values = dict(_flatten(settings.model_dump(mode="json")))
    lines = []
    for name in setting_names():
        if name in sources:
            lines.append(f"{name} = {as_toml(values[name])}  # {sources[name]}")
        elif not name.partition(".")[0].endswith("_prompts") or name.endswith(".spec"):
            lines.append(f"# {name.removesuffix('.spec')} is not set")
    return settings, [*lines, *(f"# {note}" for note in notes)]


def _how_to_give(key: str) -> str:
    option = "MODEL" if key == "model" else "--" + key.removesuffix(".spec").replace("_", "-")
    return f"give {option} or set it in a TOML file"
