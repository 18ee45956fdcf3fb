"""What was done and measured, in words: the model card of an export and the report of a run.

The card holds nothing that differs between two hosts that did the same job: no time, path or name of a
machine. The report may.
"""

from __future__ import annotations

from collections.abc import Sequence

from job.numerics.intervals import wilson_interval
from job.records import EditParameters, Figures, JobRecord, Trial
from job.search import pareto_front

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

- base model: a checkpoint with sha256 {record.identity["model"]["sha256"]} over its files
- direction: {record.identity["directions"]["method"]}, {_direction(edit)}
- norms preserved: {record.identity["ablation"]["row_normalization"]}
- trial {trial.number} of the search with seed {record.identity["seed"]}

{kernel_table(edit)}

Made with abliteration-job {record.versions["abliteration-job"]}.
"""


def _direction(edit: EditParameters) -> str:
    if edit.direction_index is None:
        return "each layer's own"
    return f"that of layer {edit.direction_index:.4g} in all layers"


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


def run_report(
    record: JobRecord,
    trials: Sequence[Trial],
    prompts: int,
    chosen: Trial,
    edit: EditParameters,
    base: Figures,
    edited: Figures,
) -> str:
    """Return the report.md of a run."""
    failed = sum(trial.values.reason is not None for trial in trials)
    front = "\n".join(
        f"| {trial.number}{' (chosen)' if trial.number == chosen.number else ''} "
        f"| {trial.values.refusals} | {trial.values.kl:.4g} |"
        for trial in pareto_front(trials)
    )
    dtype = record.resolution.dtype if record.resolution else "unknown"
    packages = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return f"""\
# Report of job {record.job_id}

Model: {record.settings["model"]}, loaded in {dtype}

## Result

Trial {chosen.number} of {len(trials)} was chosen: `exports/trial-{chosen.number:04d}`, to which `export` links.
Its figures on prompts that the search has not seen:

{figures_table(base, edited)}

It ablates {_direction(edit)} with these strengths:

{kernel_table(edit)}

## Pareto front

Measured on the search split ({prompts} prompts with the behaviour); {failed} of {len(trials)} trials failed.

| trial | refusals | KL (nats) |
|---|---|---|
{front}

## Provenance

{packages}; seed {record.identity["seed"]}; {record.startup_trials} start-up trials.
"""
