"""Compare this tool at its defaults with heretic 1.4.0 on a small real chat model, with the same inputs.

python -m benchmarks.real [FOLDER] [--tools this,heretic] [--trials 24] [--peer-trials 60] [--minutes 10,20,40]
                          [--seeds 0] [--threads 2] [--json FILE] [--write docs/results.md]
python -m benchmarks.real --trials 4 --peer-trials 4 --prompts 12 --tokens 12 --minutes 1,2     a short one

FOLDER is made by `abliterate real-model`; made if absent. Prompts, conversation texts, refusal markers, response length
and threads are equal. This tool is given only the number of trials, the seed and the settings of --set. heretic is
installed from PyPI into its own environment and runs only as a process. A finished run is kept in the JSON file with
its conditions and is not repeated: after an interruption the same command makes the missing runs. Remaining differences
are printed with the table.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import optuna
import psutil
from transformers import AutoTokenizer

from benchmarks.heretic import (
    LIBRARIES,
    PEER,
    PEER_ROWS,
    Task,
    failed,
    install,
    point,
    run_peer,
    study_trials,
    threads,
    versions,
)
from benchmarks.peer import HERE, VERSION, prompt_sets
from job.config.load import default_values
from job.realmodel.folder import write_real_model
from job.search.convergence import hypervolume
from job.search.method import DEFAULT_TRIALS
from tests.helpers import COMMAND, environment, events, only_job

THIS, TOOLS = "this tool", ("this", "heretic")
# The template adds it to conversations without a system prompt; heretic always sends one.
SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
# An edit with at most this refusal rate counts as found.
FEW_REFUSALS = 0.02
# Nats; above it, responses to other prompts are clearly other ones.
USABLE_KL = 0.1
SAMPLE_SECONDS = 0.2
BEGIN, END = "<!-- benchmarks.real: begin -->", "<!-- benchmarks.real: end -->"
UNEQUAL = f"""\
this tool's trials judge responses up to scoring.search_tokens tokens, heretic's up to the full length; both stop the
  clock for an edit with few refusals at the trial that found it.
this tool's refusals include evasive responses, as its search counts them; heretic's have a marker.
this tool's job also scores finalists in full, measures held-out prompts, loads its export again to prove it, and
  writes report and card; heretic saves its trial of fewest refusals.
heretic gets its batch size ({PEER_ROWS}) and float32, so that it need not look for them; it keeps no norms of rows,
  and its directions are plain differences of means, as here by default.
heretic's search for a common response prefix is off; this tool searches for one.
each tool has the library versions that it asks for: see the JSON."""


@dataclass(frozen=True)
class Conditions:
    """Conditions of a run beside tool and seed; only runs with equal conditions are compared.

    Attributes:
        inputs: Hash of the model's description and of all prompts.
        trials: Trials of the search.
        startup: Trials before the sampler's; None: the tool's default.
        tokens: Maximum response length.
        settings: Further settings, `KEY=VALUE`.
    """

    inputs: str
    trials: int
    startup: int | None
    threads: int
    tokens: int
    settings: tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """A trial: its end in seconds after the command, its refusal rate, its KL (at most 1)."""

    seconds: float
    refusals: float
    kl: float


@dataclass(frozen=True)
class Run:
    """Result of one run.

    Attributes:
        search_s: Seconds from the start of the first trial to the end of the last.
        job_s: Seconds from the command to its end.
        peak_bytes: Peak resident memory of all its processes together.
        load: Load average of the minute before its end, its own processes included.
    """

    tool: str
    seed: int
    conditions: Conditions
    points: tuple[Point, ...]
    search_s: float
    job_s: float
    peak_bytes: int
    load: float

    @classmethod
    def parsed(cls, found: dict[str, Any]) -> Self:
        """Read what `asdict` wrote."""
        settings = tuple(found["conditions"]["settings"])
        conditions = Conditions(**{**found["conditions"], "settings": settings})
        points = tuple(Point(**point) for point in found["points"])
        return cls(**{**found, "conditions": conditions, "points": points})

    def volume(self, seconds: float = float("inf")) -> float:
        """Return the hypervolume of the trials finished within `seconds` of the start."""
        return hypervolume((one.refusals, one.kl) for one in self.points if one.seconds <= seconds)

    def first_edit(self, most_kl: float = float("inf")) -> float | None:
        """Return the seconds to the first trial with few refusals and at most this KL, None if there is none."""
        found = (one.seconds for one in self.points if one.refusals <= FEW_REFUSALS and one.kl <= most_kl)
        return min(found, default=None)

    def least_kl(self, seconds: float = float("inf")) -> float | None:
        """Return the lowest KL of the trials with few refusals finished within `seconds`, None without any."""
        found = (one.kl for one in self.points if one.refusals <= FEW_REFUSALS and one.seconds <= seconds)
        return min(found, default=None)


class PeakMemory:
    """Measures the resident memory of all child processes within a context."""

    def __init__(self) -> None:
        self.bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        own = psutil.Process()
        while not self._over.wait(SAMPLE_SECONDS):
            held = 0
            for process in own.children(recursive=True):
                try:
                    held += process.memory_info().rss
                except psutil.Error:
                    continue  # it has ended
            self.bytes = max(self.bytes, held)


@dataclass(frozen=True)
class Search:
    """A search's finished trials, in order, and its seconds."""

    points: tuple[Point, ...]
    seconds: float


