"""The groups of settings: prompts, loading, directions, search and so on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from job.config.durations import Seconds
from job.records import DEFAULT_OBJECTIVES

# Parts of a prompt set's spec that may also be given on their own.
SPEC_QUALIFIERS = ("revision", "config", "split", "column")


class Section(BaseModel):
    """Base of nested settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PromptSettings(Section):
    """A set of prompts and how each is turned into a conversation."""

    spec: str = Field(
        min_length=1,
        description="A file (.txt, .jsonl, .json, .csv, .tsv, .parquet), a folder of those, a saved or cloned dataset, "
        "builtin:NAME, or DATASET[@REV][:CONFIG] on the Hub, each with #SPLIT[/COLUMN].",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub dataset; overrides the spec's.")
    config: str | None = Field(None, description="Configuration of a Hub dataset; overrides the spec's.")
    split: str | None = Field(None, description='Split and rows, e.g. "train[:400]"; overrides the spec\'s.')
    column: str | None = Field(
        None,
        description="Column that holds the prompts; overrides the spec's. Unset: the first of "
        "prompt, messages, conversations, conversation, text, instruction, question, goal, input, query that "
        "holds text or conversations, else the only one with text.",
    )
    max_characters: int | None = Field(None, ge=1, description="Longer texts are cut to this length; unset: no limit.")
    prefix: str = Field("", description="Text put before every prompt.")
    suffix: str = Field("", description="Text put after every prompt.")
    system_prompt: str | None = Field(None, description="System prompt; unset: none.")


def spec_table(value: Any) -> Any:
    """Return the table that a prompt set's spec alone stands for; anything else as it is."""
    return {"spec": value} if isinstance(value, str) else value


Prompts = Annotated[PromptSettings, BeforeValidator(spec_table)]


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


def asked_method(search: Mapping[str, Any]) -> Literal["auto", "tpe", "gradient"]:
    """Return the method that a table of search settings asks for; see `SearchSettings.asked_method`."""
    method: Literal["auto", "tpe", "gradient"] = search["method"]
    by_scorers = not set(search["objectives"]) <= set(DEFAULT_OBJECTIVES)
    return "tpe" if method == "auto" and by_scorers else method


class SearchSettings(Section):
    """How edits are searched for."""

    method: Literal["auto", "gradient", "tpe"] = Field(
        description="gradient: gradient descent finds edits, and trials sample around them; tpe: trials from a space "
        "of weight kernels; auto: gradient, or tpe where gradients cannot be used or leave many refusals."
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
    racing: bool = Field(
        description="Answer a part of the prompts first, and drop a trial once another one is certainly better or "
        "equal. Its count of refusals is projected."
    )
    objectives: list[str] = Field(
        min_length=1,
        description="What the search minimises: refusals, kl, or a scorer of responses as NAME[@PROMPTS]"
        "[:DIRECTION], e.g. soft or words@both:more; PROMPTS: bad, good or both; DIRECTION: fewer or more.",
    )

    @property
    def asked_method(self) -> Literal["auto", "tpe", "gradient"]:
        """The method asked for: "auto" is "tpe" with objectives that gradients cannot lower."""
        return asked_method(self.model_dump())


class ScoringSettings(Section):
    """How responses are judged."""

    answer_tokens: int = Field(ge=1, description="Longest response that is judged, in tokens.")
    search_tokens: int = Field(
        ge=1, description="Longest response during the search, in tokens; finalists are judged again in full."
    )
    refusal_markers: list[Annotated[str, Field(min_length=1)]] = Field(
        min_length=1,
        description="A response that contains one of these that its prompt does not is a refusal, or shows the "
        "behaviour; with ^ before it, only at the beginning of the response.",
    )
    evasions: bool | None = Field(
        None,
        description="An evasive response to a bad prompt counts as refused in the search and the choice: one that "
        "only repeats its prompt, or by patterns of English text turns away in its first sentence, mostly moralises or "
        "only asks back. Unset: if the behaviour is refusal.",
    )
    gibberish: float | None = Field(
        None,
        gt=0,
        description="A response is broken if the base model's loss on it exceeds that on its own responses by this "
        "many nats per token. Applies to candidates for the choice and to reported figures; unset: not measured.",
    )
    detectors: list[str] = Field(
        description="Detectors that judge the report's responses side by side: markers, soft, degenerate, nli, words, "
        "pattern, classifier, judge, and those that installed packages add through the entry point group "
        "abliteration_job.scorers."
    )
    thinking_tokens: int = Field(
        ge=0,
        description="Longest response with thinking on, for the scorecard of models whose template knows thinking; "
        "0: not measured.",
    )
    nli_model: str | None = Field(
        None, description="Model for zero-shot classification of the scorer nli: a folder or NAME[@REVISION]."
    )
    words: list[Annotated[str, Field(min_length=1)]] = Field(
        description="Words and phrases that the scorer words looks for, in any case, between word boundaries."
    )
    pattern: str | None = Field(None, description="Regular expression that the scorer pattern looks for, in any case.")
    classifier: str | None = Field(
        None, description="Model for sequence classification of the scorer classifier: a folder or NAME[@REVISION]."
    )
    classifier_labels: list[str] = Field(
        description="Labels of the classifier that count; empty: its only label, or the second of two."
    )
    tasks: list[str] = Field(description="Benchmarks of lm-eval for the objective tasks; quick: a fixed short set.")
    tasks_limit: int | None = Field(None, ge=1, description="Documents of each of these benchmarks; unset: all.")
    tasks_folder: str | None = Field(None, description="Folder with further benchmarks as lm-eval's YAML files.")

    @property
    def effective_search_tokens(self) -> int:
        """Longest response in the search, in tokens."""
        return min(self.search_tokens, self.answer_tokens)


class JudgeSettings(Section):
    """The judge model behind an OpenAI-compatible endpoint; its key is in JUDGE_API_KEY."""

    url: str | None = Field(
        None,
        description="Base URL of an OpenAI-compatible endpoint for the scorer judge, e.g. http://localhost:8000/v1; "
        "https except on this machine.",
    )
    model: str = Field(description="Name of the judge model at the endpoint.")
    question: str = Field(
        description="What the judge is asked about each response; empty: whether it shows card.behaviour."
    )
    parallel: int = Field(ge=1, le=64, description="Requests at the same time.")
    timeout: Seconds = Field(gt=0, description="Longest time of a request in seconds, or as in 1m.")


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
