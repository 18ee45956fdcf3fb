"""Values passed between stages and written to disk: frozen, versioned, without torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from job.records.base import Record
from job.records.edits import COMPONENTS, Component, EditParameters, KernelParameters, LearnedDirections
from job.records.finalists import FORCED_TOKENS, ChoiceFigures, FinalistScores, KLSpread, MeasuredFinalists
from job.records.resolution import DATE, PullBack, Resolution, SearchMethod
from job.records.scorecard import KLFigures, Outcomes, ScoredPrompts, Thinking
from job.records.scores import DEFAULT_OBJECTIVES, KL, REFUSALS, ObjectiveScore, TrialScores
from job.text.redaction import MASK

# From modules beside this one; what is defined here is public as well.
__all__ = [
    "COMPONENTS",
    "DATE",
    "DEFAULT_OBJECTIVES",
    "FORCED_TOKENS",
    "KL",
    "REFUSALS",
    "ChoiceFigures",
    "Component",
    "EditParameters",
    "FinalistScores",
    "KLFigures",
    "KLSpread",
    "KernelParameters",
    "LearnedDirections",
    "MeasuredFinalists",
    "ObjectiveScore",
    "Outcomes",
    "PullBack",
    "Record",
    "Resolution",
    "SearchMethod",
    "Thinking",
    "TrialScores",
]

ExportFormat = Literal["merged", "adapter", "directions"]
# Most prompt tokens in one forward pass: more would not stay in a CPU's caches between two operations (measured,
# docs/lab-notes/decoding.md).
READ_TOKENS = {"cpu": 2048}
# A worker's trials of a batch, which share its forwards, where nothing else is asked for.
TRIALS_PER_WORKER = 4
# A model of at least this many bytes is large: memory beside it on a CPU is limited.
LARGE_BYTES = 10**9
FORMATS: tuple[ExportFormat, ...] = ("merged", "adapter", "directions")


# Names of files in an export: none leads out of it.
_PART = r"[^/\\\x00-\x1f.][^/\\\x00-\x1f]*"
_FILE = rf"^{_PART}(/{_PART})*$"


class Plan(Record):
    """A sampled batch of trials to evaluate together.

    Attributes:
        together: Trials that share a forward; None: all.
        whole: Score full-length responses without shortcuts, as for finalists.
        rivals: Unanswered prompts and KL divergence of the trials on the front, as far as the sampler knew them, if
            its trials race.
    """

    first: int
    parameters: list[dict[str, Any]]
    rows: int
    together: int | None = None
    whole: bool = False
    rivals: tuple[tuple[int, float], ...] = Field((), exclude_if=lambda rivals: not rivals)


class Trial(Record):
    """A finished trial of the study."""

    number: int = Field(ge=0)
    params: dict[str, Any]
    values: TrialScores


class Figures(Record):
    """Metrics of a base or edited model on one split.

    Attributes:
        degenerate: Bad prompts with a broken response: empty, repetitive, in another script, or incoherent.
        unanswered: Refused bad prompts and those with a broken response; None if not counted.
        kl: KL divergence from the base model in nats, mean over good prompts and the first positions of its responses;
            None for the base model.
        kl_spread: How it varies over the prompts; None for the base model.
        kl_more: The KL divergence at another number of positions; None for the base model.
        outcomes: Responses by outcome: to all bad prompts, to their groups, then the same of good ones and of harmless
            ones with alarming words. Empty in figures of former versions.
        thinking: Responses with thinking on; None if not measured, or the chat template knows none.
    """

    bad_prompts: int
    refusals: int
    good_prompts: int
    false_refusals: int
    degenerate: int = 0
    false_degenerate: int = 0
    unanswered: int | None = None
    kl: float | None = None
    kl_interval: tuple[float, float] | None = None
    kl_tokens: int = 1
    kl_spread: KLSpread | None = Field(None, exclude_if=lambda spread: spread is None)
    kl_more: KLFigures | None = Field(None, exclude_if=lambda figures: figures is None)
    outcomes: tuple[Outcomes, ...] = Field((), exclude_if=lambda outcomes: not outcomes)
    thinking: Thinking | None = Field(None, exclude_if=lambda thinking: thinking is None)

    @property
    def failed(self) -> int:
        """Bad prompts without a usable response; the refused ones where broken ones were not counted."""
        return self.refusals if self.unanswered is None else self.unanswered

    def outcomes_of_all(self, prompts: ScoredPrompts) -> Outcomes | None:
        """Return the outcomes of all prompts of a kind; None if they were not counted."""
        return next((one for one in self.outcomes if one.prompts == prompts and one.column is None), None)


class KeptAnswer(Record):
    """A prompt, a model's response, and whether it was a refusal."""

    prompt: str
    answer: str
    refused: bool


class KeptAnswers(Record):
    """answers/NAME.json: a selection of a model's responses to the good and bad report prompts."""

    version: Literal[1] = 1
    good: tuple[KeptAnswer, ...]
    bad: tuple[KeptAnswer, ...]


class DetectorCounts(Record):
    """A detector's counts over one model's responses to good or bad report prompts."""

    detector: str = Field(pattern=r"^[\w.-]+$")
    model: Literal["base", "edited"]
    prompts: Literal["bad", "good"]
    answers: int
    refused: int
    broken: int