# --- the runs -------------------------------------------------------------------------------------------


def run_this(
    task: Task, conditions: Conditions, seed: int, folder: Path, *, show: bool, command: Sequence[str] = COMMAND
) -> Search:
    """Run this tool in a folder, from its command to its export, and return its search.

    Args:
        task: The inputs.
        conditions: The conditions.
        seed: Of the search.
        folder: Folder of the job; created.
        show: Whether its output goes to the terminal.
        command: The command without its arguments.
    """
    folder.mkdir(parents=True)
    words = [str(task.model), "--workspace", str(folder / "jobs"), "--trials", str(task.trials), "--seed", str(seed)]
    for name, file in task.sets.items():
        words += [f"--{name.replace('_', '-')}-prompts", str(file)]
    for assignment in conditions.settings:
        words += ["--set", assignment]
    if conditions.tokens != default_values()["scoring"]["answer_tokens"]:
        words += ["--set", f"scoring.answer_tokens={conditions.tokens}"]
    print(shlex.join(["abliterate", "run", *words]), flush=True)
    log, began = folder / "log", time.time()
    with log.open("wb") as output:
        streams: dict[str, Any] = {} if show else {"stdout": output, "stderr": output}
        code = subprocess.run(
            [*command, "run", *words], env=environment(**threads(task)), timeout=task.longest_s, **streams
        ).returncode
    if code != 0:
        raise failed(THIS, f"exit code {code}", log)
    if not list((only_job(folder / "jobs") / "export").glob("*.safetensors")):
        raise failed(THIS, "the export is missing", log)
    asked = len(task.sets["bad_eval"].read_text().splitlines())
    told = events(folder / "jobs")
    (start,) = [event["time"] for event in told if event["event"] == "search_started"]
    trials = [event for event in told if event["event"] == "trial"]
    points = tuple(
        Point(event["time"] - began, event["refusals"] / asked, min(event["kl"], 1.0))
        for event in trials
        if event["reason"] is None
    )
    return Search(points, trials[-1]["time"] - start)


def run_heretic(command: Path, task: Task, seed: int, folder: Path) -> Search:
    """Run heretic in a folder, from its command to its export, and return its search."""
    began = time.time()
    outcome = run_peer(command, task, seed, folder)
    ended = [(trial.datetime_complete, trial) for trial in study_trials(folder)]
    points = tuple(Point(end.timestamp() - began, *point(trial)) for end, trial in ended if end is not None)
    return Search(points, outcome.trial_s * task.trials)


def measured(tool: str, seed: int, conditions: Conditions, run: Callable[[], Search]) -> Run:
    """Run a tool and return its figures."""
    began = time.perf_counter()
    with PeakMemory() as memory:
        search = run()
    job_s = time.perf_counter() - began
    return Run(tool, seed, conditions, search.points, search.seconds, job_s, memory.bytes, os.getloadavg()[0])


# --- earlier runs ---------------------------------------------------------------------------------------


class Record:
    """The JSON file of finished runs."""

    def __init__(self, file: Path) -> None:
        self._file = file
        kept = json.loads(file.read_text()) if file.exists() else {}
        self.runs = [Run.parsed(run) for run in kept.get("runs", [])]
        self._about = {key: value for key, value in kept.items() if key != "runs"}

    def find(self, tool: str, seed: int, conditions: Conditions) -> Run | None:
        """Return the run with these conditions, None if there is none."""
        wanted = (tool, seed, conditions)
        return next((run for run in self.runs if (run.tool, run.seed, run.conditions) == wanted), None)

    def add(self, run: Run, **about: Any) -> None:
        """Store a run with its figures."""
        self.runs.append(run)
        self._about |= about
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps({**self._about, "runs": [asdict(run) for run in self.runs]}, indent=1) + "\n")
        partial.replace(self._file)


# --- the table ------------------------------------------------------------------------------------------


