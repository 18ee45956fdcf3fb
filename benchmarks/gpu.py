"""What only a GPU can show, in one sitting: correctness first, then speed against the device's ceilings.

python -m benchmarks.gpu [--minutes 8] [--device cuda] [--shape NAME] [--parts NAME ...] [--json FILE]
python -m benchmarks.gpu --device cpu --shape tiny

Parts are ordered by value, and each has its own time limit, in proportion to --minutes. The JSON is written after each
part, so a run that is killed leaves what it has. Each subject has a process of its own: the organism, a job on it, and
random models with the shapes of real ones, made on the device without files. A part that takes too long or ends its
process is reported, and a new process goes on with the next part. --shape replaces all shapes of models. Nothing is
downloaded; the organism lies in tests/fixtures.

Correctness, in each dtype:
  padding   logits of padded batches against each prompt alone, in standard deviations of the logits
  caches    responses with a KV cache, and with a shared prefix, against the whole row recomputed for every token
  hooks     logits under an edit's hooks against those of edited weights
  job       a whole job by the command line; its export is loaded afresh and compared
  resume    the same job, killed during the search and started again: same trials, same bytes of the export
Speed, beside the lower bound by the ceilings (benchmarks/roofline.py), in bfloat16:
  ceilings  matrix products and memory bandwidth
  residuals 800 prompts, and their mean difference
  trials    a batch of trials, by parts: prefill, decoding, hooks, matching and the host's rest; whether a second
            evaluation gives the same scores; peak memory against the plan
  gradient  a step on 24 + 24 prompts
  switching activating edits, in three norm modes
  solver    contrastive PCA of all layers, 400 + 400 prompts
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
# Minutes for which the limits below are meant.
MINUTES = 8.0
# A part is not begun with less left, in seconds.
LEAST = 2.0


@dataclass(frozen=True)
class Plan:
    """What one process does.

    Attributes:
        subject: The organism, a job, or a shape of `benchmarks.random_models`.
        limits: Seconds of each part, in order; the first includes the start of the process and the model.
    """

    subject: str
    limits: dict[str, float]


_CORRECT = {"padding": 40.0, "caches": 20.0, "hooks": 20.0}
_FAST = {"residuals": 70.0, "trials": 60.0, "gradient": 30.0, "switching": 30.0}


def plans(shape: str | None) -> list[Plan]:
    """Return all parts by value; `shape` replaces the shapes of models."""
    small, large, middle = (shape,) * 3 if shape else ("0.5B", "32B", "7B")
    found = [
        Plan(large, {"ceilings": 40.0}),
        Plan("organism", dict(_CORRECT)),
        Plan(small, dict(_CORRECT)),
        Plan(large, dict(_FAST)),
        Plan(large, {"solver": 30.0}),
        Plan("job", {"job": 90.0, "resume": 90.0}),
    ]
    return found if shape else [*found, Plan(middle, dict(_FAST))]


class Child:
    """A process that computes parts and writes a line of JSON about each."""

    def __init__(self, words: Sequence[str], log: IO[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_parts", *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # so that what it starts is stopped with it
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def next(self, seconds: float) -> dict[str, Any]:
        """Return the next part's result, or what became of the process."""
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            return {"error": f"stopped after {seconds:.0f} s", "ended": True}
        if line is None:
            return {"error": f"its process ended with exit code {self._process.wait()}", "ended": True}
        found: dict[str, Any] = json.loads(line)
        return found

    def stop(self) -> None:
        """End the process and all that it has started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextmanager
def started(words: Sequence[str]) -> Iterator[Child]:
    """Yield a child, whose errors are shown if it ends before its time."""
    with tempfile.TemporaryFile("w+") as log:
        child = Child(words, log)
        try:
            yield child
        finally:
            child.stop()


def results(plan: Plan, device: str, deadline: float) -> Iterator[dict[str, Any]]:
    """Yield the result of each part of a plan; a new process goes on after one that had to be stopped."""
    waiting = list(plan.limits)
    while waiting:
        if deadline - time.monotonic() < LEAST:
            yield from ({"subject": plan.subject, "part": name, "left_out": "no time is left"} for name in waiting)
            return
        with started([plan.subject, device, *waiting]) as child:
            while waiting and deadline - time.monotonic() >= LEAST:
                name, begun = waiting.pop(0), time.monotonic()
                found = child.next(min(plan.limits[name], deadline - begun))
                yield {"subject": plan.subject, "part": name, "seconds": time.monotonic() - begun, **found}
                if found.get("ended"):
                    break


def said(result: dict[str, Any]) -> str:
    """Return a result in one line."""
    for key in ("error", "left_out", "summary"):
        if key in result:
            return str(result[key])
    return ""


def write(file: Path, figures: dict[str, Any]) -> None:
    """Write figures atomically: a run may be killed at any time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(figures, indent=1) + "\n")
    partial.replace(file)


def main() -> None:
    """Run the parts, print a line about each, and write all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for all parts")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", help="replaces the shapes of models: tiny, 0.5B, 7B, 32B or MoE")
    parser.add_argument("--parts", nargs="+", help="compute only these")
    parser.add_argument("--json", type=Path, default=Path("runs/gpu.json"))
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a part's processes end with this one
    scale, deadline = given.minutes / MINUTES, time.monotonic() + 60 * given.minutes
    figures: dict[str, Any] = {"device": given.device, "minutes": given.minutes, "results": []}
    write(given.json, figures)
    for plan in plans(given.shape):
        limits = {
            name: scale * seconds for name, seconds in plan.limits.items() if name in (given.parts or plan.limits)
        }
        for result in results(Plan(plan.subject, limits), given.device, deadline):
            figures["results"].append(result)
            write(given.json, figures)
            took = result.get("seconds", 0.0)
            print(f"{result['subject']:>9} {result['part']:>10} {took:7.1f} s  {said(result)}", flush=True)
    print(f"figures: {given.json}")
    failed = [one for one in figures["results"] if "error" in one or one.get("wrong")]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
