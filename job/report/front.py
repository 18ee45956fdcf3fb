"""The numbered Pareto front of a job's trials, with metrics to choose by; needs no torch."""

from __future__ import annotations

from typing import Any

from job.data.prompts import PromptSets
from job.numerics.statistics import wilson_interval
from job.records import FORMATS, Figures, Trial
from job.report.results import job_trials
from job.search.pareto import choose, pareto_front
from job.storage.atomic import read_record
from job.storage.exports import is_sealed
from job.storage.jobs import job_settings
from job.storage.run_folder import RunFolder


def job_front(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the front's trials, fewest refusals and broken responses first. Raises JobError.

    Each has its number, whether it is the (current) choice, refusals on the search split with their 95 % interval as
    shares, broken responses, KL, exported formats, its export's metrics on the report split or None, and the number of
    reused report prompts.
    """
    trials = pareto_front(job_trials(folder))
    if not trials:
        return []
    prompts = read_record(folder.prompts_file, PromptSets)
    asked = len(prompts.bad_search)
    chosen = choose(trials, asked, job_settings(folder).choice.refusal_tolerance).number
    return [_point(folder, trial, prompts, chosen) for trial in trials]


def _point(folder: RunFolder, trial: Trial, prompts: PromptSets, chosen: int) -> dict[str, Any]:
    asked = len(prompts.bad_search)
    exports = {form: folder.export_folder(trial.number, form) for form in FORMATS}
    made = [form for form, export in exports.items() if is_sealed(export)]
    files = [folder.figures_file(exports[form].name) for form in made]
    figures = next((read_record(file, Figures) for file in files if file.exists()), None)
    return {
        "number": trial.number,
        "chosen": trial.number == chosen,
        "refusals": trial.values.refusals,
        "prompts": asked,
        "broken": trial.values.broken,
        "refusals_interval": wilson_interval(trial.values.refusals, asked),
        "kl": trial.values.kl,
        "exported": made,
        "report": figures.model_dump(mode="json") if figures is not None else None,
        "report_prompts_seen": prompts.reused,
    }


def front_text(front: list[dict[str, Any]]) -> str:
    """Format a front for people, one line per trial."""
    if not front:
        return "no trial is finished"
    return "\n".join(map(_line, front))


def _line(point: dict[str, Any]) -> str:
    low, high = (100 * share for share in point["refusals_interval"])
    line = (
        f"trial {point['number']}: {point['refusals']}/{point['prompts']} refusals ({low:.1f}–{high:.1f} %), "
        + (f"{point['broken']} broken answers, " if point["broken"] else "")
        + f"KL {point['kl']:.4g}"
    )
    if point["chosen"]:
        line += ", chosen"
    if point["exported"]:
        line += f", exported ({', '.join(point['exported'])})"
    found = point["report"]
    if found is not None:
        seen, total = point["report_prompts_seen"], found["bad_prompts"] + found["good_prompts"]
        line += (
            f": on {f'report prompts, {seen} of {total} seen before,' if seen else 'held-out prompts'} "
            f"{found['refusals']}/{found['bad_prompts']} refusals, KL {found['kl']:.4g}, "
            f"{found['false_refusals']}/{found['good_prompts']} false refusals, "
            f"{found['degenerate'] + found['false_degenerate']} broken answers"
        )
    return line
