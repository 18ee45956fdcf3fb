"""Kill a whole job with SIGKILL repeatedly, compare its result byte for byte and measure the cost of each kill.

python -m benchmarks.chaos [ORGANISM] [--kills 50] [--seed 0] [--trials 24]
python -m benchmarks.chaos [ORGANISM] --runners 20

The job is mirrored to S3 (moto's server on the loopback) and delivered to S3 and to a folder. Starts after a kill
alternate between the same workspace and an empty one. The latter run in a PID namespace of their own where Linux allows
it. As on another machine, they cannot see that the previous runner is dead and wait until its lease expires. Half of
the kills come at a random time, half target the phase with the fewest kills so far. A job that ends before all kills
are used is compared with an uninterrupted one, and a new job starts elsewhere. With --runners two runners start at
once, that number of times in one workspace and in two with one mirror: on a fresh job, on one whose runner was killed,
and in separate PID namespaces.

Exits with 1 on any difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import psutil

from job.errors import HeldError
from job.mirror.options import PACE
from job.storage.events import read_events
from tests.fakes.s3_server import BUCKET, KEY_ID, SECRET, S3Server
from tests.helpers import COMMAND, abliterate, environment, job_arguments, only_job, stored_trials

# A run in its own PID namespace; it dies with its parent.
APART = ["unshare", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc"]
# The first phase begins with the process, the others with an event.
FIRST = "first seconds"
PHASES = {
    FIRST: "",
    "preflight": "job_started",
    "model": "architecture",
    "residuals": "residuals_started",
    "baseline": "directions",
    "search": "search_started",
    "export": "export_started",
    "proof": "export_proven",
    "delivery": "delivery_started",
}
# Preflight writes this object to test a target.
PROBE = ".abliterate-probe-"
# Seconds: heartbeat, takeover after silence, between snapshots, between lease polls.
SPEED = (0.5, 3.0, 0.2, 0.2)
_LOOK_S = 0.01
_LONGEST_S = 600.0


def credentials() -> dict[str, str]:
    """Return the environment of all runs."""
    return {
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        PACE: ",".join(map(str, SPEED)),
    }


def can_be_apart() -> bool:
    """Return whether runs in their own PID namespace are possible here."""
    try:
        return subprocess.run([*APART, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


class Run:
    """A started run.

    Attributes:
        latest: The most recent runs, killed when this process ends.
        begun: Start time, by the clock of the event log.
    """

    latest: ClassVar[deque[Run]] = deque(maxlen=2)

    def __init__(self, arguments: list[str], log: Path, *, apart: bool) -> None:
        self._log = log
        command = [*(APART if apart else []), *COMMAND, "run", *arguments]
        self.begun = time.time()
        with log.open("ab") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output, env=environment(**credentials()))
        self.latest.append(self)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.time() - self.begun

    @property
    def code(self) -> int | None:
        """Exit code, None while it runs."""
        if self.seconds > _LONGEST_S and self._process.poll() is None:
            self.kill()
            raise SystemExit(f"hangs: {self._log.read_text()[-3000:]}")
        return self._process.poll()

    def wait(self) -> int:
        """Return its exit code."""
        while (code := self.code) is None:
            time.sleep(_LOOK_S)
        return code

    def kill(self) -> bool:
        """Send SIGKILL, wait for the exit, and return whether the signal ended it."""
        if self._process.returncode is not None:
            return self._process.returncode < 0
        try:
            family = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        self._process.kill()
        psutil.wait_procs(family, timeout=10)
        return self._process.wait() < 0

    def told(self, workspace: Path) -> list[dict[str, Any]]:
        """Return the events of this start."""
        files = list(workspace.glob("*/events.jsonl"))
        try:
            return [event for file in files for event in read_events(file) if event["time"] >= self.begun]
        except FileNotFoundError:
            return []  # still being restored


def phase_of(events: list[dict[str, Any]]) -> str:
    """Return the current phase, from a start's events."""
    names = {event: name for name, event in PHASES.items() if event}
    return ([FIRST] + [names[event["event"]] for event in events if event["event"] in names])[-1]


