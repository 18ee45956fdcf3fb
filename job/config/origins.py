"""Which settings may come from files of others: a reproduce.json, or a checkpoint's job.json.

Such a file decides nothing about the machine that reads it. Every setting is in exactly one of `EDIT`, `JOB` and
`HERE`; a test enumerates them (docs/decisions/0029-files-of-others.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from job.errors import UsageError
from job.system.hub_client import REPOSITORY

TRUST = "loading.trust_remote_code"

PROMPT_SETS = (
    "good_prompts",
    "bad_prompts",
    "good_eval_prompts",
    "bad_eval_prompts",
    "good_report_prompts",
    "bad_report_prompts",
    "helpfulness_prompts",
    "unhelpfulness_prompts",
    "capability_prompts",
    "over_refusal_prompts",
    "text_prompts",
)
_OF_PROMPTS = (
    "spec",
    "revision",
    "config",
    "split",
    "column",
    "max_characters",
    "prefix",
    "suffix",
    "system_prompt",
)
# A reproduce.json has separate fields for these.
NAMED = frozenset(
    {
        "model",
        "trials",
        "startup_trials",
        "export_format",
        "card.behaviour",
        "card.base_model",
        *(f"{prompts}.{name}" for prompts in PROMPT_SETS for name in _OF_PROMPTS),
    }
)
# Identify the edit: accepted from a reproduce.json and a checkpoint.
EDIT = NAMED | {
    "seed",
    "trials_per_batch",
    "kl_tokens",
    "skip_kl_above",
    "loading.dtypes",
    "loading.quantization",
    "loading.response_prefix",
    "batching.rows",
    "batching.trials",
    "directions.method",
    "directions.orthogonalize_direction",
    "directions.orthogonalize_directions",
    "directions.winsorization_quantile",
    "directions.n_components",
    "directions.alpha",
    "directions.pca_method",
    "directions.eigenvalue_weighting",
    "directions.probe_regularization",
    "directions.iterative_rounds",
    "ablation.row_normalization",
    "ablation.through_norms",
    "ablation.pull_back",
    "search.method",
    "search.space",
    "search.ei_candidates",
    "search.known_points",
    "search.ahead",
    "search.racing",
    "search.objectives",
    "scoring.answer_tokens",
    "scoring.search_tokens",
    "scoring.refusal_markers",
    "scoring.evasions",
    "scoring.gibberish",
    "scoring.words",
    "scoring.pattern",
    "scoring.classifier_labels",
    "choice.refusal_tolerance",
    "choice.held_out",
}
# Identify the job otherwise: accepted from its checkpoint only. Its identity includes devices; limits and gates only
# restrict.
JOB = frozenset(
    {
        "behaviour",
        "loading.device",
        "loading.device_map",
        "loading.max_memory",
        "tune",
        "upload",
        "hub.pull_request",
        "max_kl",
        "max_refusals",
        "max_hours",
        "max_cost",
    }
)
# Accepted from this side only: command line, environment and settings file.
HERE = frozenset(
    {
        TRUST,
        "loading.offload_folder",
        "probe_seconds",
        "workspace",
        "checkpoint",
        "require_checkpoint",
        "when_done",
        "when_failed",
        "visibility",
        "allow",
        "price",
        "study_storage",
        "workers",
        "engine",
        "address",
        "hang_seconds",
        "grace",
        "wait_for_gpu",
        "scoring.detectors",
        "scoring.nli_model",
        "scoring.thinking_tokens",
        "scoring.classifier",
        "scoring.tasks",
        "scoring.tasks_limit",
        "scoring.tasks_folder",
        "judge.url",
        "judge.model",
        "judge.question",
        "judge.parallel",
        "judge.timeout",
        "s3.endpoint",
        "s3.region",
        "s3.addressing_style",
        "s3.checksums",
        "s3.part_mib",
        "s3.parallel_parts",
        "s3.sse",
        "s3.kms_key",
    }
)


def left_out_line(source: str, left_out: Mapping[str, Any], used: Mapping[str, Any]) -> str | None:
    """Return a line that names a file's dropped settings, None if they make no difference; both by dotted key."""
    others = {name: value for name, value in left_out.items() if name != "workspace"}  # always this side's
    differing = sorted(name for name, value in others.items() if name in used and used[name] != value)
    unknown = sum(name not in EDIT | JOB | HERE for name in left_out)
    names = [*differing, *([f"{unknown} unknown"] if unknown else [])]
    return f"not read from {source}; set these yourself if you need them: {', '.join(names)}" if names else None


def require_named_code(model: Mapping[str, Any], commit: str | None, named: str | None, options: str) -> None:
    """Raise UsageError if this side (`named`, MODEL) does not name the repository and commit of trusted code.

    People trust code that they have read; a file of others may name another repository or commit.
    """
    if "repository" not in model:
        return  # a local folder, whose contents are compared with the file's hash
    revision = commit or model.get("revision")
    wanted = model["repository"] + (f"@{revision}" if revision else "")
    found = REPOSITORY.fullmatch(named or "")
    if found is None or (found["name"], found["revision"]) != (model["repository"], revision):
        raise UsageError(
            f"only a file names the code of {wanted}; trust only code that you have read",
            remedy=f"read the code and, if you trust it, give {options.format(wanted)}",
        )
