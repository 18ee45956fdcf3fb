"""Run heretic as a process: in its own environment, driven by its settings file and its menus.

Nothing of it is imported here. How to drive it was read from its published package, version 1.4.0.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from job.config.load import default_values
from job.preflight.selftest import RATE_SECONDS
from job.search.convergence import hypervolume

PACKAGE, VERSION = "heretic-llm", "1.4.0"
PEER = f"heretic {VERSION}"
LIBRARIES = ("torch", "transformers", "optuna", "peft", "tokenizers")
# The largest batch that heretic's own tuner tries; set, so that it need not tune.
PEER_ROWS = 128
SYSTEM_PROMPT = "You are a helpful assistant."
LONGEST_S = 3600.0
# Menu choices after heretic's search, in order.
MENUS = ("[Trial", "Save the model to a local folder", "", "Return to the trial selection menu", "Exit program")


@dataclass(frozen=True)
class Task:
    """Inputs of both tools.

    Attributes:
        model: Folder of the model.
        sets: A file for each prompt set.
        tokens: Maximum response length.
        system: System prompt; heretic requires one.
        longest_s: Timeout of a run, seconds.
    """

    model: Path
    sets: dict[str, Path]
    trials: int
    startup: int
    threads: int
    tokens: int
    system: str = SYSTEM_PROMPT
    longest_s: float = LONGEST_S


@dataclass(frozen=True)
class Outcome:
    """Result of one run.

    Attributes:
        trial_s: Seconds per trial, over the search alone.
        job_s: Seconds from the command to its end, with the model exported.
        volume: Hypervolume of the Pareto front, see `job.search.convergence.hypervolume`.
        fewest: The lowest refusal rate.
    """

    tool: str
    seed: int
    trial_s: float
    job_s: float
    volume: float
    fewest: float


def install(env: Path) -> Path:
    """Return heretic's command in its own environment, installed if absent."""
    command, mark = env / "bin" / "heretic", env / f"{PACKAGE}-{VERSION}"
    if mark.exists():
        return command
    print(f"installing {PACKAGE} {VERSION} in {env}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
    # Exactly the build that this project uses: a pin without its +cpu could resolve to gigabytes of CUDA.
    pin = env / "pin.txt"
    pin.write_text(f"torch=={importlib.metadata.version('torch')}\n")
    pip = [str(env / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", "-c", str(pin)]
    subprocess.run([*pip, f"{PACKAGE}=={VERSION}"], check=True)
    subprocess.run([str(command), "--help"], check=True, stdout=subprocess.DEVNULL)  # load its libraries once
    mark.touch()
    return command


def versions(env: Path) -> dict[str, str]:
    """Return the versions of heretic's libraries."""
    code = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    found = json.loads(subprocess.check_output([str(env / "bin" / "python"), "-c", code]))
    return {name: found[name] for name in LIBRARIES}


def toml(values: dict[str, Any]) -> str:
    """Return settings as TOML; tables must come last."""
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += [f"[{name}]", *(f"{key} = {json.dumps(item)}" for key, item in value.items())]
        else:
            lines.append(f"{name} = {json.dumps(value)}")
    return "\n".join(lines) + "\n"


def failed(tool: str, why: str, log: Path) -> SystemExit:
    """Return the exception that ends the benchmark."""
    return SystemExit(f"{tool}: {why}; the end of {log}:\n{log.read_text(errors='replace')[-3000:]}")


def threads(task: Task) -> dict[str, str]:
    """Return the environment variables that set the number of threads, and this tool's usual time for its probes."""
    count = str(task.threads)
    return {"OMP_NUM_THREADS": count, "RAYON_NUM_THREADS": count, "ABLITERATE_PROBE_SECONDS": str(RATE_SECONDS)}


def run_peer(command: Path, task: Task, seed: int, folder: Path) -> Outcome:
    """Run heretic in a folder, from its command to an exported model."""
    folder.mkdir(parents=True)
    sets = {"good_prompts": "good", "bad_prompts": "bad"}
    sets |= {"good_evaluation_prompts": "good_eval", "bad_evaluation_prompts": "bad_eval"}
    values = {
        **{
            "model": str(task.model),
            "dtypes": ["float32"],
            "batch_size": PEER_ROWS,
            "max_response_length": task.tokens,
        },
        **{"response_prefix": "", "system_prompt": task.system, "seed": seed, "export_strategy": "merge"},
        **{"n_trials": task.trials, "n_startup_trials": task.startup, "study_checkpoint_dir": "study"},
        **{"row_normalization": "none", "orthogonalize_direction": False},
        "refusal_markers": default_values()["scoring"]["refusal_markers"],
        **{name: {"dataset": str(task.sets[own])} for name, own in sets.items()},
    }
    (folder / "config.toml").write_text(toml(values))
    log, export = folder / "log", folder / "export"
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HERETIC_", "PYTHONPATH"))}
    # With this variable its menus are numbered lines, meant for notebooks, instead of a terminal's.
    own |= {**threads(task), "HF_HUB_OFFLINE": "1", "COLAB_GPU": "1", "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
    began = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(command)], cwd=folder, env=own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            answer_menus(process, output, [part or str(export) for part in MENUS], began + task.longest_s)
            code = process.wait(60)
        except Exception as error:
            raise failed(PEER, str(error), log) from error
        finally:
            process.kill()
    took = time.perf_counter() - began
    if code != 0 or not list(export.glob("*.safetensors")):
        raise failed(PEER, f"exit code {code}, or no export", log)
    trials = study_trials(folder)
    if len(trials) != task.trials or not all(trial.state == optuna.trial.TrialState.COMPLETE for trial in trials):
        raise failed(PEER, "trials are missing", log)
    begins, ends = [t.datetime_start for t in trials], [t.datetime_complete for t in trials]
    searched = max(end for end in ends if end) - min(begin for begin in begins if begin)
    points = [point(trial) for trial in trials]
    return Outcome(PEER, seed, searched.total_seconds() / task.trials, took, hypervolume(points), min(points)[0])


def study_trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    """Return the trials of the run in a folder."""
    (journal,) = (folder / "study").glob("*.jsonl")
    (study,) = optuna.get_all_study_names(storage := JournalStorage(JournalFileBackend(str(journal))))
    return optuna.load_study(study_name=study, storage=storage).trials


def point(trial: optuna.trial.FrozenTrial) -> tuple[float, float]:
    """Return a finished trial's refusal rate and KL divergence, capped at 1."""
    known = trial.user_attrs
    return known["refusals"] / known["n_bad_prompts"], min(known["kl_divergence"], 1.0)


def answer_menus(process: subprocess.Popen[bytes], log: Any, answers: list[str], until: float) -> None:
    """Log a process's output and answer its questions, choosing the first menu entry that contains the answer.

    Raises:
        ValueError: An unexpected question or a timeout.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    said, left = "", list(answers)
    while select.select([process.stdout], [], [], max(until - time.perf_counter(), 0))[0]:
        new = os.read(process.stdout.fileno(), 1 << 16)
        if not new:
            if left:
                raise ValueError(f"ended before it asked for {left[0]!r}")
            return
        log.write(new)
        log.flush()
        said += new.decode(errors="replace")
        if not said.endswith(("Enter number: ", "folder:: ", "folder: ")):
            continue
        if not left:
            raise ValueError("asks more than expected")
        answer = left.pop(0)
        if said.endswith("Enter number: "):
            entries = re.findall(r"^\[(\d+)\] (.*)$", said, re.MULTILINE)
            numbers = [number for number, title in entries if answer in title]
            if not numbers:
                raise ValueError(f"a menu without {answer!r}")
            answer = numbers[0]
        process.stdin.write(f"{answer}\n".encode())
        process.stdin.flush()
        said = ""
    raise ValueError("takes too long")
