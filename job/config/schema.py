"""What the user asked for: command line > environment > TOML file > defaults, each value with its source."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from job.config.durations import Hours, Minutes, Seconds
from job.records import ExportFormat

_TARGET = re.compile(r"file:///.+|hf://[\w.-]+/[\w.-]+(@[^@\s]+)?|s3://[^/\s]+(/.*)?")
ENVIRONMENT_PREFIX = "ABLITERATE_"
# Settings of this machine and command: not stored with a job, which may move to another machine.
ENDS = ("when_done", "when_failed")
# Prompt sets used only by orthogonalize_directions.
SPEC_QUALIFIERS = ("revision", "config", "split", "column")
REFERENCE_SETS = ("helpfulness_prompts", "unhelpfulness_prompts", "capability_prompts")


class Section(BaseModel):
    """Base of nested settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PromptSettings(Section):
    """A set of prompts and how each is turned into a conversation."""

    spec: str = Field(
        min_length=1,
        description="A file (.txt, .jsonl, .json, .csv, .tsv, .parquet), a folder of those, a saved or cloned dataset, "
        "or DATASET[@REV][:CONFIG] on the Hub, each with #SPLIT[/COLUMN].",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub dataset; overrides the spec's.")
    config: str | None = Field(None, description="Configuration of a Hub dataset; overrides the spec's.")
    split: str | None = Field(None, description='Split and rows, e.g. "train[:400]"; overrides the spec\'s.')
    column: str | None = Field(
        None,
        description="Column that holds the prompts; overrides the spec's. Unset: the first of "
        "prompt, text, instruction, question, goal, input, query that holds text, else the only one that does.",
    )
    max_characters: int | None = Field(None, ge=1, description="Longer texts are cut to this length; unset: no limit.")
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
        min_length=1, description="Dtypes to try in this order until the model generates without fault."
    )
    device: str = Field(
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="Device of the model: auto (cuda if there is a GPU, else cpu), cpu, cuda, cuda:N or mps.",
    )
    device_map: Literal["single", "balanced", "sequential", "auto"] | dict[str, int | str] = Field(
        description="single: all layers on the device; balanced, sequential, auto: how accelerate spreads them over "
        'all GPUs; or a table of modules with the device of each: the number of a GPU, "cpu" or "disk".'
    )
    max_memory: dict[Annotated[str, Field(pattern=r"^(\d+|cpu|disk)$")], MemorySize] | None = Field(
        None,
        description='Memory of each device that a spread model may use, e.g. {0 = "20GiB", cpu = "60GiB"}; unset: all '
        "free memory.",
    )
    offload_folder: str | None = Field(
        None,
        description="Folder for weights on disk that differ in form from the model's files; unset: a temporary folder.",
    )
    quantization: Literal["none", "bnb-4bit"] = Field(
        description="bnb-4bit: weights are loaded in 4 bits (nf4); the export is made from the full ones."
    )
    trust_remote_code: bool = Field(
        description="Run the code that comes with a model whose family transformers does not know; read it first."
    )
    response_prefix: str = Field(
        description="Response prefix, put into every prompt; auto: the prefix that all responses share, with a chain "
        "of thought closed."
    )


class BatchingSettings(Section):
    """How much is computed at once."""

    rows: int = Field(ge=0, description="Batch size: rows of a forward pass, over all its trials; 0: chosen by a rule.")
    trials: int = Field(ge=0, description="Trials that share forward passes; 0: all of a batch, or a worker's share.")


class DirectionSettings(Section):
    """How the behaviour's direction is found."""

    method: Literal["mean-difference", "contrastive-pca", "probe"] = Field(
        description="How to compute directions from residuals; contrastive-pca adds directions to the mean difference."
    )
    orthogonalize_direction: bool = Field(
        description="Orthogonalise the mean difference to the mean of good residuals."
    )
    orthogonalize_directions: bool = Field(
        description="Orthogonalise all directions to those of helpfulness and, if given, of a capability."
    )
    winsorization_quantile: float = Field(
        gt=0, le=1, description="Clamp every residual vector to this quantile of its entries; 1: no clamping."
    )
    n_components: int = Field(ge=1, le=16, description="Directions per layer that contrastive-pca adds.")
    alpha: float = Field(ge=0, description="Weight of the good covariance in contrastive-pca.")
    pca_method: Literal["auto", "full", "randomized"] = Field(
        description="auto and full are exact; auto solves in sample space if that is smaller."
    )
    eigenvalue_weighting: Literal["eigenvalue", "equal"] = Field(
        description="How strongly contrastive-pca's directions are ablated relative to each other."
    )
    probe_regularization: float = Field(gt=0, description="Weight of the identity in the probe's covariance.")
    iterative_rounds: int = Field(
        ge=1, le=8, description="Rounds of extraction; each adds directions found with the earlier ones ablated."
    )


