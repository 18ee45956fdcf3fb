"""Values that pass between stages and are written to disk: frozen, versioned, free of torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from job.records.base import Record
from job.records.edits import COMPONENTS, Component, EditParameters, KernelParameters, LearnedDirections
from job.records.resolution import DATE, Resolution
from job.text.redaction import MASK

# From modules beside this one; what is defined here is public as well.
__all__ = [
    "COMPONENTS",
    "DATE",
    "Component",
    "EditParameters",
    "KernelParameters",
    "LearnedDirections",
    "Record",
    "Resolution",
]

ExportFormat = Literal["merged", "adapter", "directions"]
# Tokens of prompts in one forward at most, where that is faster than as many as there is room for: more do not stay
# in a CPU's caches between one operation and the next (measured, docs/lab-notes/decoding.md).
READ_TOKENS = {"cpu": 2048}
# A model of so many bytes is large: what is held beside it on a CPU has its bounds.
LARGE_BYTES = 10**9
FORMATS: tuple[ExportFormat, ...] = ("merged", "adapter", "directions")


# Names of files in an export: none leads out of it.
_PART = r"[^/\\\x00-\x1f.][^/\\\x00-\x1f]*"
_FILE = rf"^{_PART}(/{_PART})*$"


class Plan(Record):
    """A batch of trials that have been asked and are to be evaluated together.

    Attributes:
        first: Number of the first trial.
        parameters: Optuna parameters of each trial, in number order.
        rows: Rows of a forward in which they are evaluated.
        together: How many of them share their forwards; None: all.
        whole: On answers of full length, none left out, as trials are counted again; else as the search does.
    """

    first: int
    parameters: list[dict[str, Any]]
    rows: int
    together: int | None = None
    whole: bool = False


class TrialScores(Record):
    """What a trial was measured to do.

    Attributes:
        refusals: Refused bad prompts of the search split.
        kl: KL divergence from the base model, mean over the first `kl_tokens` positions of its answers to the good
            prompts, nats.
        opening: Mean log-odds with which the model opens its answers as the base model opened its
            refusals: it tells edits apart that leave the count of refusals where it is.
        broken: Bad prompts that got a broken answer, which is no refusal either.
        reason: Why the trial failed and its values are defined ones, not measured; None if it did not.
        skipped: It failed by its KL divergence, which was measured, and was not made to answer.
    """

    refusals: int
    kl: float
    opening: float = 0.0
    broken: int = 0
    reason: str | None = None
    skipped: bool = False

    @property
    def unanswered(self) -> int:
        """Bad prompts without a whole answer: what the search keeps low."""
        return self.refusals + self.broken


class Trial(Record):
    """A finished trial as it stands in the study."""

    number: int = Field(ge=0)
    params: dict[str, Any]
    values: TrialScores


class Figures(Record):
    """A model measured on one split, the base model and the edited one alike.

    Attributes:
        bad_prompts: Number of bad prompts.
        refusals: Refused ones among them.
        good_prompts: Number of good prompts.
        false_refusals: Refused ones among them.
        degenerate: Answers to bad prompts that are broken: empty, going round in circles, in another script than their
            prompt, or gibberish to the base model.
        false_degenerate: Likewise of good prompts.
        unanswered: Bad prompts that are refused or have a broken answer; None where it was not counted.
        kl: KL divergence from the base model, mean over the first positions of its answers to the good prompts,
            nats; None for the base model itself.
        kl_interval: Its 95 % interval.
        kl_tokens: Number of those positions.
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


class KeptAnswer(Record):
    """A prompt, what a model answered, and whether that counted as a refusal."""

    prompt: str
    answer: str
    refused: bool


class KeptAnswers(Record):
    """answers/NAME.json: what one model answered to some prompts of the report split.

    Attributes:
        good: Prompts without the behaviour.
        bad: Prompts with it.
    """

    version: Literal[1] = 1
    good: tuple[KeptAnswer, ...]
    bad: tuple[KeptAnswer, ...]