def table(groups: dict[str, list[Run]], minutes: Sequence[float]) -> list[str]:
    """Return a Markdown table: a row per figure, a column per tool, medians over seeds.

    Args:
        groups: The runs of each tool.
        minutes: Times after the command at which fronts are compared.
    """
    columns = [(tool, runs) for tool, runs in groups.items() if runs]

    def row(title: str, figure: Callable[[Run], float | None], form: str) -> str:
        return " | ".join([f"| {title}", *(_median(map(figure, runs), form) for _, runs in columns)]) + " |"

    def trials_of(seconds: float) -> Callable[[Run], float]:
        return lambda run: sum(one.seconds <= seconds for one in run.points)

    lines = [" | ".join(["| ", *(tool for tool, _ in columns)]) + " |", "|---|" + "---:|" * len(columns)]
    few = f"≤ {100 * FEW_REFUSALS:.0f} % refusals"
    lines.append(row(f"minutes to the first edit with {few}", lambda run: _minutes(run.first_edit()), ".1f"))
    usable = f"minutes to the first edit with {few} and KL ≤ {USABLE_KL:g}"
    lines.append(row(usable, lambda run: _minutes(run.first_edit(USABLE_KL)), ".1f"))
    for mark in minutes:
        after = f"after {mark:g} min"
        lines.append(row(f"lowest KL with {few} {after}", lambda run, mark=mark: run.least_kl(60 * mark), ".2g"))  # type: ignore[misc]
        lines.append(row(f"hypervolume {after}", lambda run, mark=mark: run.volume(60 * mark), ".3f"))  # type: ignore[misc]
        lines.append(row(f"trials {after}", trials_of(60 * mark), ".0f"))
    lines.append(row(f"lowest KL with {few} of the whole search", Run.least_kl, ".2g"))
    lines.append(row("hypervolume of the whole search", lambda run: run.volume(), ".3f"))
    lines.append(row("trials of the whole search", lambda run: len(run.points), ".0f"))
    lines.append(row("seconds a trial", lambda run: run.search_s / run.conditions.trials, ".1f"))
    lines.append(row("minutes of the whole job", lambda run: _minutes(run.job_s), ".1f"))
    lines.append(row("peak memory, GiB", lambda run: run.peak_bytes / 2**30, ".2f"))
    return lines


def _median(figures: Iterable[float | None], form: str) -> str:
    """Return the median of the runs that have a figure, and their number if some have none."""
    every = list(figures)
    known = [figure for figure in every if figure is not None]
    if not known:
        return "none"
    median = format(statistics.median(known), form)
    return median if len(known) == len(every) else f"{median} ({len(known)} of {len(every)} runs)"


def _minutes(seconds: float | None) -> float | None:
    return None if seconds is None else seconds / 60


def written(page: str, section: Sequence[str]) -> str:
    """Return a page with this section between its marks, or appended."""
    new = "\n".join([BEGIN, *section, END])
    if BEGIN not in page:
        return f"{page.rstrip()}\n\n{new}\n".lstrip()
    before, _, rest = page.partition(BEGIN)
    return before + new + rest.partition(END)[2]


def section(given: argparse.Namespace, groups: dict[str, list[Run]]) -> list[str]:
    """Return the section of a page: command, conditions, table and remaining differences."""
    first = next(runs[0] for runs in groups.values() if runs)
    command = ["python", "-m", "benchmarks.real", *(word for word in sys.argv[1:])]
    prompts = {kind: len(file.read_text().splitlines()) for kind, file in given.sets.items()}
    loads = ", ".join(f"{tool} {_median((run.load for run in runs), '.1f')}" for tool, runs in groups.items() if runs)
    return [
        "```sh",
        shlex.join(command),
        "```",
        "",
        f"SmolLM2-135M-Instruct on {os.cpu_count()} CPU cores, {first.conditions.threads} threads, seeds "
        f"{', '.join(map(str, given.seeds))}. Directions from {prompts['bad']} declined and {prompts['good']} ordinary "
        f"prompts; the search uses {prompts['bad_eval']} and {prompts['good_eval']} others. Responses have at most "
        f"{first.conditions.tokens} tokens. Times begin with the command. A tool whose search was over at a mark is "
        f"counted with its final front. Load at the end: {loads}.",
        "",
        *table(groups, given.minutes),
        "",
        "Not equal:",
        "",
        *(f"- {line}" for line in UNEQUAL.replace("\n  ", " ").splitlines()),
    ]


# --- the command ----------------------------------------------------------------------------------------


