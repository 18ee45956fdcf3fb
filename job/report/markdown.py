"""The report of a run: method, results, machines and time."""

from __future__ import annotations

from job.errors import UsageError
from job.export.model_card import direction_text, figures_rows, strength_rows
from job.records import DetectorReport, GeometryRecord, State
from job.report.results import RunResult
from job.report.run_view import RunView
from job.report.sections import headline
from job.report.tables import AGREED, COUNTED, detector_agreement, detector_counts, failed_detectors, layer_geometry
from job.search.pareto import pareto_front
from job.storage.atomic import PRIVATE, write_atomically
from job.storage.run_folder import RunFolder
from job.text.markup import markdown, markdown_table
from job.text.redaction import redact


def write_reports(folder: RunFolder, state: State | None = None, *, include_responses: bool = False) -> str:
    """Write report.md and report.html of a run folder; return the former's text.

    `state` overrides state.json. `include_responses` adds a page with responses to bad prompts, for its owner only and
    never mirrored. Raises UsageError without stored responses, or MachineError.
    """
    from job.report.html import report_page  # its charts take a second to import

    story = RunView.read(folder, state)
    if include_responses and story.answers is None:
        raise UsageError(
            f"no answers are kept of job {story.record.job_id}",
            remedy="they stay on the machine that made the export; `abliterate export` makes it again",
        )
    text = (
        run_report(RunResult.read(folder))
        if story.export
        else f"# Report of job {folder.path.name}\n\n{markdown(headline(story))}\n"
    )
    text = redact(text)
    write_atomically(folder.report_file, text.encode())
    write_atomically(folder.page_file, report_page(story).encode())
    if include_responses:
        write_atomically(folder.answers_page_file, report_page(story, private=True).encode(), mode=PRIVATE)
    return text


def run_report(result: RunResult) -> str:
    """Return the report.md of a run."""
    resolution = result.record.resolution
    dtype = resolution.dtype if resolution else "unknown"
    sections = {
        "Result": _result(result),
        "Pareto front": _front(result),
        "Detectors": detectors_text(result.detectors),
        "Geometry": _geometry(result),
        "Preflight": _preflight(result),
        "Provenance": _provenance(result),
    }
    model = f"Model: {markdown(result.record.settings['model'])}, loaded in {dtype}"
    blocks = [f"# Report of job {result.record.job_id}", model]
    blocks += [f"## {title}\n\n{text}" for title, text in sections.items()]
    return _blocks(*blocks) + "\n"


def _blocks(*texts: str) -> str:
    return "\n\n".join(filter(None, texts))


def _result(result: RunResult) -> str:
    return _blocks(
        f"Trial {result.chosen.number} of {len(result.trials)} was chosen: "
        f"`exports/{result.export}`, to which `export` links.\n"
        f"Its figures on {result.prompts.report_description}:",
        markdown_table(figures_rows(result.base, result.edited)),
        "\n".join(f"- **Warning**: {markdown(warning)}." for warning in result.warnings),
        f"It ablates {direction_text(result.edit)} with these strengths:",
        markdown_table(strength_rows(result.edit)),
        _norms(result),
    )


def _norms(result: RunResult) -> str:
    """Describe norms between residual writers and the stream, "" without any."""
    resolution, ablation = result.record.resolution, result.record.settings["ablation"]
    if resolution is None or not resolution.norms:
        return ""
    names = markdown(", ".join(resolution.norms))
    if ablation.get("through_norms", True):
        done = "the edit ablates what becomes the direction behind them"
    else:
        done = "as asked for, the edit takes no account of them and reaches the stream only in part"
    return f"Norms stand between residual writers and the stream ({names}): {done}."


def _front(result: RunResult) -> str:
    skipped = sum(trial.values.skipped for trial in result.trials)
    failed = sum(trial.values.reason is not None for trial in result.trials) - skipped
    given_up = f", {skipped} were given up for their KL divergence before they answered" if skipped else ""
    rows: list[tuple[object, ...]] = [("trial", "refusals", "broken answers", "KL (nats)")]
    for trial in pareto_front(result.trials):
        mark = " (chosen)" if trial.number == result.chosen.number else ""
        values = trial.values
        rows.append((f"{trial.number}{mark}", values.refusals, values.broken, f"{values.kl:.4g}"))
    return _blocks(
        f"Measured on the search split ({len(result.prompts.bad_search)} prompts with the behaviour, "
        f"{len(result.prompts.good_search)} without); {failed} of {len(result.trials)} trials failed{given_up}."
        f"{_lengths(result)}",
        markdown_table(rows),
    )


def _lengths(result: RunResult) -> str:
    """Describe the response lengths in which refusals were counted, "" if all were alike."""
    if not result.rescored:
        return ""
    scoring = result.record.settings["scoring"]
    return (
        f"\nRefusals were counted in the first {scoring['search_tokens']} tokens of answers, and again in the first "
        f"{scoring['answer_tokens']} for the trials that came into question: {', '.join(map(str, result.rescored))}."
    )


def detectors_text(found: DetectorReport | None) -> str:
    """Format detector results and agreement as tables."""
    if found is None:
        return "None was asked."
    parts = [f"{COUNTED}:", markdown_table(detector_counts(found))]
    if found.agreement:
        parts += [f"{AGREED}:", markdown_table(detector_agreement(found))]
    failed = [f"- {markdown(line)}" for line in failed_detectors(found)]
    return "\n\n".join([*parts, *(["\n".join(failed)] if failed else [])])


def _geometry(result: RunResult) -> str:
    return _blocks(
        geometry_table(result.geometry),
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


def _preflight(result: RunResult) -> str:
    if not result.preflight:
        return "All checks were in order."
    allowed = f" Allowed to fail: {markdown(', '.join(result.allowed))}." if result.allowed else ""
    rows = [("check", "status", "measured"), *(tuple(map(markdown, check)) for check in result.preflight)]
    return f"All other checks were in order.{allowed}\n\n{markdown_table(rows)}"


def _provenance(result: RunResult) -> str:
    record = result.record
    prefix = record.resolution.response_prefix if record.resolution else ""
    packages = ", ".join(markdown(f"{name} {version}") for name, version in record.versions.items())
    return _blocks(
        _machines(result),
        f"{packages}; seed {record.identity['seed']}; {record.startup_trials} start-up trials; "
        f"directions by {record.identity['directions']['method']}; "
        f"{'answers are made to begin with ' + markdown(repr(prefix)) if prefix else 'no response prefix'}.",
        _sources(result),
    )


def _machines(result: RunResult) -> str:
    lines = [f"Trials {numbers} were evaluated on {markdown(hardware)}." for hardware, numbers in result.machines]
    return "\n".join(lines) or "No trial was evaluated: the edit was given."


def _sources(result: RunResult) -> str:
    commits = result.prompts.commits
    return "\n".join(
        f"- {markdown(name)}: {markdown(source)}" + (f", commit {markdown(commits[name])}" if name in commits else "")
        for name, source in result.prompts.sources.items()
    )
