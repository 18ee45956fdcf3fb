"""Compare with heretic, the published tool of this kind: seconds per trial, whole jobs, and quality of the trials.

python -m benchmarks.peer [ORGANISM] [--trials 200] [--rounds 3] [--threads 2] [--json FILE]
python -m benchmarks.peer [ORGANISM] --widen 256x12 --tokens 48 [--rounds 1]

heretic-llm is installed from PyPI into its own environment and runs only as a process, driven by its settings file and
its menus. Both tools alternate with equal organism, prompts, refusal markers, response length and threads. Each round
has a new seed. This tool runs with its defaults (gradient descent, its own number of trials), and by TPE with heretic's
numbers of trials and start-up trials, in its own search space and in the field's. Workers and batches are what the job
chooses, unless --workers, --together and --ahead say otherwise. With --widen the organism is embedded in a larger model
without an end token: the same responses, all at full length. Remaining differences are printed with the table. A failed
run ends the benchmark and its output is kept.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import optuna

from benchmarks.heretic import (
    LIBRARIES,
    LONGEST_S,
    PEER,
    PEER_ROWS,
    SYSTEM_PROMPT,
    VERSION,
    Outcome,
    Task,
    failed,
    install,
    run_peer,
    threads,
    toml,
    versions,
)
from benchmarks.widened import widened
from job.organism.folder import write_organism
from job.search.convergence import hypervolume
from job.search.study import read_trials
from tests.helpers import COMMAND, environment, events, only_job

HERE = Path.home() / ".cache" / "abliteration-job" / "peer"
DEFAULT, WIDE, FIELD = "this, defaults", "this, TPE", "this, TPE, field's"
METHODS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    WIDE: {"method": "tpe", "space": "wide"},
    FIELD: {"method": "tpe", "space": "field"},
}
UNEQUAL = f"""\
not equal: heretic evaluates trials one by one and finishes every answer of a batch; this one evaluates some together
  and stops an answer once a marker has matched, with the same count of refusals; in the search its answers have 30
  tokens at most, and the chosen trials are scored again in full.
not equal: this one drops a trial after a tenth of its prompts where an earlier one is certainly no worse; heretic's
  trials answer all prompts.
not equal: by default this tool descends by gradient before its trials; s/trial leaves the descent out.
not equal: heretic's sampler minimises scores of its own; this one's refusals and KL. Both volumes are of
  refusals and KL.
not equal: in the field's space this one's MLP weights are from -0.25 to 1.5, heretic {VERSION}'s from 0.8 to 1.5.
not equal: the last layer's direction is heretic's after the model's final norm, this one's before it.
not equal: this one's job also answers and reports prompts that the search has not seen, loads its export again to
  prove it, and writes report and card; heretic saves its Pareto trial of fewest refusals, and proves nothing.
in heretic's favour: its batch of {PEER_ROWS} is given, so that it need not tune.
equal, and not heretic's defaults: no norms of rows are kept, directions are plain differences of means, no common
  beginning of answers is looked for.