class DetectorCounts(Record):
    """What one detector says of a model's answers to the prompts of one kind.

    Attributes:
        detector: Its name.
        model: Whose answers.
        prompts: To which prompts of the report split.
        answers: Number of them.
        refused: Those it takes for refusals.
        broken: Those it takes for broken.
    """

    detector: str = Field(pattern=r"^[\w.-]+$")
    model: Literal["base", "edited"]
    prompts: Literal["bad", "good"]
    answers: int
    refused: int
    broken: int


class Agreement(Record):
    """How far two detectors agree on which answers to all prompts are none, refused or broken.

    Attributes:
        model: Whose answers.
        first: Name of one detector.
        second: Name of the other.
        both: Answers that neither lets pass.
        only_first: Those that the first alone does not.
        only_second: Those that the second alone does not.
        neither: Those that both let pass.
        kappa: Cohen's kappa; None where both say the same of every answer, so that there is no chance to agree by.
    """

    model: Literal["base", "edited"]
    first: str = Field(pattern=r"^[\w.-]+$")
    second: str = Field(pattern=r"^[\w.-]+$")
    both: int
    only_first: int
    only_second: int
    neither: int
    kappa: float | None


class DetectorReport(Record):
    """figures/NAME-detectors.json: what detectors say of an export's answers and of the base model's.

    Attributes:
        counts: By detector, model and prompts.
        agreement: Of every two detectors, by model.
        failed: Detectors that could not be used, with the reason.
    """

    version: Literal[1] = 1
    counts: list[DetectorCounts]
    agreement: list[Agreement]
    failed: dict[str, str]


class LayerGeometry(Record):
    """How good and bad residuals lie in one layer; see `job.numerics.geometry.Geometry` for the figures.

    Attributes:
        good_points: Some good residuals along the direction and across it.
        bad_points: Some bad ones.
    """

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
    """geometry.json: the geometry of all layers, under the key of the directions that it belongs to."""

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
        startup_trials: Trials at the start of the search without the sampler, fixed at the first start.
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
    startup_trials: int
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
        """The date on which all prompts of the job are written."""
        return (self.resolution.date if self.resolution else None) or self.started

    def masked(self, plain: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON values without secrets, and with the names of the settings that held one."""
        found = super().masked(plain)
        settings = found["settings"]
        left = {name for name in self.redacted if MASK in str(settings.get(name))}
        masked = {name for name, value in plain["settings"].items() if settings.get(name) != value}
        return {**found, "redacted": sorted(left | masked)}


class State(Record):
    """state.json: where a job stands, as of its latest start.

    Attributes:
        state: What the latest start came to; running also after a crash, when nobody holds the job.
        reason: Why it stopped or failed.
        phase: What it was doing.
        trials: Trials the search was to have; met where finished.
        chosen: The trial that was chosen.
        max_hours: Limit on the job's hours, where it has ended the search.
        max_cost: Limit on its dollars, likewise.
    """

    state: Literal["running", "preempted", "finished", "failed"]
    reason: str | None = None
    phase: str | None = None
    trials: int
    chosen: int | None = Field(None, ge=0)
    max_hours: float | None = None
    max_cost: float | None = None


class Upload(Record):
    """The state of one delivery; uploads.json is a list of them.

    Attributes:
        target: The target's URI.
        export: Name of the export's folder.
        state: What came of it.
        error: Why it failed.
        manifest: sha256 of the export's manifest, by which the delivery is known there.
    """

    target: str
    export: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    state: Literal["done", "failed"]
    error: str | None = None
    manifest: str | None = None


class Manifest(Record):
    """manifest.json of an export: sha256 and size of every other file in it."""

    VERBATIM = frozenset({"files"})
    version: Literal[1] = 1
    files: dict[Annotated[str, Field(pattern=_FILE)], ManifestEntry]


class ManifestEntry(Record):
    """One file of an export."""

    sha256: str
    size: int
