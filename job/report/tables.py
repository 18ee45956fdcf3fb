"""Tables of detector results for reports."""

from __future__ import annotations

from job.records import DetectorCounts, DetectorReport
from job.text.intervals import count_with_interval

COUNTED = (
    "Refused or broken, by each detector, of answers to the report's prompts with the behaviour and without it, "
    "with 95 % Wilson intervals"
)
AGREED = "How far they agree on which answers are none (Cohen's kappa)"


def detector_counts(found: DetectorReport) -> str:
    """Format each detector's counts for both models as a Markdown table."""
    counts = {(one.detector, one.prompts, one.model): one for one in found.counts}
    rows = []
    for detector, prompts in dict.fromkeys((one.detector, one.prompts) for one in found.counts):
        cells = [_detected(counts[detector, prompts, model]) for model in ("base", "edited")]
        rows.append(f"| {detector} | {'with' if prompts == 'bad' else 'without'} | {' | '.join(cells)} |")
    return "\n".join(["| detector | prompts | base model | edited model |", "|---|---|---|---|", *rows])


def detector_agreement(found: DetectorReport) -> str:
    """Format pairwise agreement of detectors as a Markdown table."""
    rows = [
        f"| {one.first}, {one.second} | {one.model} | {one.both} | {one.only_first} | {one.only_second} "
        f"| {one.neither} | {'–' if one.kappa is None else f'{one.kappa:.2f}'} |"
        for one in found.agreement
    ]
    head = ["| detectors | model | both | only first | only second | neither | kappa |", "|---" * 7 + "|"]
    return "\n".join([*head, *rows])


def failed_detectors(found: DetectorReport) -> list[str]:
    """Return a line for every failed detector."""
    return [f"{name} could not be used: {reason}" for name, reason in found.failed.items()]


def _detected(counts: DetectorCounts) -> str:
    found = counts.refused + counts.broken
    kinds = [f"{n} {name}" for n, name in ((counts.refused, "refused"), (counts.broken, "broken")) if n]
    told = f", {' and '.join(kinds)}" if kinds else ""
    return f"{count_with_interval(found, counts.answers)}{told}"
