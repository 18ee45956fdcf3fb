"""The sections of report.html; a section without content is empty."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from job.export.model_card import direction_text, figures_table, kl_positions, strength_table
from job.numerics.statistics import wilson_interval
from job.records import KeptAnswer, Trial
from job.report.charts import (
    GEOMETRY,
    best_layer,
    front_chart,
    geometry_charts,
    points_chart,
    strength_chart,
    strengths,
    usable,
)
from job.report.run_view import RunView
from job.report.tables import AGREED, COUNTED, detector_agreement, detector_counts, failed_detectors
from job.report.timings import duration_text
from job.search.pareto import pareto_front
from job.text.markup import Cell, Markup, definitions, details, escaped, figure, paragraph, table, table_of


def sections(story: RunView, *, private: bool) -> list[tuple[str, str, str]]:
    """Return name, heading and HTML of each non-empty section; `private` includes responses to bad prompts."""
    makers: tuple[tuple[str, str, Callable[[RunView], str]], ...] = (
        ("figures", "Figures", _figures),
        ("detectors", "What detectors say", _detectors),
        ("front", "Pareto front", _front),
        ("path", "Path of the gradient", _path),
        ("edit", "The chosen edit", _edit),
        ("geometry", "Directions by layer", _geometry),
        ("answers", "Answers before and after", lambda story: _answers(story, private)),
        ("time", "Time and cost", _time),
        ("preflight", "Preflight", _preflight),
        ("provenance", "Provenance", _provenance),
    )
    made = ((name, title, make(story)) for name, title, make in makers)
    return [(name, title, content) for name, title, content in made if content]


def headline(story: RunView) -> str:
    """Return the result in a sentence."""
    base, edited, state = story.base, story.edited, story.state
    if base is None or edited is None:
        done = f"{len(story.trials)} of {story.record.settings['trials']} trials are done"
        if state is not None and state.state == "failed":
            return f"The job failed in the phase {state.phase or 'before the first'}: {state.reason}. {done}."
        return f"There is no result yet: {done}."
    return (
        f"On {_report_prompts(story)}, refusals {'fell' if edited.refusals < base.refusals else 'went'} from "
        f"{base.refusals} to {edited.refusals} of {edited.bad_prompts}; answers to ordinary prompts moved by a KL "
        f"divergence of {edited.kl or 0:.3g} nats."
    )


def _report_prompts(story: RunView) -> str:
    return story.prompts.report_description if story.prompts is not None else "the report prompts"


def notes(story: RunView) -> list[str]:
    """Return notes to read before the metrics."""
    state, found = story.state, []
    if story.edited is not None and state is not None and state.reason:
        found.append(f"The job is {state.state}: {state.reason}.")
    found += [f"{warning[0].upper()}{warning[1:]}." for warning in story.warnings]
    bad = [check for check in story.checks if check["status"] != "ok"]
    found += [f"Preflight, {check['name']}: {check['measured']}" for check in bad]
    return found


def cards(story: RunView) -> str:
    """Return the key metrics as cards."""
    base, edited = story.base, story.edited
    shown: list[tuple[str, str, str]] = []
    if base is not None and edited is not None:
        low, high = wilson_interval(edited.refusals, edited.bad_prompts)
        shown = [
            (
                "Refusals",
                f"{_share(base.refusals, base.bad_prompts)} → {_share(edited.refusals, edited.bad_prompts)}",
                f"{edited.refusals} of {edited.bad_prompts}; 95 % interval {100 * low:.1f}–{100 * high:.1f} %",
            ),
            ("Moved by", f"{edited.kl or 0:.3g} nats", f"KL divergence, {kl_positions(edited)}; 0: not at all"),
            (
                "False refusals",
                f"{_share(base.false_refusals, base.good_prompts)} → "
                f"{_share(edited.false_refusals, edited.good_prompts)}",
                f"{edited.false_refusals} of {edited.good_prompts} ordinary prompts",
            ),
            (
                "Broken answers",
                f"{base.degenerate + base.false_degenerate} → {edited.degenerate + edited.false_degenerate}",
                f"empty or going round in circles, of {edited.bad_prompts + edited.good_prompts}",
            ),
        ]
    if story.spent.seconds:
        cost = f"${story.spent.dollars:.2f}" if story.spent.dollars else "no price known"
        shown.append(("Took", duration_text(story.spent.seconds), cost))
    items = "".join(
        f"<li>{escaped(name)}<strong>{escaped(value)}</strong><span>{escaped(more)}</span></li>"
        for name, value, more in shown
    )
    return f'<ul class="cards">{items}</ul>' if items else ""


def _share(count: int, n: int) -> str:
    return f"{100 * count / n:.0f} %"


def _figures(story: RunView) -> str:
    if story.base is None or story.edited is None:
        return ""
    return paragraph(f"Both models were measured alike, on {_report_prompts(story)}.") + table_of(
        figures_table(story.base, story.edited), "Figures of both models, with 95 % intervals"
    )


def _front(story: RunView) -> str:
    if story.prompts is None or not story.trials:
        return ""
    shown, front, asked = usable(story.trials), pareto_front(story.trials), len(story.prompts.bad_search)
    skipped = sum(trial.values.skipped for trial in story.trials)
    failed = len(story.trials) - len(shown) - skipped
    text = (
        f"Every trial is an edit, measured on the search split: {asked} prompts with the behaviour, "
        f"{len(story.prompts.good_search)} without. Of {len(story.trials)} trials {failed} failed and {skipped} were "
        f"given up for their KL divergence. Down and to the left is better; {len(front)} trials are beaten in both by "
        f"no other. The chosen one has the lowest divergence among those that refuse about least."
    )
    caption = f"Refusals and KL divergence of {len(shown)} trials, {len(front)} of them on the Pareto front"
    head = ("trial", "refusals", "KL (nats)", "")
    chart = figure(caption, front_chart(story.trials, story.chosen, asked))
    rows = [_trial_row(story, trial, shown) for trial in front]
    every = [_trial_row(story, trial, shown) for trial in story.trials]
    return (
        paragraph(text)
        + chart
        + paragraph("A trial's button shows its point in the chart.", "faint")
        + table("The Pareto front", head, rows)
        + details(f"All {len(every)} trials", table("All trials", head, every))
    )


def _trial_row(story: RunView, trial: Trial, shown: Sequence[Trial]) -> Sequence[Cell]:
    name: Cell = f"trial {trial.number}"
    if trial in shown:
        name = Markup(f'<button type="button" data-point="{shown.index(trial)}">trial {trial.number}</button>')
    mark = "chosen" if story.chosen is not None and trial.number == story.chosen.number else ""
    return name, str(trial.values.refusals), f"{trial.values.kl:.4g}", trial.values.reason or mark


def _path(story: RunView) -> str:
    path = story.path
    if path is None:
        return ""
    if path.failed is not None:
        return paragraph(f"There is none, and the search drew edits itself: {path.failed}.")
    text = (
        "Gradient descent moved the strengths and directions of all layers. Each stage weighs the change elsewhere "
        "more, by β, so its edit is gentler than the one before; their ends are the first trials. Refusals and KL "
        f"divergence are measured on prompts held out of the descent, {path.prompts} of them with the behaviour."
    )
    head = ("trial", "β", "steps", "refusals", "broken", "KL (nats)")
    rows = [
        (f"trial {number}", f"{end.beta:.3g}", str(end.steps), str(end.refusals), str(end.broken), f"{end.kl:.4g}")
        for number, end in enumerate(reversed(path.stages))
    ]
    return paragraph(text) + table("Ends of the stages", head, rows)


def _edit(story: RunView) -> str:
    resolution = story.record.resolution
    if story.edit is None or story.chosen is None or resolution is None:
        return ""
    layers, values = resolution.layers, strengths(story.edit, resolution.layers)
    peaks = "; ".join(f"{component} {_spread(weights)}" for component, weights in values.items())
    rows = [[str(layer), *(f"{weights[layer]:.3f}" for weights in values.values())] for layer in range(layers)]
    lead = "is the chosen one" if story.edited is not None else "would be chosen if the search ended now"
    return (
        paragraph(f"Trial {story.chosen.number} {lead}. It ablates {direction_text(story.edit)}: {peaks}.")
        + figure(
            f"Strength of the ablation in each of {layers} layers; 1 takes the direction out whole",
            strength_chart(story.edit, layers),
            f"Strength of the ablation by layer: {peaks}",
        )
        + table_of(strength_table(story.edit), "Parameters of the edit")
        + details("Strengths by layer", table("Strength of the ablation", ("layer", *values), rows))
    )


def _spread(weights: Sequence[float]) -> str:
    """Describe where an edit is strong and where it does nothing."""
    least, most = min(weights), max(weights)
    if most - least < 0.005:
        return f"by {most:.2f} in every layer"
    untouched = sum(weight == 0 for weight in weights)
    rest = f"untouched in {untouched} of {len(weights)}" if untouched else f"least by {least:.2f}"
    return f"most in layer {weights.index(most)}, by {most:.2f}, {rest}"


def _geometry(story: RunView) -> str:
    if story.geometry is None or not story.geometry.layers:
        return ""
    layers, best = story.geometry.layers, best_layer(story.geometry)
    names = {label: field for _, fields in GEOMETRY for label, field in fields.items()}
    rows = [
        [str(index), *("–" if getattr(layer, f) is None else f"{getattr(layer, f):.3g}" for f in names.values())]
        for index, layer in enumerate(layers)
    ]
    text = (
        "What the model holds in mind at the end of a prompt, layer by layer. The direction of a layer is what tells "
        "prompts with the behaviour (bad) from those without (good); the higher silhouette and share of variance, the "
        f"further apart the two are. They are furthest apart in layer {best}."
    )
    points = (
        f'<p><label for="layer">Layer <output id="layer-shown" for="layer">{best}</output></label>'
        f'<input type="range" id="layer" min="0" max="{len(layers) - 1}" value="{best}" autocomplete="off"></p>'
    )
    return (
        paragraph(text)
        + figure("Cosines, lengths and separation of the two classes by layer", geometry_charts(story.geometry))
        + details("Values by layer", table("Geometry by layer", ("layer", *names), rows))
        + "<h3>Prompts of one layer</h3>"
        + points
        + figure("Prompts of both classes along the layer's direction and across it", points_chart(story.geometry))
    )


def _answers(story: RunView, private: bool) -> str:
    if story.answers is None:
        return ""
    before, after = story.answers
    limit = story.record.settings["scoring"]["answer_tokens"]
    text = (
        f"The first {len(before.good)} prompts of each kind of the report split, in its random order, answered with up "
        f"to {limit} tokens by the base model and the edited one. These are answers that the figures count."
    )
    found = paragraph(text) + "<h3>Prompts without the behaviour</h3>" + _pairs(before.good, after.good)
    found += "<h3>Prompts with the behaviour</h3>"
    if private:
        return found + _pairs(before.bad, after.bad)
    changed = sum(one.refused and not other.refused for one, other in zip(before.bad, after.bad, strict=True))
    return found + paragraph(
        f"{len(before.bad)} are kept on the machine that made the export and left out here: the base model refused "
        f"{sum(one.refused for one in before.bad)} of them, and the edited one answers {changed} of these. "
        "`abliterate report --include-responses` writes them into a page of their own."
    )


def _pairs(before: Sequence[KeptAnswer], after: Sequence[KeptAnswer]) -> str:
    return "".join(
        f"<h4>{escaped(one.prompt)}</h4>"
        f'<div class="pair">{_answer("base model", one)}{_answer("edited model", other)}</div>'
        for one, other in zip(before, after, strict=True)
    )


def _answer(model: str, kept: KeptAnswer) -> str:
    verdict = '<span class="refused">refused</span>' if kept.refused else '<span class="ok">answered</span>'
    return f"<div>{model}: {verdict}<blockquote>{escaped(kept.answer)}</blockquote></div>"


def _time(story: RunView) -> str:
    if not story.phases:
        return ""
    total = sum(phase.seconds for phase in story.phases) or 1.0
    rows = [
        (
            phase.name,
            duration_text(phase.seconds),
            f"{100 * phase.seconds / total:.0f} %",
            "–" if phase.dollars is None else f"${phase.dollars:.4f}",
        )
        for phase in story.phases
    ]
    spent = story.spent
    cost = f", ${spent.dollars:.2f}" if spent.dollars else ""
    return paragraph(f"All starts of the job took {duration_text(spent.seconds)}{cost} so far.") + table(
        "Time and cost by phase, over all starts", ("phase", "time", "share", "cost"), rows
    )


def _detectors(story: RunView) -> str:
    found = story.detectors
    if found is None:
        return ""
    parts = [table_of(detector_counts(found), COUNTED)]
    if found.agreement:
        parts.append(details("Agreement", table_of(detector_agreement(found), AGREED)))
    return "".join([*parts, *map(paragraph, failed_detectors(found))])


def _preflight(story: RunView) -> str:
    if not story.checks:
        return ""
    head = ("check", "status", "measured", "needed")
    rows = [
        (
            check["name"],
            Markup(f'<span class="{escaped(check["status"])}">{escaped(check["status"])}</span>'),
            check["measured"],
            check.get("needed", ""),
        )
        for check in story.checks
    ]
    worse = [row for row, check in zip(rows, story.checks, strict=True) if check["status"] != "ok"]
    found = table("Checks that were not in order", head, worse) if worse else paragraph("All checks were in order.")
    return found + details(f"All {len(rows)} checks", table("All checks of the latest preflight", head, rows))


def _provenance(story: RunView) -> str:
    record = story.record
    commit = f" at commit {record.model_commit}" if record.model_commit else ""
    ran = "; ".join(f"trials {numbers} on {hardware}" for hardware, numbers in story.machines)
    items = {
        "Model": f"{record.settings['model']}{commit}",
        "Loaded in": record.resolution.dtype if record.resolution else "not loaded yet",
        "Directions": str(record.identity["directions"]["method"]),
        "Search": f"seed {record.identity['seed']}, {record.startup_trials} start-up trials",
        "Computed on": ran or "nothing was searched",
        "Export": story.export or "none yet",
        "Delivered to": "; ".join(f"{one.target}: {one.state}" for one in story.uploads) or "nowhere",
        "Versions": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
    }
    if story.prompts is not None:
        commits = story.prompts.commits
        for name, source in story.prompts.sources.items():
            items[name.replace("_", " ")] = source + (f", commit {commits[name]}" if name in commits else "")
    return definitions(items)