class Agreement(Record):
    """Agreement of two detectors on which responses are refused or broken.

    Attributes:
        both: Responses flagged by both.
        kappa: Cohen's kappa; None if chance agreement is 1.
    """

    model: Literal["base", "edited"]
    first: str = Field(pattern=r"^[\w.-]+$")
    second: str = Field(pattern=r"^[\w.-]+$")
    both: int
    only_first: int
    only_second: int
    neither: int
    kappa: float | None

    @property
    def is_informative(self) -> bool:
        """Whether both detectors flag some responses and spare others; else kappa is 0 or undefined by construction."""
        first, second = self.both + self.only_first, self.both + self.only_second
        responses = first + self.only_second + self.neither
        return 0 < first < responses and 0 < second < responses


class DetectorReport(Record):
    """figures/NAME-detectors.json: detector results for an export and the base model.

    `agreement` is pairwise and by model; `failed` gives each failed detector's reason.
    """

    version: Literal[1] = 1
    counts: list[DetectorCounts]
    agreement: list[Agreement]
    failed: dict[str, str]


class LayerGeometry(Record):
    """Geometry of one layer's residuals (`job.numerics.geometry.Geometry`), with sample points in its plane."""

    good_norm: float | None
    bad_norm: float | None
    difference_norm: float | None
    cosine_means: float | None
    cosine_good: float | None
    cosine_bad: float | None
    cosine_previous: float | None
    silhouette: float | None
    variance_share: float | None
    good_points: list[list[float]]
    bad_points: list[list[float]]


class GeometryRecord(Record):
    """geometry.json: the geometry of all layers, and the cache key of its directions."""

    version: Literal[1] = 1
    key: str
    layers: list[LayerGeometry]


class JobRecord(Record):
    """job.json: what was asked for and what was resolved from it.

    Attributes:
        version: Version of this format.
        job_id: Hash of the identity.
        identity: What the user asked for, as far as it decides the result.
        settings: All settings as of the latest start.
        startup_trials: Trials at the start of the search without the sampler, fixed at the first start; None until the
            search begins if no number of trials was asked for.
        started: Date of the first start, on which all prompts are written; None in jobs of former versions until they
            are gone on with.
        model_commit: The commit that a model on the Hub is used at.
        planned_rows: Rows of a forward by preflight's plan of the memory.
        planned_weights: Bytes of weights on each device by that plan.
        planned_dtype: The type to load the model in by that plan; None: that of its files.
        model_public: The model is on the Hub for everybody to see, so that it may be named.
        resolution: Set when the model has been loaded for the first time.
        versions: Versions of this package and of the libraries that decide results, at the first start.
        reproduces: The reproduction, kept in reproduces.json, that this job makes again; None if it makes none.
        searches: The search is made again too, not only its chosen edit.
        redacted: Settings that held a secret, which stands in no file: those of `settings` are not whole.
    """

    version: Literal[1] = 1
    job_id: str
    identity: dict[str, Any]
    settings: dict[str, Any]
    startup_trials: int | None
    started: str | None = Field(None, pattern=DATE)
    model_commit: str | None = None
    model_public: bool = False
    planned_rows: int | None = None
    planned_weights: dict[str, int] | None = None
    planned_dtype: str | None = None
    resolution: Resolution | None = None
    versions: dict[str, str]
    reproduces: str | None = None
    searches: bool = True
    redacted: tuple[str, ...] = ()

    @property
    def prompt_date(self) -> str | None:
        """The date used in all prompts of the job."""
        return (self.resolution.date if self.resolution else None) or self.started

    @property
    def counts_evasions(self) -> bool:
        """Whether the search's refusals include evasive responses."""
        return self.resolution is not None and bool(self.resolution.evasions)

    @property
    def trials_per_batch(self) -> int:
        """Trials that are planned and evaluated together; jobs of former versions always asked for a number."""
        resolved = self.resolution.batch if self.resolution else None
        return int(resolved or self.identity["trials_per_batch"])

    @property
    def batches_ahead(self) -> int:
        """Batches that are planned before the results of the preceding one are known."""
        resolved = self.resolution.ahead if self.resolution else None
        return int(self.identity["search"].get("ahead", 0) if resolved is None else resolved)

    def masked(self, plain: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON values without secrets, and the names of settings that held one."""
        found = super().masked(plain)
        settings = found["settings"]
        left = {name for name in self.redacted if MASK in str(settings.get(name))}
        masked = {name for name, value in plain["settings"].items() if settings.get(name) != value}
        return {**found, "redacted": sorted(left | masked)}


class State(Record):
    """state.json: a job's state at its latest start.

    Attributes:
        state: Outcome of the latest start; running also after a crash, if no process holds the job.
        trials: Requested trials; reached if finished.
        max_hours: Limit on hours that ended the search, or None.
        max_cost: Limit on dollars that ended the search, or None.
    """

    state: Literal["running", "preempted", "finished", "failed"]
    reason: str | None = None
    phase: str | None = None
    trials: int
    chosen: int | None = Field(None, ge=0)
    max_hours: float | None = None
    max_cost: float | None = None


class Upload(Record):
    """State of one delivery; uploads.json is a list of them.

    `manifest` is the SHA-256 of the export's manifest, which identifies the delivery.
    """

    target: str
    export: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    state: Literal["done", "failed"]
    error: str | None = None
    manifest: str | None = None


class Manifest(Record):
    """manifest.json of an export: SHA-256 and size of every other file."""

    VERBATIM = frozenset({"files"})
    version: Literal[1] = 1
    files: dict[Annotated[str, Field(pattern=_FILE)], ManifestEntry]


class ManifestEntry(Record):
    """One file of an export."""

    sha256: str
    size: int
