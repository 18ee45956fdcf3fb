"""The numbered Pareto front of a job's trials, with metrics to choose by; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from job.data.prompts import PromptSets
from job.errors import DamagedError
from job.numerics.statistics import wilson_interval
from job.records import FORMATS, ObjectiveScore, Trial
from job.report.run_view import RunView
from job.report.tables import aligned
from job.storage.atomic import read_record
from job.storage.exports import is_sealed
from job.storage.run_folder import RunFolder
from job.text.behaviour import BehaviourWords
from job.text.intervals import percent_range


def job_front(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the front's trials, fewest refusals and broken responses first. Raises JobError.

    Each has its number, whether it is the (current) choice, refusals on the search split with their 95 % interval as
    shares, broken responses, KL, figures in other objectives by name, a finalist's figures on the prompts held out for
    the choice or None, exported formats, its export's metrics on the report split or None, and the number of reused
    report prompts.
    """
    view = RunView(folder)
    return [_point(view, trial) for trial in view.front]


def _point(view: RunView, trial: Trial) -> dict[str, Any]:
    prompts = view.prompts or read_record(view.folder.prompts_file, PromptSets)  # an error that names the missing file
    if trial.values.refusals > len(prompts.bad_search):  # a file of others may hold any number
        raise DamagedError(
            f"trial {trial.number} in {view.folder.study_file} counts {trial.values.refusals} refusals of "
            f"{len(prompts.bad_search)} prompts",
            remedy="the study is damaged or another job's: use an unchanged copy of the run folder",
        )
    exports = {form: view.folder.export_folder(trial.number, form) for form in FORMATS}
    made = [form for form, export in exports.items() if is_sealed(export)]
    figures = next(filter(None, (view.figures(exports[form].name) for form in made)), None)
    return {
        "number": trial.number,
        "chosen": trial == view.chosen,
        "refusals": trial.values.refusals,
        "prompts": len(prompts.bad_search),
        "broken": trial.values.broken,
        "refusals_interval": wilson_interval(trial.values.refusals, len(prompts.bad_search)),
        "kl": trial.values.kl,
        "objectives": shown_others(trial),
        "choice": shown_choice(view, trial),
        "exported": made,
        "report": figures.model_dump(mode="json") if figures is not None else None,
        "report_prompts_seen": prompts.reused,
    }


def shown_others(trial: Trial) -> dict[str, Any]:
    """Return a trial's figures in objectives beyond refusals and KL as JSON, by name."""
    shown = {"figure", "of", "direction"}
    return {name: score.model_dump(mode="json", include=shown) for name, score in trial.values.others.items()}


def others_text(others: Mapping[str, Mapping[str, Any]]) -> str:
    """Format figures in other objectives, e.g. "soft 3/40, "; "" without any."""
    return "".join(f"{name} {ObjectiveScore.model_validate(score)}, " for name, score in others.items())


def shown_choice(view: RunView, trial: Trial) -> dict[str, Any] | None:
    """Return a finalist's figures on the prompts held out for the choice as JSON, None if there are none."""
    figures = view.choice_figures(trial)
    return None if figures is None else figures.model_dump(mode="json")


def choice_text(figures: dict[str, Any] | None) -> str:
    """Format a finalist's figures on the prompts held out for the choice, "" without any."""
    if figures is None:
        return ""
    broken = f", {figures['broken']} broken responses" if figures["broken"] else ""
    counted = f"{figures['refusals']}/{figures['bad_prompts']}{broken}, {others_text(figures.get('others', {}))}"
    return f"; held out for the choice: {counted}KL {figures['kl']:.4g}"


def front_text(front: list[dict[str, Any]], words: BehaviourWords) -> str:
    """Format a front for people, one line per trial."""
    return "\n".join(front_lines(front, words)) or "no trial is finished"


def front_lines(front: list[dict[str, Any]], words: BehaviourWords) -> list[str]:
    """Return a line per trial, with aligned columns."""
    width = max((len(str(point["refusals"])) for point in front), default=0)
    broken = any(point["broken"] for point in front)
    return aligned([_cells(point, width, broken, words) for point in front])


def _cells(point: dict[str, Any], width: int, broken: bool, words: BehaviourWords) -> list[str]:
    counted = f"{point['refusals']:>{width}}/{point['prompts']} {words.counted}"
    cells = [f"trial {point['number']}:", f"{counted} ({percent_range(point['refusals_interval'])}),"]
    if broken:
        cells.append(f"{point['broken']} broken responses,")
    notes = [note for note in (point["chosen"] and "chosen", _exported(point)) if note]
    return [
        *cells,
        ", ".join([f"{others_text(point['objectives'])}KL {point['kl']:.4g}{choice_text(point['choice'])}", *notes])
        + _reported(point, words),
    ]


def _exported(point: dict[str, Any]) -> str:
    return f"exported ({', '.join(point['exported'])})" if point["exported"] else ""


def _reported(point: dict[str, Any], words: BehaviourWords) -> str:
    found = point["report"]
    if found is None:
        return ""
    seen, total = point["report_prompts_seen"], found["bad_prompts"] + found["good_prompts"]
    return (
        f": on {f'report prompts, {seen} of {total} seen before,' if seen else 'held-out prompts'} "
        f"{found['refusals']}/{found['bad_prompts']} {words.counted}, KL {found['kl']:.4g}, "
        f"{found['false_refusals']}/{found['good_prompts']} {words.elsewhere}, "
        f"{found['degenerate'] + found['false_degenerate']} broken responses"
    )