@dataclass
class Places:
    """Where one job runs, is mirrored and is delivered."""

    root: Path
    name: str
    server: S3Server
    number: int = 0

    @property
    def workspace(self) -> Path:
        """The current workspace."""
        return self.root / self.name / f"workspace-{self.number}"

    @property
    def log(self) -> Path:
        """The output of all runs."""
        return self.root / self.name / "log"

    def start(self, job: list[str], *, apart: bool = False, number: int | None = None) -> Run:
        """Start a run here, in the current workspace or in another."""
        self.number = self.number if number is None else number
        self.log.parent.mkdir(exist_ok=True)
        here = [
            *("--workspace", str(self.workspace), "--checkpoint", f"s3://{BUCKET}/{self.name}/mirror"),
            *("--upload", f"s3://{BUCKET}/{self.name}/model"),
            *("--upload", (self.root / self.name / "delivered").as_uri()),
            *("--set", f"s3.endpoint={self.server.url}", "--set", "s3.addressing_style=path"),
        ]
        return Run([*job, *here], self.log, apart=apart)

    def move(self) -> None:
        """Abandon the workspace; the next one is empty."""
        shutil.rmtree(self.workspace, ignore_errors=True)
        self.number += 1

    def fetched(self) -> int:
        """Return the bytes of snapshots downloaded from the mirror."""
        return sum(size for key, size in self.server.front.given if key.startswith(f"{self.name}/mirror/"))

    def probes(self) -> int:
        """Return the number of leftover probe objects, which are not part of the delivery."""
        return sum(f"/{PROBE}" in name for name in self.server.contents(f"{self.name}/"))

    def result(self) -> dict[str, Any]:
        """Return everything that must be equal: local and mirrored trials, the choice, the delivery and the export."""
        job = only_job(self.workspace)
        contents = {
            key.removeprefix(f"{self.name}/"): data for key, data in self.server.contents(f"{self.name}/").items()
        }
        objects = {name.removeprefix("model/"): data for name, data in contents.items() if name.startswith("model/")}
        objects = {name: data for name, data in objects.items() if not name.startswith(PROBE)}
        files = {path.name: path.read_bytes() for path in (self.root / self.name / "delivered").iterdir()}
        # A workspace restored after the delivery has no export.
        exported = {path.name: path.read_bytes() for path in (job / "export").glob("[!.]*")} or objects
        state = json.loads((job / "state.json").read_text())
        head = json.loads(contents[f"mirror/{job.name}/head.json"])
        with tempfile.TemporaryDirectory() as place:
            copy = Path(place) / "job"
            copy.mkdir()
            for name in ("job.json", "study.db"):
                (copy / name).write_bytes(contents[f"mirror/{job.name}/objects/{head['files'][name]['object']}"])
            mirrored = stored_trials(Path(place))
        return {
            "state": (state["state"], state["chosen"]),
            "trials": stored_trials(self.workspace),
            "mirrored trials": mirrored,
            "export": _sums(exported),
            "delivery to S3": _sums(objects),
            "delivery to a folder": _sums(files),
            "manifest": json.loads(objects["manifest.json"]),
        }


def _sums(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}


@dataclass
class Reference:
    """Result of an uninterrupted run.

    Attributes:
        seconds: Its duration.
        lengths: Duration of each phase.
        result: What every other run must produce.
    """

    seconds: float
    lengths: dict[str, float]
    result: dict[str, Any]


