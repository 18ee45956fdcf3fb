"""Mirror places of all three kinds, run folders to mirror, and runs in a process: python -m tests.mirrors SPEC."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from job.errors import JobError
from job.mirror import LeaseKeeper, MirrorOptions, SnapshotPace, lease, open_mirror
from job.records import JobRecord
from job.storage.atomic import write_atomically, write_record
from job.storage.identity import job_id
from job.storage.run_folder import RunFolder
from job.transfer.s3 import S3Options
from tests.helpers import environment, start_script

IDENTITY = {"model": {"repository": "cook/soup"}, "seed": 7, "space": [1, 2]}
JOB = job_id(IDENTITY)
QUICK = SnapshotPace(beat_s=0.3, expiry_s=1.5, snapshot_s=0.02, poll_s=0.1)
# Long enough that nothing expires unless a test waits for it.
CALM = SnapshotPace(beat_s=5.0, expiry_s=60.0, snapshot_s=0.02, poll_s=0.1)


@dataclass
class Place:
    """A place for mirrors, with direct access to its contents."""

    uri: str
    contents: Callable[[], dict[str, bytes]]
    put: Callable[[str, bytes | None], None]
    env: dict[str, str] = field(default_factory=dict)
    s3: S3Options | None = None
    server: Any = None
    opened: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return self.uri.partition(":")[0]

    def mirror(self, pace: SnapshotPace = CALM, **options: Any) -> Any:
        return open_mirror(self.uri, MirrorOptions(pace=pace, s3=self.s3, **options))

    def claim(
        self, folder: Path, pace: SnapshotPace = CALM, said: list[str] | None = None, **options: Any
    ) -> LeaseKeeper:
        words = [] if said is None else said
        # Creating an S3 client takes longer than using it.
        key = f"{pace} {self.s3} {options}" if self.kind == "s3" else str(len(self.opened))
        if key not in self.opened:
            self.opened[key] = self.mirror(pace, **options)
        claim: LeaseKeeper = self.opened[key].claim(RunFolder(folder), IDENTITY, words.append)
        return claim

    def close(self) -> None:
        for mirror in self.opened.values():
            mirror.close()

    def head(self, job: str = JOB) -> dict[str, Any]:
        return json.loads(self.contents()[f"{job}/head.json"])

    def change_head(self, **changes: Any) -> None:
        head = self.head()
        for name, value in changes.items():
            target = head["lease"] if name in head["lease"] else head
            target[name] = value
        self.put(f"{JOB}/head.json", json.dumps(head).encode())

    def objects(self) -> set[str]:
        return {name for name in self.contents() if "/objects/" in name}

    def start(self, mode: str, folder: Path, pace: SnapshotPace = CALM, **more: Any) -> subprocess.Popen[str]:
        """Start a run in a process that prints its steps; it ends when its input is closed.

        It is forked from a warm one, except at a Hub: to load transformers for each new Hub would take longer.
        """
        s3 = self.s3.model_dump() if self.s3 else None
        spec = {"uri": self.uri, "folder": str(folder), "mode": mode, "pace": asdict(pace), "s3": s3, **more}
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        if self.server is None or self.s3 is not None:
            code = "import sys; from tests.mirrors import main; sys.exit(main(sys.argv[1]))"
            return start_script(code, json.dumps(spec), env=environment(**self.env), **streams)
        command = [sys.executable, "-m", "tests.mirrors", json.dumps(spec)]
        env = environment(COVERAGE_PROCESS_START="", **self.env)
        return subprocess.Popen(command, text=True, env=env, **streams)


def put_tree(root: Path, name: str, data: bytes | None) -> None:
    path = root / name
    if data is None:
        path.unlink()
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def read_tree(root: Path, *, hidden: bool = False) -> dict[str, bytes]:
    """Return all files of a folder, without hidden ones."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    names = {path.relative_to(root).as_posix(): path for path in files}
    return {name: path.read_bytes() for name, path in names.items() if hidden or "/." not in f"/{name}"}


