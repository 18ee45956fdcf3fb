"""Tables of reports as rows of cells, the head first."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from job.records import FORCED_TOKENS, DetectorCounts, DetectorReport, GeometryRecord, Trial
from job.report.run_view import RunView
from job.text.behaviour import BehaviourWords
from job.text.intervals import count_with_interval

FINALISTS = (
    "Finalists in the search, and on prompts held out for the choice, which neither directions nor search use; "
    "KL in nats"
)
AGREED = "How far they agree on which responses are none (Cohen's kappa)"


def counted(words: BehaviourWords) -> str:
    """Return the caption of the detectors' counts."""
    what = f"{words.shown[:1].upper()}{words.shown[1:]} or broken"
    of = "of responses to the report's prompts with the behaviour and without it"
    return f"{what}, by each detector, {of}, with 95 % Wilson intervals"


def finalists(view: RunView) -> list[tuple[str, ...]]:
    """Return the finalists' figures in the search and on the prompts held out for the choice; only the head of none."""
    forced = f"KL over the first {FORCED_TOKENS} positions of the base model's responses"
    shown = view.words.shown
    rows: list[tuple[str, ...]] = [
        ("trial", f"search: {shown}", "broken", "KL", f"held out: {shown}", "broken", "KL", forced),
    ]
    for trial in view.front:
        figures, values = view.choice_figures(trial), trial.values
        if figures is not None:
            chosen = " (chosen)" if trial == view.chosen else ""
            search = (f"{values.refusals}/{figures.searched}", str(values.broken), f"{values.kl:.4g}")
            again = (f"{figures.refusals}/{figures.bad_prompts}", str(figures.broken), f"{figures.kl:.4g}")
            rows.append((f"{trial.number}{chosen}", *search, *again, f"{figures.forced_kl:.4g}"))
    return rows


def other_names(trials: Sequence[Trial]) -> tuple[str, ...]:
    """Return the names of the trials' objectives beyond refusals and KL."""
    return tuple(dict.fromkeys(name for trial in trials for name in trial.values.others))


def other_figures(trial: Trial) -> tuple[str, ...]:
    """Return a trial's figures in these objectives, e.g. "3/40"."""
    return tuple(map(str, trial.values.others.values()))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line per row, with all columns but the last padded to one width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    return [" ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]


def folded(line: str, width: int) -> list[str]:
    """Return a line as lines of at most `width` columns, continued with more indentation."""
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.wrap(line, max(width, 20), subsequent_indent=indent, break_on_hyphens=False) or [line]


def detector_counts(found: DetectorReport, words: BehaviourWords) -> list[tuple[str, ...]]:
    """Return each detector's counts for both models."""
    counts = {(one.detector, one.prompts, one.model): _detected(one, words) for one in found.counts}
    rows: list[tuple[str, ...]] = [("detector", "prompts", "base model", "edited model")]
    for detector, prompts in dict.fromkeys((one.detector, one.prompts) for one in found.counts):
        both = counts[detector, prompts, "base"], counts[detector, prompts, "edited"]
        rows.append((detector, "with" if prompts == "bad" else "without", *both))
    return rows


def detector_agreement(found: DetectorReport) -> list[tuple[str | int, ...]]:
    """Return the pairwise agreement of detectors, if both found some responses and spared others.

    Cohen's kappa of others is 0 or undefined by construction.
    """
    rows: list[tuple[str | int, ...]] = [
        ("detectors", "model", "both", "only first", "only second", "neither", "kappa"),
    ]
    for one in found.agreement:
        if not one.is_informative:
            continue
        pair, kappa = f"{one.first}, {one.second}", "–" if one.kappa is None else f"{one.kappa:.2f}"
        rows.append((pair, one.model, one.both, one.only_first, one.only_second, one.neither, kappa))
    return rows


def failed_detectors(found: DetectorReport) -> list[str]:
    """Return a line for every failed detector."""
    return [f"{name} could not be used: {reason}" for name, reason in found.failed.items()]


def layer_geometry(record: GeometryRecord, fields: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Return fields of a geometry, by column title, for each layer."""
    rows = [("layer", *fields)]
    for index, layer in enumerate(record.layers):
        values = (getattr(layer, name) for name in fields.values())
        rows.append((str(index), *("–" if value is None else f"{value:.3g}" for value in values)))
    return rows


def layer_strengths(strengths: Mapping[str, Sequence[float]]) -> list[tuple[str, ...]]:
    """Return an edit's strengths by component for each layer."""
    layers = enumerate(zip(*strengths.values(), strict=True))
    return [("layer", *strengths), *((str(index), *(f"{one:.3f}" for one in layer)) for index, layer in layers)]


def _detected(counts: DetectorCounts, words: BehaviourWords) -> str:
    found = counts.refused + counts.broken
    kinds = [f"{n} {name}" for n, name in ((counts.refused, words.shown), (counts.broken, "broken")) if n]
    told = f", {' and '.join(kinds)}" if kinds else ""
    return f"{count_with_interval(found, counts.answers)}{told}"