def uninterrupted(job: list[str], places: Places) -> Reference:
    """Run the job to its end."""
    run = places.start(job)
    if run.wait() != 0:
        raise SystemExit(places.log.read_text())
    seconds, begins = run.seconds, {FIRST: run.begun}
    for event in run.told(places.workspace):
        for phase, name in PHASES.items():
            if event["event"] == name:
                begins.setdefault(phase, event["time"])
    ends = [*list(begins.values())[1:], run.begun + seconds]
    lengths = {phase: end - begin for (phase, begin), end in zip(begins.items(), ends, strict=True)}
    return Reference(seconds, lengths, places.result())


@dataclass
class Tally:
    """Totals over all kills."""

    planned: int
    kills: Counter[str] = field(default_factory=Counter)
    restarts: Counter[str] = field(default_factory=Counter)
    fetched: dict[str, list[int]] = field(default_factory=lambda: {"same": [], "empty": []})
    ran: float = 0.0
    evaluated: int = 0
    rounds: int = 0
    probes: int = 0
    differences: list[str] = field(default_factory=list)


class Moment:
    """When to kill a start: this many seconds after the start, or after a phase begins."""

    def __init__(self, dice: random.Random, reference: Reference, kills: Counter[str]) -> None:
        aims = list(reference.lengths)[1:]
        fewest = min(kills[phase] for phase in aims)
        aim = dice.choice([phase for phase in aims if kills[phase] == fewest])
        self._phase = FIRST if dice.random() < 0.5 else aim
        longest = reference.seconds if self._phase == FIRST else reference.lengths[self._phase]
        self._delay = dice.uniform(0, longest)
        self._since: float | None = None

    def has_come(self, run: Run, events: list[dict[str, Any]]) -> bool:
        """Return whether it is time."""
        order = list(PHASES)
        if self._since is None and order.index(phase_of(events)) >= order.index(self._phase):
            self._since = 0.0 if self._phase == FIRST else run.seconds
        return self._since is not None and run.seconds - self._since >= self._delay


def play_round(job: list[str], places: Places, reference: Reference, dice: random.Random, tally: Tally) -> None:
    """Kill a job until it ends or no kills are left, then compare its result."""
    kind, apart = "", can_be_apart()
    while True:
        fetched = places.fetched()
        moment = Moment(dice, reference, tally.kills) if tally.kills.total() < tally.planned else None
        run = places.start(job, apart=apart and kind == "empty")
        while run.code is None and not (moment and moment.has_come(run, run.told(places.workspace))):
            time.sleep(_LOOK_S)
        killed = run.kill()
        events = run.told(places.workspace)
        tally.ran += run.seconds
        tally.evaluated += sum(event["event"] == "trial" for event in events)
        if kind:
            tally.fetched[kind].append(places.fetched() - fetched)
        if not killed:
            break
        tally.kills[phase_of(events)] += 1
        kind = "same" if tally.kills.total() % 2 else "empty"
        tally.restarts[kind] += 1
        if kind == "empty":
            places.move()
    tally.rounds += 1
    tally.probes += places.probes()
    tally.differences += differences(places, run.wait(), reference)


def differences(places: Places, code: int, reference: Reference) -> list[str]:
    """Return the differences from the uninterrupted run."""
    if code != 0:
        return [f"{places.name}: exit code {code}: {places.log.read_text()[-3000:]}"]
    found = places.result()
    return [
        f"{places.name}: {name}: {found[name]} in place of {expected}"
        for name, expected in reference.result.items()
        if found[name] != expected
    ]


