"""What was done and measured, in words: the model card of an export and the report of a run.

The card holds nothing that differs between two hosts that did the same job: no time, path or name of a
machine. The report may.
"""

from __future__ import annotations

from job.numerics.intervals import wilson_interval
from job.records import EditParameters, Figures, GeometryRecord, JobRecord, Trial
from job.result import RunResult
from job.search import pareto_front
from job.workspace import RunFolder, write_atomically

_WARNING = """\
> [!WARNING]
> A behaviour was deliberately removed from this model. Where that behaviour is the refusal of unsafe
> requests, the model may comply with harmful requests, and whoever deploys it needs safeguards of their own.
"""


def model_card(record: JobRecord, trial: Trial, edit: EditParameters, base: Figures, edited: Figures) -> str:
    """Return the README.md of an export."""
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- abliterated
- not-for-all-audiences
---

# Model with a behaviour removed by directional ablation

{_WARNING}
The direction that mediates the behaviour in the residual stream was found from two sets of prompts and
projected out of the weights that write into the stream (Arditi et al. 2024, arXiv:2406.11717).

## Figures

Measured on the exported weights, on prompts that neither the direction nor the search has seen.

{figures_table(base, edited)}

## What was done

- base model: {_base_model(record)}
- direction: {record.identity["directions"]["method"]}, {direction_text(edit)}
- norms preserved: {record.identity["ablation"]["row_normalization"]}
- trial {trial.number} of the search with seed {record.identity["seed"]}

{kernel_table(edit)}

Made with abliteration-job {record.versions["abliteration-job"]}.
"""


def _base_model(record: JobRecord) -> str:
    model = record.identity["model"]
    if "repository" in model:
        return f"{model['repository']} at commit {record.model_commit}"
    return f"a checkpoint with sha256 {model['sha256']} over its files"


def direction_text(edit: EditParameters) -> str:
    """Return in words which directions an edit ablates, and how strongly relative to each other."""
    several = len(edit.strengths) > 1
    shares = f", by shares of {', '.join(f'{share:.3g}' for share in edit.strengths)}" if several else ""
    if edit.direction_index is None:
        return f"each layer's own direction{'s' if several else ''}{shares}"
    return f"the direction{'s' if several else ''} of layer {edit.direction_index:.4g} in all layers{shares}"


def figures_table(base: Figures, edited: Figures) -> str:
    """Return the figures of the base and the edited model side by side, with 95 % Wilson intervals."""
    rows = [
        (
            "refused, of prompts with the behaviour",
            _count(base.refusals, base.bad_prompts),
            _count(edited.refusals, edited.bad_prompts),
        ),
        (
            "refused, of prompts without it",
            _count(base.false_refusals, base.good_prompts),
            _count(edited.false_refusals, edited.good_prompts),
        ),
        (
            f"KL divergence from the base model, first answer token, {base.good_prompts} prompts without it",
            "0",
            f"{edited.kl or 0:.4g} nats",
        ),
    ]
    table = [("", "base model", "edited model"), ("---",) * 3, *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def _count(count: int, n: int) -> str:
    low, high = wilson_interval(count, n)
    return f"{count}/{n} ({100 * low:.1f}–{100 * high:.1f} %)"


def kernel_table(edit: EditParameters) -> str:
    """Return the weight kernels of an edit."""
    rows = "\n".join(
        f"| {component} | {kernel.max_weight:.4g} | {kernel.max_weight_position:.4g} "
        f"| {kernel.min_weight:.4g} | {kernel.min_weight_distance:.4g} |"
        for component, kernel in edit.kernels.items()
    )
    return f"""\
| component | max_weight | max_weight_position | min_weight | min_weight_distance |
|---|---|---|---|---|
{rows}"""


def write_reports(folder: RunFolder) -> str:
    """Write report.md and report.html of a run folder and return the former's text.

    Raises:
        UsageError: Nothing has been exported yet.
    """
    from job.page import report_page  # its charts take a second to load

    result = RunResult.read(folder)
    text = run_report(result)
    write_atomically(folder.report_file, text.encode())
    write_atomically(folder.page_file, report_page(result).encode())
    return text


def run_report(result: RunResult) -> str:
    """Return the report.md of a run."""
    record, chosen = result.record, result.chosen
    failed = sum(trial.values.reason is not None for trial in result.trials)
    front = "\n".join(
        f"| {trial.number}{' (chosen)' if trial.number == chosen.number else ''} "
        f"| {trial.values.refusals} | {trial.values.kl:.4g} |"
        for trial in pareto_front(result.trials)
    )
    prefix = record.resolution.response_prefix if record.resolution else ""
    sources = "\n".join(
        f"- {name}: {source}" + (f", commit {result.prompts.commits[name]}" if name in result.prompts.commits else "")
        for name, source in result.prompts.sources.items()
    )
    packages = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return f"""\
# Report of job {record.job_id}

Model: {record.settings["model"]}, loaded in {record.resolution.dtype if record.resolution else "unknown"}

## Result

Trial {chosen.number} of {len(result.trials)} was chosen: `exports/trial-{chosen.number:04d}`, to which `export` links.
Its figures on prompts that the search has not seen:

{figures_table(result.base, result.edited)}

It ablates {direction_text(result.edit)} with these strengths:

{kernel_table(result.edit)}

## Pareto front

Measured on the search split ({len(result.prompts.bad_search)} prompts with the behaviour, \
{len(result.prompts.good_search)} without); {failed} of {len(result.trials)} trials failed.

| trial | refusals | KL (nats) |
|---|---|---|
{front}

## Geometry

{geometry_table(result.geometry)}

μ are the means of the residuals of prompts without (good) and with (bad) the behaviour \
({len(result.prompts.good)} and {len(result.prompts.bad)} prompts), v is the layer's first direction; \
silhouette and share of variance say how well the two classes are apart.

## Preflight

{_preflight(result)}

## Provenance

{packages}; seed {record.identity["seed"]}; {record.startup_trials} start-up trials; \
directions by {record.identity["directions"]["method"]}; \
{"answers are made to begin with " + repr(prefix) if prefix else "no response prefix"}.

{sources}
"""


def _preflight(result: RunResult) -> str:
    if not result.preflight:
        return "All checks were in order."
    allowed = f" Allowed to fail: {', '.join(result.allowed)}." if result.allowed else ""
    rows = "\n".join(f"| {name} | {status} | {measured} |" for name, status, measured in result.preflight)
    return f"All other checks were in order.{allowed}\n\n| check | status | measured |\n|---|---|---|\n{rows}"


def geometry_table(record: GeometryRecord) -> str:
    """Return the geometry of all layers as a table."""
    columns = {
        "length of μ_good": "good_norm",
        "length of μ_bad": "bad_norm",
        "of μ_bad − μ_good": "difference_norm",
        "cos(μ_good, μ_bad)": "cosine_means",
        "cos(v, μ_good)": "cosine_good",
        "cos(v, μ_bad)": "cosine_bad",
        "cos(v, v of the layer before)": "cosine_previous",
        "silhouette": "silhouette",
        "share of variance along v": "variance_share",
    }
    lines = [f"| layer | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for index, layer in enumerate(record.layers):
        values = (getattr(layer, name) for name in columns.values())
        cells = ("–" if value is None else f"{value:.3g}" for value in values)
        lines.append(f"| {index} | {' | '.join(cells)} |")
    return "\n".join(lines)
