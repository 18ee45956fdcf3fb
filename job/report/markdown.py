"""The report of a run: method, results, machines and time."""

from __future__ import annotations

from job.errors import UsageError
from job.export.benchmarks import CAPTION, benchmark_rows
from job.export.model_card import direction_text, strength_rows
from job.export.scorecard import group_rows, how, scorecard_rows, thinking_rows
from job.records import DetectorReport, GeometryRecord, State
from job.records.evaluation import Benchmarks
from job.report.run_view import RunResult, RunView
from job.report.sections import headline, moved_most, title
from job.report.tables import (
    AGREED,
    FINALISTS,
    counted,
    detector_agreement,
    detector_counts,
    failed_detectors,
    finalists,
    layer_geometry,
    other_figures,
    other_names,
)
from job.storage.atomic import PRIVATE, write_atomically
from job.storage.run_folder import RunFolder
from job.text.behaviour import BehaviourWords
from job.text.markup import escaped, markdown, markdown_table
from job.text.redaction import redact


def write_reports(folder: RunFolder, state: State | None = None, *, include_responses: bool = False) -> str:
    """Write report.md and report.html of a run folder; return the former's text.

    `state` overrides state.json. `include_responses` adds a page with responses to bad prompts, for its owner only and
    never mirrored. Raises UsageError without stored responses, or MachineError.
    """
    from job.report.html import report_page  # its charts take a second to import

    story = RunView(folder, state, lenient=True)
    if include_responses and story.answers is None:
        raise UsageError(
            f"no responses are kept of job {story.record.job_id}",
            remedy="they stay on the machine that made the export; `abliterate export` makes it again",
        )
    text = (
        run_report(story, story.result)
        if story.result
        else f"# {markdown(title(story))}\n\n{markdown(headline(story))}\n"
    )
    text = redact(text)
    write_atomically(folder.report_file, text.encode())
    write_atomically(folder.page_file, report_page(story).encode())
    if include_responses:
        write_atomically(folder.answers_page_file, report_page(story, private=True).encode(), mode=PRIVATE)
    return text


def run_report(view: RunView, result: RunResult) -> str:
    """Return the report.md of a run with a result."""
    resolution = view.record.resolution
    dtype = resolution.dtype if resolution else "unknown"
    sections = {
        "Scorecard": _scorecard(view, result),
        "Detectors": detectors_text(view.detectors, view.words),
        "Result": _result(view, result),
        "Pareto front": _front(view, result),
        **({"Benchmarks": _benchmarks(view.benchmarks)} if view.benchmarks else {}),
        "Geometry": _geometry(view, result),
        "Preflight": _preflight(view),
        "Provenance": _provenance(view, result),
    }
    model = f"Job {view.record.job_id}. Model: {markdown(view.record.settings['model'])}, loaded in {dtype}"
    blocks = [f"# {markdown(title(view))}", model]
    blocks += [f"## {name}\n\n{text}" for name, text in sections.items()]
    return _blocks(*blocks) + "\n"


def _blocks(*texts: str) -> str:
    return "\n\n".join(filter(None, texts))


def _result(view: RunView, result: RunResult) -> str:
    return _blocks(
        f"Trial {result.chosen.number} of {len(view.trials)} was chosen: "
        f"`exports/{result.export}`, to which `export` links.",
        _why(view),
        "\n".join(f"- **Warning**: {markdown(warning)}." for warning in view.warnings),
        f"It ablates {direction_text(result.edit)} with these strengths:",
        markdown_table(strength_rows(result.edit)),
        _norms(view),
    )


def _scorecard(view: RunView, result: RunResult) -> str:
    groups = escaped(group_rows(result.base, result.edited, view.words))
    moved = moved_most(view)
    return _blocks(
        f"Base model and edited model on {result.prompts.report_description}; 95 % intervals in brackets.",
        markdown_table(scorecard_rows(result.base, result.edited, view.words)),
        f"By group of prompts:\n\n{markdown_table(groups)}" if groups else "",
        markdown_table(thoughts) if (thoughts := thinking_rows(result.base, result.edited, view.words)) else "",
        f"{how(view.words)}\nAll detectors, and how far they agree, follow below." if result.edited.outcomes else "",
        f"The prompt that moved most: {markdown(moved)}" if moved else "",
    )


def _why(view: RunView) -> str:
    return f"Over all prompts of search and choice: {view.reason}." if view.reason is not None else ""


def _norms(view: RunView) -> str:
    resolution, ablation = view.record.resolution, view.record.settings["ablation"]
    if resolution is None or not resolution.norms:
        return ""
    names = markdown(", ".join(resolution.norms))
    if ablation.get("through_norms", True):
        done = "the edit ablates what becomes the direction behind them"
        if resolution.pull_back == "dual":
            done += ", and moves the stream no further than it must"
    else:
        done = "as asked for, the edit takes no account of them and reaches the stream only in part"
    return f"Norms stand between residual writers and the stream ({names}): {done}."