def write_folder(folder: Path, *, seed: int = 0, large: int = 200_000, trials: int = 3, ballast: int = 0) -> RunFolder:
    """Write a run folder with files of every kind, and with files that no mirror may hold.

    With ballast, study and event log are as large as with many trials.
    """
    random, run = Random(seed), RunFolder(folder)
    for name in ("directions", "residuals", "uploads", "figures", "exports/trial-0001"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "directions" / "mean.safetensors").write_bytes(random.randbytes(5_000))
    run.geometry_file.write_text("{}\n")
    (folder / "residuals" / "good-1.safetensors").write_bytes(random.randbytes(large))
    (folder / "uploads" / "part-1.json").write_text("{}")
    run.figures_file("base").write_text('{"bad_prompts": 1}')
    run.report_file.write_text("# report\n")
    run.page_file.write_text("")
    for number in range(trials):
        add_trial(run.study_file, number)
    if ballast:
        with closing(sqlite3.connect(run.study_file)) as db, db:
            db.execute("CREATE TABLE IF NOT EXISTS trials (number INTEGER, state TEXT DEFAULT 'COMPLETE')")
            db.execute("CREATE TABLE IF NOT EXISTS parameters (number INTEGER, value TEXT)")
            db.execute("CREATE TABLE ballast (x)")
            db.executemany(
                "INSERT INTO ballast VALUES (?)", [(random.randbytes(1000),) for _ in range(ballast // 1000)]
            )
    run.events_file.write_text('{"event": "started"}\n' + random.randbytes(ballast // 2).hex() + "\n")
    run.preflight_file.write_text("{}")
    run.prompts_file.write_text('{"bad": ["x"]}')
    run.uploads_file.write_text("[]")
    run.meter_file.write_text("{}")
    run.reproduces_file.write_text("{}")
    write_atomically(run.state_file, json.dumps({"n": trials}).encode())
    record = JobRecord(job_id=JOB, identity=IDENTITY, settings={"trials": 5, "seed": 7}, startup_trials=2, versions={})
    write_record(run.job_file, record)
    (folder / "exports/trial-0001/model.safetensors").write_bytes(b"a model")
    (folder / ".lock").touch()
    run.holder_file.write_text("{}")
    return run


def mirrored(folder: Path) -> dict[str, bytes]:
    """Return the expected contents of a mirror of a run folder, the study by its rows."""
    kept = {
        name: data
        for name, data in read_tree(folder).items()
        if not name.startswith(("exports/", "superseded")) and name not in ("holder.json", "mirror.json", "study.db")
    }
    return kept | (
        {"study.db": repr(trials_in(folder / "study.db")).encode()} if (folder / "study.db").exists() else {}
    )


def add_trial(study: Path, number: int) -> None:
    """Add a trial with all its rows, in one transaction."""
    with closing(sqlite3.connect(study, timeout=10)) as db, db:
        db.execute("CREATE TABLE IF NOT EXISTS trials (number INTEGER, state TEXT DEFAULT 'COMPLETE')")
        db.execute("CREATE TABLE IF NOT EXISTS parameters (number INTEGER, value TEXT)")
        db.execute("INSERT INTO trials (number) VALUES (?)", (number,))
        db.executemany("INSERT INTO parameters VALUES (?, ?)", [(number, str(part) * 200) for part in range(5)])


def trials_in(study: Path) -> list[tuple[int, int]]:
    """Return number and count of parameters of each trial."""
    query = "SELECT t.number, count(*) FROM trials t JOIN parameters p ON p.number = t.number GROUP BY 1 ORDER BY 1"
    with closing(sqlite3.connect(f"file:{study}?mode=rw", uri=True)) as db:
        return list(db.execute(query))


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def save(place: Place, folder: Path) -> None:
    """Bring the mirror up to date with a run folder."""
    claim = place.claim(folder)
    claim.start()
    claim.request()
    assert claim.close()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _work(claim: LeaseKeeper, run: RunFolder, lines: Iterable[int]) -> None:
    """Add a trial, an event and the state, as a search does; print snapshots."""
    claim.start()
    for number in lines:
        add_trial(run.study_file, number)
        with run.events_file.open("a") as file:
            file.write(json.dumps({"event": "trial", "number": number}) + "\n")
        write_atomically(run.state_file, json.dumps({"n": number + 1}).encode())
        claim.request()
        claim.check()
        print("generation", claim.head.generation, number, flush=True)
        time.sleep(0.03)


def main(given: str) -> int:
    spec = json.loads(given)
    if spec.get("elsewhere"):
        # As in another container of this machine: process ids mean something else there.
        lease.process_namespace = lambda: "elsewhere"  # type: ignore[attr-defined]
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    run = RunFolder(Path(spec["folder"]))
    s3 = S3Options(**spec["s3"]) if spec["s3"] else None
    options = MirrorOptions(pace=SnapshotPace(**spec["pace"]), s3=s3)
    try:
        mirror = open_mirror(spec["uri"], options)
        if spec["mode"] == "race":
            return _race(mirror, spec, over)
        claim = mirror.claim(run, IDENTITY, lambda line: print(line, flush=True))
        print("claimed", flush=True)
        if spec["mode"] == "work":
            first = len(trials_in(run.study_file)) if run.study_file.exists() else 0
            if first == 0 and not run.job_file.exists():
                write_folder(run.path, trials=0, large=spec.get("large", 50_000), ballast=spec.get("ballast", 0))
            _work(claim, run, iter(lambda: len(trials_in(run.study_file)) if run.study_file.exists() else 0, None))
        claim.start()
        over.wait()
        claim.close()
    except JobError as error:
        print(f"{type(error).__name__}: {error.line}", flush=True)
        return error.exit_code
    return 0


def _race(mirror: Any, spec: dict[str, Any], over: threading.Event) -> int:
    """Claim jobs in sequence, each the moment its go file appears, and print which claims won."""
    base, claims = Path(spec["folder"]), []
    for number in range(spec["rounds"]):
        print("ready", flush=True)
        while not (base / f"go-{number}").exists():
            time.sleep(0.0005)
        run = RunFolder(base / str(os.getpid()) / job_id({"n": number}))
        try:
            claims.append(mirror.claim(run, {"n": number}, lambda _: None))
            print("won", flush=True)
        except JobError as error:
            print(type(error).__name__, flush=True)
    over.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