def chaos(job: list[str], trials: int, kills: int, seed: int, root: Path, server: S3Server) -> bool:
    """Kill, compare, print, and return whether all results were equal."""
    reference = uninterrupted(job, Places(root, "reference", server))
    print(
        f"uninterrupted: {reference.seconds:.0f} s", {k: round(v, 1) for k, v in reference.lengths.items()}, flush=True
    )
    dice, tally = random.Random(seed), Tally(kills)
    while tally.kills.total() < kills:
        places = Places(root, f"round-{tally.rounds}", server)
        play_round(job, places, reference, dice, tally)
        print(f"{places.name}: {tally.kills.total()} kills, {len(tally.differences)} differences", flush=True)
        if not tally.differences:
            shutil.rmtree(root / places.name)
    again = uninterrupted(job, Places(root, "again", server))
    if again.result != reference.result:
        tally.differences.append("two uninterrupted runs differ")
    alone = statistics.mean([reference.seconds, again.seconds])
    print(f"{kills} kills over {tally.rounds} jobs, seed {seed}: {len(tally.differences)} differences")
    print("killed in:", ", ".join(f"{phase} {tally.kills[phase]}" for phase in PHASES))
    print(
        "restarted:",
        ", ".join(
            f"{count} in {'the same workspace' if kind == 'same' else 'an empty one'}"
            for kind, count in tally.restarts.items()
        ),
    )
    print(f"uninterrupted: {reference.seconds:.0f} and {again.seconds:.0f} s")
    print(
        f"time lost: {(tally.ran - tally.rounds * alone) / kills:.1f} s a kill, the start and waits for leases included"
    )
    print(f"finished trials evaluated again: {(tally.evaluated - tally.rounds * trials) / kills:.2f} a kill")
    print(f"objects of probes left in the bucket: {tally.probes}")
    for kind, sizes in tally.fetched.items():
        if sizes:
            mean, most = statistics.mean(sizes) / 1e6, max(sizes) / 1e6
            print(f"fetched again, {kind} workspace: {mean:.2f} MB, at most {most:.2f} MB")
    print(*tally.differences, sep="\n")
    return not tally.differences


def race(job: list[str], places: Places, *, together: bool, apart: bool) -> str:
    """Start two runners at once and return what went wrong; empty if nothing did."""
    runs = [places.start(job, apart=apart, number=0 if together else number) for number in (0, 1)]
    try:
        while all(run.code is None for run in runs):
            time.sleep(_LOOK_S)
        lost, won = sorted(runs, key=lambda run: run.code is None)
        if lost.code != HeldError.exit_code:
            return f"{places.name}: exit code {lost.code}: {places.log.read_text()[-2000:]}"
        places.number = 0 if together else runs.index(won)
        while won.code is None and phase_of(won.told(places.workspace)) == FIRST:
            time.sleep(_LOOK_S)
        return "" if won.code in (None, 0) else f"{places.name}: the other ends with {won.code}"
    finally:
        for run in runs:
            run.kill()


def runners(job: list[str], times: int, root: Path, server: S3Server) -> bool:
    """Start two runners at once, `times` times in each way; print, and return whether all went right."""
    right = True
    for together, what in ((True, "one workspace"), (False, "two workspaces, one mirror")):
        wrong = []
        for number in range(times):
            # Alternating: a fresh job, then the same job after its runner was killed.
            places = Places(root, f"race-{together}-{number // 2}", server)
            wrong += filter(None, [race(job, places, together=together, apart=number % 4 >= 2 and can_be_apart())])
        print(f"two runners at once, {what}: {times - len(wrong)} of {times} times one works and the other exits 4")
        print(*wrong, sep="\n", flush=True)
        right = right and not wrong
    return right


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos")
    parser.add_argument("organism", nargs="?", type=Path, help="of `abliterate demo-model`; trained where not given")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument(
        "--runners", type=int, default=0, help="times that two runners start at once, in place of kills"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, S3Server() as server:
        client = server.client()
        client.create_bucket(Bucket=BUCKET)
        client.close()
        organism = given.organism or Path(folder) / "organism"
        if given.organism is None:
            abliterate("demo-model", organism).check()
        job = [*job_arguments(organism), "--trials", str(given.trials)]
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            if given.runners:
                right = runners(job, given.runners, Path(folder), server)
            else:
                right = chaos(job, given.trials, given.kills, given.seed, Path(folder), server)
        finally:
            for run in Run.latest:
                run.kill()
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
