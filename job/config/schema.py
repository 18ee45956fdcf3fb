"""What the user asked for: command line > environment > TOML file > defaults, each value with its source."""

from __future__ import annotations

import math
import re
from typing import Literal

from pydantic import ConfigDict, Field
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from job.config.behaviours import Behaviour
from job.config.durations import Hours, Minutes, Seconds
from job.config.scorers import CROSS_ENTROPY
from job.config.sections import (
    AblationSettings,
    BatchingSettings,
    CardSettings,
    ChoiceSettings,
    DirectionSettings,
    HubSettings,
    JudgeSettings,
    LoadingSettings,
    Prompts,
    PromptSettings,
    S3Settings,
    ScoringSettings,
    SearchSettings,
)
from job.records import ExportFormat

_TARGET = re.compile(r"file:///.+|hf://[\w.-]+/[\w.-]+(@[^@\s]+)?|s3://[^/\s]+(/.*)?")
ENVIRONMENT_PREFIX = "ABLITERATE_"
# Settings of this machine and command: not stored with a job, which may move to another machine.
ENDS = ("when_done", "when_failed")
# Prompt sets used only by orthogonalize_directions.
REFERENCE_SETS = ("helpfulness_prompts", "unhelpfulness_prompts", "capability_prompts")
# Used only by the objective cross-entropy.
TEXTS = "text_prompts"


def default_startup_trials(trials: int) -> int:
    """Return the number of start-up trials of a search with `trials` trials."""
    return min(60, math.ceil(trials / 3))


class Settings(BaseSettings):
    """All settings of a job, frozen; the default values stand in `default.toml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")  # type: ignore[assignment]  # pydantic's own idiom for BaseModel

    model: str = Field(
        min_length=1, description="The model: a folder in Hugging Face format, or NAME[@REVISION] on the Hub."
    )
    workspace: str = Field(min_length=1, description="Folder that holds the run folders.")
    behaviour: Behaviour = Field(
        description="Preset of the behaviour to remove: prompts, markers and card.behaviour, which other sources "
        "override; refusal: the defaults."
    )
    seed: int = Field(ge=0, description="Seed of the search and of the split of the evaluation sets.")
    trials: int | None = Field(
        None, ge=1, description="Edits that the search tries; unset: 24 around edits found by gradient, else 200."
    )
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
    over_refusal_prompts: Prompts | None = Field(
        None,
        exclude_if=lambda prompts: prompts is None,
        description="Harmless requests with alarming words; the scorecard counts how many of them each model refuses.",
    )
    text_prompts: Prompts | None = Field(
        None,
        exclude_if=lambda texts: texts is None,
        description="Plain texts for the objective cross-entropy, each up to 512 tokens.",
    )
    loading: LoadingSettings
    batching: BatchingSettings
    directions: DirectionSettings
    ablation: AblationSettings
    search: SearchSettings
    scoring: ScoringSettings
    judge: JudgeSettings
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
        if CROSS_ENTROPY not in self.search.objectives:
            unused.add(TEXTS)
        sets = {name: getattr(self, name) for name in Settings.model_fields if name not in unused}
        return {name: value for name, value in sets.items() if isinstance(value, PromptSettings)}

    @property
    def asked_startup_trials(self) -> int | None:
        """Start-up trials by what was asked for; None if that leaves the number of trials open."""
        if self.startup_trials is None and self.trials is not None:
            return default_startup_trials(self.trials)
        return self.startup_trials