def _front(view: RunView, result: RunResult) -> str:
    skipped = sum(trial.values.skipped for trial in view.trials)
    failed = sum(trial.values.reason is not None for trial in view.trials) - skipped
    given_up = f", {skipped} were given up for their KL divergence before they answered" if skipped else ""
    projected = [trial.values.projected_from for trial in view.trials if trial.values.projected_from]
    if projected:
        given_up += (
            f", {len(projected)} were dropped after {projected[0]} prompts because another was certainly better or "
            "equal, and their counts are projected"
        )
    names = map(markdown, other_names(view.front))
    rows: list[tuple[object, ...]] = [("trial", view.words.counted, "broken responses", *names, "KL (nats)")]
    for trial in view.front:
        mark = " (chosen)" if trial.number == result.chosen.number else ""
        values = trial.values
        rows.append(
            (f"{trial.number}{mark}", values.refusals, values.broken, *other_figures(trial), f"{values.kl:.4g}")
        )
    return _blocks(
        f"Measured on the search split ({len(result.prompts.bad_search)} prompts with the behaviour, "
        f"{len(result.prompts.good_search)} without); {failed} of {len(view.trials)} trials failed{given_up}."
        f"{_lengths(view)}",
        markdown_table(rows),
        *([f"{FINALISTS}:", markdown_table(again)] if len(again := finalists(view)) > 1 else []),
    )


def _lengths(view: RunView) -> str:
    evasions = f"\nEvasive responses count as {view.words.shown}." if view.record.counts_evasions else ""
    if not view.rescored:
        return evasions
    scoring, words = view.record.settings["scoring"], view.words
    what = "Refusals" if words.refuses else f"Responses {words.shown}"
    read = f"{what} were counted in the first {scoring['search_tokens']} tokens of responses"
    trials = ", ".join(map(str, view.rescored))
    again = f"again in the first {scoring['answer_tokens']} for the trials that came into question: {trials}"
    return f"{evasions}\n{read}, and {again}."


def detectors_text(found: DetectorReport | None, words: BehaviourWords) -> str:
    """Format detector results and agreement as tables."""
    if found is None:
        return "None was asked."
    parts = [f"{counted(words)}:", markdown_table(detector_counts(found, words))]
    agreement = detector_agreement(found)
    if len(agreement) > 1:
        parts += [f"{AGREED}:", markdown_table(agreement)]
    failed = [f"- {markdown(line)}" for line in failed_detectors(found)]
    return "\n\n".join([*parts, *(["\n".join(failed)] if failed else [])])


def _benchmarks(found: Benchmarks) -> str:
    return _blocks(f"{CAPTION} (version {markdown(found.lm_eval)}):", markdown_table(benchmark_rows(found.scores)))


def _geometry(view: RunView, result: RunResult) -> str:
    if view.geometry is None:
        return "Its file is missing or damaged."
    return _blocks(
        geometry_table(view.geometry),
        "μ are the means of the residuals of prompts without (good) and with (bad) the behaviour "
        f"({len(result.prompts.good)} and {len(result.prompts.bad)} prompts), v is the layer's first direction; "
        "silhouette and share of variance say how well the two classes are apart.",
    )


def geometry_table(record: GeometryRecord) -> str:
    """Format the geometry of all layers as a table."""
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
    return markdown_table(layer_geometry(record, columns))


def _preflight(view: RunView) -> str:
    if not view.bad_checks:
        return "All checks were in order."
    accepted = view.survey.get("allowed", ())
    allowed = f" Allowed to fail: {markdown(', '.join(accepted))}." if accepted else ""
    names = ("name", "status", "measured")
    checks = [tuple(markdown(check[name]) for name in names) for check in view.bad_checks]
    return f"All other checks were in order.{allowed}\n\n{markdown_table([('check', 'status', 'measured'), *checks])}"


def _provenance(view: RunView, result: RunResult) -> str:
    record = view.record
    prefix = record.resolution.response_prefix if record.resolution else ""
    packages = ", ".join(markdown(f"{name} {version}") for name, version in record.versions.items())
    return _blocks(
        _machines(view),
        f"{packages}; seed {record.identity['seed']}; {record.startup_trials or 'no'} start-up trials; "
        f"directions by {record.identity['directions']['method']}; "
        f"{'responses are made to begin with ' + markdown(repr(prefix)) if prefix else 'no response prefix'}.",
        _sources(result),
    )


def _machines(view: RunView) -> str:
    lines = [f"Trials {numbers} were evaluated on {markdown(hardware)}." for hardware, numbers in view.machines]
    return "\n".join(lines) or "No trial was evaluated: the edit was given."


def _sources(result: RunResult) -> str:
    commits = result.prompts.commits
    return "\n".join(
        f"- {markdown(name)}: {markdown(source)}" + (f", commit {markdown(commits[name])}" if name in commits else "")
        for name, source in result.prompts.sources.items()
    )