def inputs(given: argparse.Namespace) -> tuple[dict[str, Path], str]:
    """Return the prompt files, shortened on request, and the hash of model and prompts."""
    folder = given.runs / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    sets = prompt_sets(given.folder, folder)
    if given.prompts:
        for kind in list(sets):
            lines = sets[kind].read_text().splitlines(keepends=True)[: given.prompts]
            sets[kind] = (folder / f"{kind}-{given.prompts}.txt").resolve()
            sets[kind].write_text("".join(lines))
    found = hashlib.sha256((given.folder / "real-model.json").read_bytes())
    for kind, file in sorted(sets.items()):
        found.update(kind.encode() + file.read_bytes())
    return sets, found.hexdigest()


def check_system_prompt(model: Path) -> None:
    """Check that both tools render the same conversations, word for word."""
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    said: list[dict[str, str]] = [{"role": "user", "content": "Hello."}]
    plain, explicit = (
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in (said, [{"role": "system", "content": SYSTEM_PROMPT}, *said])
    )
    if plain != explicit:
        raise SystemExit("the model's template has another system prompt than the one heretic is given")


def options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/real-model"))
    parser.add_argument("--tools", type=lambda text: text.split(","), default=list(TOOLS))
    parser.add_argument("--trials", type=int, default=DEFAULT_TRIALS["gradient"], help="of this tool")
    parser.add_argument("--peer-trials", type=int, default=60, help="of heretic")
    parser.add_argument("--minutes", type=lambda text: [float(part) for part in text.split(",")], default=[10, 20, 40])
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=default_values()["scoring"]["answer_tokens"])
    parser.add_argument("--prompts", type=int, help="of each set, the first ones; unset: all")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of this tool")
    parser.add_argument("--show", action="store_true", help="leave this tool's output to the terminal")
    parser.add_argument("--hours", type=float, default=12.0, help="after which a run counts as hung")
    parser.add_argument("--env", type=Path, default=HERE / VERSION, help="heretic's environment, made if absent")
    parser.add_argument("--runs", type=Path, default=Path("runs/real"), help="where the runs are kept")
    parser.add_argument("--json", type=Path, help="by default results.json among the runs")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    given = parser.parse_args()
    if not set(given.tools) <= set(TOOLS):
        parser.error(f"--tools are of {','.join(TOOLS)}")
    return given


def main() -> None:
    """Make the missing runs and print the table."""
    given = options()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    write_real_model(given.folder, print)
    given.sets, hashed = inputs(given)
    model = (given.folder / "model").resolve()
    check_system_prompt(model)
    record = Record(given.json or given.runs / "results.json")
    peer_startup = min(60, given.peer_trials // 3)
    ways = {
        "this": (THIS, Conditions(hashed, given.trials, None, given.threads, given.tokens, tuple(given.set))),
        "heretic": (PEER, Conditions(hashed, given.peer_trials, peer_startup, given.threads, given.tokens, ())),
    }
    groups: dict[str, list[Run]] = {name: [] for name, _ in ways.values()}
    for seed in given.seeds:
        for tool in given.tools:
            name, conditions = ways[tool]
            found = record.find(name, seed, conditions)
            if found is None:
                found = made(given, tool, name, conditions, model, seed)
                about: dict[str, Any] = {"machine": platform.platform(), "cores": os.cpu_count()}
                about["this versions"] = {library: importlib.metadata.version(library) for library in LIBRARIES}
                if tool == "heretic":
                    about["heretic versions"] = versions(given.env)
                record.add(found, **about)
            else:
                print(f"{name}, seed {seed}: made before")
            groups[name].append(found)
    print("\n".join(table(groups, given.minutes)))
    print(UNEQUAL)
    if given.write:
        page = given.write.read_text() if given.write.exists() else ""
        given.write.write_text(written(page, section(given, groups)))


def made(given: argparse.Namespace, tool: str, name: str, conditions: Conditions, model: Path, seed: int) -> Run:
    """Make one run in its own folder."""
    key = hashlib.sha256(repr(conditions).encode()).hexdigest()[:8]
    folder = (given.runs / f"{tool}-{seed}-{key}").resolve()
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run: its times are meaningless
    longest = 3600 * given.hours
    task = Task(
        model,
        given.sets,
        conditions.trials,
        conditions.startup or 0,
        given.threads,
        given.tokens,
        SYSTEM_PROMPT,
        longest,
    )
    print(f"{name}, seed {seed}: {conditions.trials} trials in {folder}", flush=True)
    if tool == "this":
        return measured(name, seed, conditions, lambda: run_this(task, conditions, seed, folder, show=given.show))
    command = install(given.env.absolute())
    return measured(name, seed, conditions, lambda: run_heretic(command, task, seed, folder))


if __name__ == "__main__":
    main()