class AblationSettings(Section):
    """What kind of edit is made."""

    row_normalization: Literal["none", "pre", "full", "column"] = Field(
        description="Which norms of the weights an edit preserves."
    )
    through_norms: bool = Field(
        description="If a norm follows a writer, ablate the direction that this norm maps to the stream's."
    )
    pull_back: Literal["auto", "dual", "gain"] = Field(
        description="How, for a norm's gain g: dual reads g∘v and writes v/g; gain does both along g∘v; auto: dual."
    )


class SearchSettings(Section):
    """How edits are searched for."""

    method: Literal["tpe", "gradient"] = Field(
        description="tpe: trials from a space of weight kernels; gradient: gradient descent finds edits, and trials "
        "sample around them."
    )
    space: Literal["wide", "field"] = Field(description="Parameter space of tpe; field is that of other tools.")
    ei_candidates: int = Field(ge=1, description="Candidates that the TPE sampler compares for each trial.")
    known_points: bool = Field(description="Begin with eight edits that are known to do well.")
    ahead: int | None = Field(
        None,
        ge=0,
        description="Batches to plan before the results of the previous batch are known, so that no worker "
        "waits for the slowest; unset: 1 if the job's first start has several workers, else 0.",
    )


class ScoringSettings(Section):
    """How responses are judged."""

    answer_tokens: int = Field(ge=1, description="Longest response that is judged, in tokens.")
    search_tokens: int = Field(
        ge=1, description="Longest response during the search, in tokens; finalists are judged again in full."
    )
    refusal_markers: list[Annotated[str, Field(min_length=1)]] = Field(
        min_length=1, description="A response that contains one of these that its prompt does not is a refusal."
    )
    gibberish: float | None = Field(
        None,
        gt=0,
        description="A response is broken if the base model's loss on it exceeds that on its own responses by this "
        "many nats per token. Applies to candidates for the choice and to reported figures; unset: not measured.",
    )
    detectors: list[str] = Field(
        description="Detectors that judge the report's responses side by side: markers, soft, degenerate, nli, and "
        "those that installed packages add through the entry point group abliteration_job.scorers."
    )
    nli_model: str | None = Field(
        None, description="Model for zero-shot classification of the detector nli: a folder or NAME[@REVISION]."
    )

    @property
    def effective_search_tokens(self) -> int:
        """Longest response in the search, in tokens."""
        return min(self.search_tokens, self.answer_tokens)


class ChoiceSettings(Section):
    """Which trial is exported."""

    refusal_tolerance: float = Field(
        ge=0,
        le=1,
        description="The lowest KL is taken among finalists whose bound of refused or broken prompts is this near the "
        "lowest one.",
    )
    held_out: float = Field(
        ge=0,
        le=0.5,
        description="Share of the extraction sets, at least 20 prompts, that only the choice uses; both need 100.",
    )


class CardSettings(Section):
    """What the model card says beside what was done and measured."""

    behaviour: str = Field(min_length=1, description="The removed behaviour, in a few words.")
    base_model: str | None = Field(
        None,
        pattern=r"^[\w.-]+/[\w.-]+$",
        description="Name of the base model on the Hub; unset: MODEL, if it is a public repository.",
    )


class HubSettings(Section):
    """How results are delivered to the Hugging Face Hub."""

    pull_request: bool = Field(description="Open a pull request instead of committing to the branch.")


class S3Settings(Section):
    """How results are delivered to S3 and compatible servers."""

    endpoint: str | None = Field(None, description="URL of a compatible server; unset: what boto3 finds.")
    region: str | None = Field(None, description="Region of the bucket; unset: what boto3 finds.")
    addressing_style: Literal["auto", "path", "virtual"] = Field(
        description="Whether URLs name the bucket in the path or in the host name."
    )
    checksums: Literal["auto", "when_required"] = Field(
        description="auto: SHA-256 if the server stores it; when_required: none, for servers that reject checksums."
    )
    part_mib: int = Field(ge=5, le=5120, description="Size of a part in MiB.")
    parallel_parts: int = Field(ge=1, le=64, description="Parts that are sent, and held in memory, at the same time.")
    sse: Literal["AES256", "aws:kms"] | None = Field(None, description="Server-side encryption to request.")
    kms_key: str | None = Field(None, description="Key for aws:kms.")