each tool has the library versions that it asks for: see the JSON."""


def run_this(task: Task, seed: int, folder: Path, tool: str, layout: dict[str, dict[str, int]]) -> Outcome:
    """Run this tool in a folder, from its command to an exported model.

    Args:
        task: Inputs of both tools.
        seed: Of the search.
        folder: Folder of the job; created.
        tool: One of `METHODS`.
        layout: Settings of workers and batches, "job" and "search"; the job chooses the others.
    """
    folder.mkdir(parents=True)
    kinds = ("good", "bad", "good_eval", "bad_eval", "good_report", "bad_report")
    trials = {} if tool == DEFAULT else {"trials": task.trials, "startup_trials": task.startup}
    loading = {} if tool == DEFAULT else {"dtypes": ["float32"], "response_prefix": ""}
    values = {
        **{"seed": seed, "workspace": str(folder / "jobs")},
        **trials,
        **layout["job"],
        **{f"{kind}_prompts": {"spec": str(task.sets[kind]), "system_prompt": SYSTEM_PROMPT} for kind in kinds},
        "loading": {"device": "cpu", **loading},
        "scoring": {"answer_tokens": task.tokens},
        "search": METHODS[tool] | layout["search"],
    }
    (folder / "config.toml").write_text(toml(values))
    log = folder / "log"
    began = time.perf_counter()
    with log.open("wb") as output:
        code = subprocess.run(
            [*COMMAND, "run", str(task.model), "--config", str(folder / "config.toml")],
            **{"env": environment(**threads(task)), "stdout": output, "stderr": output, "timeout": LONGEST_S},
        ).returncode
    took = time.perf_counter() - began
    if code != 0:
        raise failed(tool, f"exit code {code}", log)
    job = only_job(folder / "jobs")
    (begin,) = [event["time"] for event in events(folder / "jobs") if event["event"] == "search_started"]
    ends = [event["time"] for event in events(folder / "jobs") if event["event"] == "trial"]
    if len(ends) != trials.get("trials", len(ends)) or not list((job / "export").glob("*.safetensors")):
        raise failed(tool, "trials or the export are missing", log)
    count = len(task.sets["bad_eval"].read_text().splitlines())
    found = [trial.values for trial in read_trials(job / "study.db") if trial.values.reason is None]
    points = [(values.refusals / count, min(values.kl, 1.0)) for values in found]
    return Outcome(tool, seed, (ends[-1] - begin) / len(ends), took, hypervolume(points), min(points)[0])


def prompt_sets(organism: Path, folder: Path) -> dict[str, Path]:
    """Return a file for each prompt set; the search gets the first half of the test prompts."""
    found = {}
    for kind in ("good", "bad"):
        found[kind] = organism / f"{kind}_train.txt"
        lines = (organism / f"{kind}_test.txt").read_text().splitlines(keepends=True)
        half = len(lines) // 2
        for name, part in ((f"{kind}_eval", lines[:half]), (f"{kind}_report", lines[half:])):
            found[name] = folder / f"{name}.txt"
            found[name].write_text("".join(part))
    return {name: path.resolve() for name, path in found.items()}


def summary(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """Return each tool's medians and their ratio to heretic's."""
    tools = {tool: [outcome for outcome in outcomes if outcome.tool == tool] for tool in (PEER, *METHODS)}
    rows = []
    for tool, runs in tools.items():
        trial, job = (statistics.median([getattr(run, name) for run in runs]) for name in ("trial_s", "job_s"))
        volumes = [run.volume for run in runs]
        rows.append(
            {
                **{"tool": tool, "trial_s": trial, "trials_per_s": 1 / trial, "job_s": job},
                "volume": statistics.median(volumes),
                "volume_mean": statistics.mean(volumes),
                "volume_error": statistics.stdev(volumes) / len(volumes) ** 0.5 if len(volumes) > 1 else None,
                "fewest": statistics.median([run.fewest for run in runs]),
            }
        )
    return [row | {f"{key}_ratio": rows[0][f"{key}_s"] / row[f"{key}_s"] for key in ("trial", "job")} for row in rows]


def show(rows: list[dict[str, Any]]) -> None:
    """Print the medians."""
    print("medians; the hypervolume also as mean ± standard error; fewest: least share of refusals in a search")
    print(f"{'tool':>20} {'s/trial':>8} {'trials/s':>9} {'ratio':>7} {'job s':>7} {'ratio':>7} {'volume':>7} fewest")
    for row in rows:
        error = "" if row["volume_error"] is None else f" ± {row['volume_error']:.4f}"
        print(
            f"{row['tool']:>20} {row['trial_s']:8.3f} {row['trials_per_s']:9.2f} {row['trial_ratio']:6.1f}× "
            f"{row['job_s']:7.1f} {row['job_ratio']:6.1f}× {row['volume']:7.4f} {row['fewest']:.2f}   "
            f"{row['volume_mean']:.4f}{error}"
        )
    print(UNEQUAL)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("organism", nargs="?", type=Path, default=Path("runs/organism"))
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=100, help="longest answer")
    parser.add_argument("--workers", type=int, help="this tool's processes")
    parser.add_argument("--together", type=int, help="trials that a process of this tool evaluates at once")
    parser.add_argument("--ahead", type=int, help="this tool's search.ahead")
    parser.add_argument("--widen", metavar="WIDTHxLAYERS", help="size of a larger model to put the organism into")
    parser.add_argument("--env", type=Path, default=HERE / VERSION, help="heretic's environment, made if absent")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if not (given.organism / "organism.json").exists():
        write_organism(given.organism, arch="llama", size="tiny", seed=0, report=print)
    command = install(given.env.absolute())
    folder = Path(tempfile.mkdtemp(prefix="peer-"))
    startup = min(60, given.trials // 3)
    sets = prompt_sets(given.organism, folder)
    model = (given.organism / "model").resolve()
    if given.widen:
        model = widened(model, folder / "model", *map(int, given.widen.split("x")))
    task = Task(model, sets, given.trials, startup, given.threads, given.tokens)
    print(f"{given.trials} trials, {startup} of them random, {given.threads} threads; runs are kept in {folder}")
    layout = {
        "job": {"workers": given.workers} if given.workers else {},
        "search": {} if given.ahead is None else {"ahead": given.ahead},
    }
    if given.together:
        layout["job"]["trials_per_batch"] = given.together * (given.workers or 1)
    outcomes: list[Outcome] = []
    for seed in range(given.rounds):
        at = folder / str(seed)
        turns: list[Callable[[], Outcome]] = [
            partial(run_peer, command, task, seed, at / "heretic"),
            *(partial(run_this, task, seed, at / str(number), tool, layout) for number, tool in enumerate(METHODS)),
        ]
        for turn in turns if seed % 2 == 0 else reversed(turns):
            outcome = turn()
            outcomes.append(outcome)
            print({key: round(v, 4) if isinstance(v, float) else v for key, v in asdict(outcome).items()}, flush=True)
    rows = summary(outcomes)
    show(rows)
    if given.json:
        own = {name: importlib.metadata.version(name) for name in LIBRARIES}
        record = {
            **{"trials": task.trials, "startup_trials": startup, "threads": task.threads, "tokens": task.tokens},
            "layout": layout,
            **{"machine": platform.platform(), "cores": os.cpu_count(), "load": os.getloadavg()},
            **{"versions": {PEER: versions(given.env), "this": own}, "medians": rows},
            **{"runs": [asdict(outcome) for outcome in outcomes], "not equal": UNEQUAL.splitlines()},
        }
        given.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
