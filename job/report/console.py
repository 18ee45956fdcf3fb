"""What a run prints: its plan, its trials as aligned columns, and the result at its end."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from job.records import Figures, Trial
from job.report.timings import phase_times, time_spent
from job.search.budget import read_spent
from job.search.pareto import choose, eligible, pareto_front
from job.storage.events import read_events
from job.storage.run_folder import RunFolder
from job.text.behaviour import REFUSAL_WORDS, BehaviourWords
from job.text.divergence import kl_with_bound
from job.text.durations import duration_text


def plan_lines(survey: Mapping[str, Any], model: str, trials: int, done: int) -> Iterator[str]:
    """Yield what is planned, by preflight.json: model, trials, devices, time and money."""
    yield f"model: {model}"
    parts = [f"{trials} trials{f', {done} done' if done else ''}"]
    if plan := survey.get("plan"):
        devices = ", ".join(f"{device['device']} ({device['name']})" for device in plan["devices"])
        parts += [f"weights on {devices}", f"{plan['rows']} rows a forward pass"]
    yield f"plan: {'; '.join(parts)}"
    known = {check["name"]: check["measured"] for check in survey["checks"]}
    if survey.get("hours") is None:
        yield "estimate: none, the speed of this device is not known"
    else:
        yield f"estimate: {'; '.join(known[name] for name in ('estimate.time', 'estimate.cost') if name in known)}"


class SearchLines:
    """Lines about the trials of a search, and its best trial so far."""

    def __init__(
        self,
        trials: Sequence[Trial],
        target: int,
        asked: int,
        tolerance: float,
        words: BehaviourWords = REFUSAL_WORDS,
    ) -> None:
        """Start with the trials done so far, of `target`; `asked` and `tolerance` are those of the choice."""
        self._front = pareto_front(trials)
        self._asked, self._tolerance = asked, tolerance
        self._width, self._counts = len(str(max(target - 1, 0))), len(str(asked))
        self._fault, self._words = "", words

    def add(self, trial: Trial) -> bool:
        """Add a finished trial; return whether it is the best so far."""
        self._fault = trial.values.reason or self._fault
        before = self._best()
        self._front = pareto_front([*self._front, trial])
        return self._best() != before

    def line(self, trial: Trial, best: bool) -> str:
        """Return a trial's line."""
        values, name = trial.values, f"trial {trial.number:>{self._width}}"
        if values.reason:
            return f"{name}: failed: {values.reason}"
        shown = f"{values.refusals:>{self._counts}}/{self._asked} {self._words.shown}"
        others = "".join(f", {other} {score}" for other, score in values.others.items())
        mark = " best so far" if best else ""
        if values.projected_from:
            mark = f" projected from {values.projected_from} prompts"
        return f"{name}: {shown}, {values.broken:>{self._counts}} broken{others}, KL {values.kl:<9.4g}{mark}".rstrip()

    def note(self) -> str:
        """Return the best trial so far in short, or why there is none."""
        best = self._best()
        if best is None:
            return f"no trial to use yet: {self._fault}" if self._fault else ""
        shown = f"{best.values.unanswered}/{self._asked} {self._words.shown} or broken"
        others = "".join(f", {other} {score}" for other, score in best.values.others.items())
        return f"best: {shown}{others}, KL {best.values.kl:.3g}"

    def _best(self) -> Trial | None:
        return choose(self._front, self._asked, self._tolerance) if self._front else None


def choice_text(
    trials: Sequence[Trial], chosen: Trial, asked: int, tolerance: float, words: BehaviourWords = REFUSAL_WORDS
) -> str:
    """Return why a trial was chosen: its KL, and the trials that it was compared with."""
    compared = eligible(trials, asked, tolerance)
    most = max(trial.values.unanswered for trial in compared)
    among = f"the lowest of {len(compared)} trials" if len(compared) > 1 else "the only trial"
    return f"KL {chosen.values.kl:.4g}, {among} on the front with at most {most} of {asked} {words.shown} or broken"


def result_lines(folder: RunFolder, edited: Figures) -> list[str]:
    """Return what else there is to say of a result: how much changed elsewhere, why it was chosen, time and cost."""
    events, spent = read_events(folder.events_file), read_spent(folder.meter_file)
    chosen = [str(event.get("message", "")) for event in events if event.get("event") == "choice"]
    cost = f", ${spent.dollars:.2f}" if spent.dollars else ""
    return [
        f"change: other responses are {kl_with_bound(edited.kl or 0)}",
        *chosen[-1:],
        f"took:   {duration_text(time_spent(spent.seconds, phase_times(events)))}{cost}",
    ]


def next_commands(folder: Path) -> list[str]:
    """Return the next commands: talk to the model, see the other trials, deliver."""
    place = ["--workspace", str(folder.parent), "--job", folder.name]
    commands = (["chat", *place], ["front", *place], ["upload", *place, "--upload", "hf://USER/NAME"])
    lines = [shlex.join(["abliterate", *words]) for words in commands]
    return [f"{'next:' if not index else '':7} {line}" for index, line in enumerate(lines)]