class Settings(BaseSettings):
    """All settings of a job, frozen; the default values stand in `default.toml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")  # type: ignore[assignment]  # pydantic's own idiom for BaseModel

    model: str = Field(
        min_length=1, description="The model: a folder in Hugging Face format, or NAME[@REVISION] on the Hub."
    )
    workspace: str = Field(min_length=1, description="Folder that holds the run folders.")
    seed: int = Field(ge=0, description="Seed of the search and of the split of the evaluation sets.")
    trials: int = Field(ge=1, description="Number of edits that the search tries.")
    startup_trials: int | None = Field(
        None, ge=1, description="Trials before the sampler's; unset: min(60, trials / 3)."
    )
    trials_per_batch: int | None = Field(
        None, ge=1, description="Trials planned and evaluated together; unset: 4 for each worker of the first start."
    )
    kl_tokens: int = Field(
        ge=1,
        description="Tokens of the base model's own responses over which the KL divergence is averaged; 1: the "
        "first token, as other tools measure it.",
    )
    skip_kl_above: float | None = Field(
        None, ge=0, description="Skip the responses of trials with a larger KL divergence; unset: skip none."
    )
    tune: bool = Field(
        description="If batching.rows is 0, measure at the first start which batch size is fastest; otherwise "
        "a rule chooses it."
    )
    checkpoint: str | None = Field(
        None,
        description="Mirror from which another machine can continue the job: s3://bucket/prefix, hf://user/repo "
        "or file:///dir.",
    )
    require_checkpoint: bool = Field(description="Stop the job if its checkpoint stays unreachable.")
    when_done: Literal["nothing", "stop", "destroy"] = Field(
        description="What to do with the rented machine once the result is delivered."
    )
    when_failed: Literal["nothing", "stop", "destroy"] = Field(
        description="What to do with the rented machine if the job fails."
    )
    upload: list[str] = Field(
        description="Targets to deliver the result to: file:///dir, hf://user/repo[@branch], s3://bucket/prefix."
    )
    visibility: Literal["private", "gated", "public"] = Field(
        description="Who may read the Hub repository: its owner, those who accept its terms, everybody."
    )
    export_format: ExportFormat = Field(
        description="merged: the whole edited model; adapter: a LoRA for PEFT; directions: a small file that "
        "`abliterate apply` applies to the base model."
    )
    max_kl: float | None = Field(None, ge=0, description="Do not upload if the KL on the report split exceeds this.")
    max_refusals: int | None = Field(
        None, ge=0, description="Do not upload if more than this many bad report prompts are refused."
    )
    allow: list[str] = Field(description="Preflight checks that may fail, by name.")
    price: float | None = Field(None, ge=0, description="Price of this machine in dollars an hour.")
    max_hours: Hours | None = Field(
        None, gt=0, description="Longest time of the job in hours, or as in 90m; the search stops in time to export."
    )
    max_cost: float | None = Field(
        None, gt=0, description="Highest cost of the job in dollars; the search stops as for max_hours. Needs a price."
    )
    study_storage: Literal["auto", "workspace", "local"] = Field(
        description="Where the study is during the search: in the workspace, or on this machine's own disk with a "
        "copy in the workspace after every batch; auto: local if the workspace is a network file system."
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="Worker processes that evaluate trials, one per GPU; on a CPU they share its cores; unset: one per "
        "GPU, if each holds the model, and one on a CPU; with Ray, until the cluster is full.",
    )
    engine: Literal["local", "ray"] = Field(
        description="What runs the workers: this machine, or Ray on one machine or several."
    )
    address: str | None = Field(
        None,
        description="HOST:PORT of a Ray cluster, or auto for this machine's cluster; unset: RAY_ADDRESS, else Ray is "
        "started on this machine alone.",
    )
    hang_seconds: Seconds = Field(
        ge=0, description="Seconds after which a forward pass counts as hung and the job stops; 0: no limit."
    )
    grace: Seconds = Field(ge=0, description="Seconds that a stopped search may take to finish its batch, or as in 1m.")
    wait_for_gpu: Minutes = Field(
        ge=0, description="Minutes to wait until other processes leave the GPUs, or with a unit as in 2h."
    )
    probe_seconds: Seconds = Field(
        ge=0,
        description="Longest time of each probe of preflight (arithmetic, memory, disk, network), in seconds; 0: one "
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
    helpfulness_prompts: Prompts = Field(
        description="Instructions for the direction of helpfulness; see orthogonalize_directions."
    )
    unhelpfulness_prompts: Prompts = Field(
        description="Web text for the direction of helpfulness; see orthogonalize_directions."
    )
    capability_prompts: Prompts | None = Field(
        None, description="Prompts of a capability that edits should preserve; see orthogonalize_directions."
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
        """Accept values only from `load_settings`, which has merged the sources."""
        return (init_settings,)

    def prompt_sets(self) -> dict[str, PromptSettings]:
        """Return the used prompt sets, by the setting's name."""
        unused = set() if self.directions.orthogonalize_directions else set(REFERENCE_SETS)
        sets = {name: getattr(self, name) for name in Settings.model_fields if name not in unused}
        return {name: value for name, value in sets.items() if isinstance(value, PromptSettings)}

    @property
    def effective_startup_trials(self) -> int:
        """Start-up trials of the search, before the sampler takes over."""
        return self.startup_trials or min(60, math.ceil(self.trials / 3))
