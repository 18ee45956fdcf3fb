"""Every durable write passes a fail-point, and a job killed at any of them continues as if uninterrupted.

The points are read from the source and recorded during a whole job.
"""

from __future__ import annotations

import ast
import fnmatch
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest

from job.export.merged import build_manifest
from job.lifecycle.repair import repair
from job.mirror import MirrorOptions, open_mirror
from job.mirror.folder_store import FileStore
from job.mirror.options import PACE
from job.search.study import read_trials
from job.storage import atomic
from job.storage.atomic import sha256_file, write_atomically, write_record
from job.storage.exports import DONE, MANIFEST
from job.storage.run_folder import RunFolder
from job.storage.study_file import BACKUP, restore_if_damaged
from job.system.failpoints import FAILPOINTS, planted, reached, take
from job.system.locks import trial_folder
from job.transfer import folders as local
from job.upload.hub import HubOptions
from job.upload.hub import deliver as to_hub
from job.upload.s3 import deliver as to_s3
from tests.helpers import Result, abliterate, only_job, start, stored_trials
from tests.integration.search.test_optimizer import Runs
from tests.mirror_places import file_place, hub_place, place, running, s3_place
from tests.mirrors import CALM, JOB, Place, add_trial, mirrored, read_tree, wait_until, write_folder

__all__ = ["file_place", "hub_place", "place", "running", "s3_place"]

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ROOT = Path(__file__).parents[2]

# Writes to a disk, a database or a target that survive a crash.
_FUNCTIONS = frozenset({"os.replace", "os.rename", "os.fsync", "os.fdatasync", "os.link", "os.symlink"})
_FUNCTIONS |= {f"shutil.{name}" for name in ("copyfile", "copyfileobj", "copy", "copy2", "copytree", "move")}
_METHODS = frozenset({"rename", "symlink_to", "hardlink_to", "write_bytes", "write_text", "save_pretrained", "backup"})
_METHODS |= {"commit", "create_commit", "add_all", "add_trials", "set_user_attr", "upload_file", "put_object"}
# Functions whose writes need no point, and why.
WITHOUT = {
    "storage/atomic.sync_folder": "what others have written, past points of their own",
    "storage/atomic.sync_file": "what others have written, past points of their own",
    "system/locks._write": "who holds a lock; that its process has ended says the same (test_locks.py)",
    "system/locks.trial_folder": "a probe, removed at once or at the next one",
    "preflight/disk._probe_file": "a probe, removed at once",
    "storage/study_file.refused_write": "a file without a name",
    "preflight/disk.measure_speed": "a file without a name",
    "tuning/memory_probe._forget_peak": "a switch of the kernel's",
    "evaluate/delivery._fill": "links for a delivery, made anew by the next one",
    "model/device_faults._exit_if_stuck": "stacks of a process that ends by itself right after",
    "system/failpoints.reached": "what a test is told",
    "storage/events.log_to": "a line feed after a line that a crash has torn",
    "storage/events._append": "a line of a log, which may be torn",
    "api._events": "no file, but the name of a setting is replaced",
    "storage/study_file.back_up": "in memory; the copy on the disk passes write_atomically's points",
    "mirror/folder_store._copy": "under a name that nothing knows until its caller has passed a point",
    "mirror/folder_store.fetch": "among what is being restored; its caller passes a point",
    "mirror/layers.assemble": "among what is being restored; its caller passes a point",
    "mirror/restore._fetch": "among what is being restored; its caller passes a point",
    "mirror/mirror._download": "a copy for a command that only looks",
    "mirror/layers.make": "beside a copy for one snapshot, which is made anew",
    "mirror/s3_store.fetch": "among what is being restored; its caller passes a point",
    "mirror/hub_store.fetch": "among what is being restored; its caller passes a point",
    "mirror/hub_store.replace": "its commit passes a point",
    "mirror/snapshot.back_up": "a copy for one snapshot, which is made anew",
    "mirror/snapshot._copy": "a copy for one snapshot, which is made anew",
    "upload/hub._commit": "its commit passes a point",
    "cli/cloud.fetch": "what is fetched once more",
    "organism/folder.write_organism": "a model that is trained anew",
    "realmodel/folder.write_real_model": "a model that is converted anew",
    "realmodel/conversion.convert": "a model that is converted anew",
    "realmodel/folder._write_model": "a model that is converted anew",
    "realmodel/folder._write_prompts": "prompts beside a model that is converted anew",
}


def _calls(node: ast.AST) -> Iterator[ast.Call]:
    """Yield the calls of a function, without those of nested functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(child, ast.Call):
            yield child
        yield from _calls(child)


def _writes(call: ast.Call) -> bool:
    words = [arg.value for arg in (*call.args, *(k.value for k in call.keywords)) if isinstance(arg, ast.Constant)]
    name = ast.unparse(call.func)
    if name.rpartition(".")[2] == "open" or name == "os.fdopen":
        return any(isinstance(word, str) and set(word) <= set("rwaxbt+") and set(word) & set("wax+") for word in words)
    if name in _FUNCTIONS or name.endswith("_engine.begin"):
        return True
    if not isinstance(call.func, ast.Attribute):
        return False
    # Of a path; a string's takes two and a record's names.
    return call.func.attr in _METHODS or (call.func.attr == "replace" and len(call.args) == 1 and not call.keywords)


def _functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in sorted((ROOT / "job").rglob("*.py")):
        module = path.relative_to(ROOT / "job").with_suffix("").as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield f"{module}.{node.name}", node


def _points(function: ast.FunctionDef) -> list[ast.expr]:
    """Return the name expressions of a function's points."""
    return [call.args[0] for call in _calls(function) if ast.unparse(call.func) == "reached"]


def test_every_durable_write_goes_past_a_point() -> None:
    writing = {name: _points(function) for name, function in _functions() if any(map(_writes, _calls(function)))}
    assert len(writing) > 30  # the scan finds writes at all
    assert {name for name, points in writing.items() if not points} == WITHOUT.keys()
    # Every request to S3 goes through one function, but for listings.
    clients = [
        name
        for name, function in _functions()
        if name.startswith(("upload/s3", "transfer/s3/"))
        and any("self._client" in ast.unparse(call) for call in _calls(function))
    ]
    assert set(clients) == {f"transfer/s3/client.{name}" for name in ("call", "pages", "close")}


def _named() -> set[str]:
    """Return all points with literal names, without those formed from a file's, a stage's or a method's name."""
    named = [
        point for _, function in _functions() for point in _points(function) if not isinstance(point, ast.JoinedStr)
    ]
    words = [node.value for point in named for node in ast.walk(point) if isinstance(node, ast.Constant)]
    assert all(isinstance(word, str) for word in words)
    return set(words)


# Points hit by their own tests instead of the whole job below.
ELSEWHERE = {
    *("restore:fetched", "restore:in", "restore:aside", "restore:journal", "applied:written", "applied:replaced"),
    *("judge:answered", "study:damaged", "hub:committed", "repair:unsealed", "repair:aside"),
    *("delivery:outgoing", "delivery:copied", "delivery:linked", "delivery:replaced", "object:copied"),
}

# Points, as patterns, after which the next start does what it does after another one that the quick lane kills at: it
# checks once more, extracts residuals or directions, or writes an export. The full lane kills at these too.
LIKE_ANOTHER = {
    "written:preflight.json",  # written:prompts.json
    *("written:good-*.safetensors", "written:geometry.json", "written:mean-difference-*.safetensors"),  # stage:search
    *("written:chat_template.jinja", "written:*config.json", "written:tokenizer.json"),  # shard:written
    *("shard:begun", "shard:replaced", "written:trial-0000*.json"),  # shard:written, written:base.json
    *("written:reproduce.json", "written:README.md", "written:SHA256SUMS"),  # written:manifest.json
    # search/test_choice.py kills at these.
    *("written:rescored.json", "finalists:measured", "written:finalists.json", "stage:export"),
}


# --- fail-points ----------------------------------------------------------------------------------------


def plant(faults: Path, points: Collection[str]) -> None:
    for point in points:
        (faults / f"kill@{point}").touch()


def dies(faults: Path, points: Collection[str], action: Callable[[], object]) -> bool:
    """Run an action in a fork and return whether it was killed at one of the points."""
    plant(faults, points)
    child = os.fork()
    if child == 0:
        os.environ[FAILPOINTS] = str(faults)
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return status != 0


def test_a_point_kills_once_and_only_where_it_is_planted(faults: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(faults, ["here"])
    reached("here")  # without the variable no point is checked
    assert dies(faults, ["here"], lambda: (reached("there"), reached("here")))
    assert not dies(faults, [], lambda: reached("here"))
    monkeypatch.setenv(FAILPOINTS, str(faults))
    (faults / "passed").touch()
    reached("one")
    reached("two")
    assert (faults / "passed").read_text() == "one\ntwo\n"
    for name in ("memory-1", "memory-2", "memory"):
        (faults / name).touch()
    assert [planted("memory") for _ in range(4)] == [True, True, True, False]
    assert not planted("mem")
    assert not take("gone")


# --- after a kill ---------------------------------------------------------------------------------------


def _hidden(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob(".*"))
    return sorted(name for name in names if not name.endswith(".lock"))


def _older(folder: Path) -> None:
    """Wait for the file system's clock to advance."""
    mark = folder / "mark"
    before = max(path.stat().st_mtime for path in folder.rglob("*"))
    while True:
        mark.touch()
        if mark.stat().st_mtime > before:
            mark.unlink()
            return


def test_what_a_killed_process_has_half_written_is_swept_at_the_next_start(tmp_path: Path, faults: Path) -> None:
    runs = tmp_path / "runs"
    folder = RunFolder(runs / JOB)
    for path in (folder.state_file, folder.figures_file("base"), runs / ".hashes.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        assert dies(faults, [f"written:{path.name}"], lambda path=path: write_atomically(path, b"half"))
    assert len(_hidden(runs)) == 3
    # A foreign file with such a name is left alone.
    other = folder.path / ".mine.tmp"
    other.touch()
    _older(runs)
    with folder.held():
        assert _hidden(runs) == [f"{JOB}/.mine.tmp"]


def test_what_a_live_process_is_writing_is_not_swept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / JOB)
    folder.path.mkdir()
    go, child = tmp_path / "go", os.fork()
    if child == 0:
        atomic.reached = lambda _: wait_until(go.exists, "nothing")  # type: ignore[assignment]
        write_atomically(folder.state_file, b"whole")
        os._exit(0)
    wait_until(lambda: len(_hidden(folder.path)) == 1, "nothing is written")
    _older(tmp_path)
    with folder.held():
        assert len(_hidden(folder.path)) == 1
        go.touch()
        assert os.waitpid(child, 0)[1] == 0
    assert folder.state_file.read_bytes() == b"whole"
    assert _hidden(folder.path) == []


def test_what_is_younger_than_the_holder_is_not_swept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / JOB)
    with folder.held():
        since = folder.holder_file.stat().st_mtime
        young = folder.path / ".state.json.0123abcd.tmp"
        young.touch()
        os.utime(young, (since + 1, since + 1))
        atomic.sweep_temporaries(folder.path, since)
        assert young.exists()
        os.utime(young, (since - 1, since - 1))
        atomic.sweep_temporaries(folder.path, since)
        assert not young.exists()


def test_a_killed_probe_of_a_folder_is_swept_by_the_next(tmp_path: Path, faults: Path) -> None:
    place = tmp_path / "mirrors"
    place.mkdir()

    def probe() -> None:
        with open_mirror(place.as_uri(), MirrorOptions(pace=CALM)) as mirror:
            mirror.probe()

    assert dies(faults, ["written:head.json"], probe)
    (killed,) = place.iterdir()
    _older(tmp_path)
    # One in use is left alone.
    with trial_folder(place) as live:
        assert not killed.exists()
        _older(tmp_path)
        probe()
        assert list(place.iterdir()) == [live]
    assert list(place.iterdir()) == []


def test_a_head_that_was_half_written_is_swept(file_place: Place, tmp_path: Path, faults: Path) -> None:
    run = write_folder(tmp_path / "a" / JOB)
    claim = file_place.claim(run.path)
    claim.start()
    claim.request()
    assert claim.close()
    root = local.target_folder(file_place.uri)
    store = FileStore(file_place.uri)
    kept = store.read(JOB)
    assert kept is not None
    assert dies(faults, ["written:head.json"], lambda: store.replace(JOB, b"{}", kept, ()))
    assert any(name.endswith(".tmp") for name in _hidden(root))
    _older(tmp_path)
    file_place.claim(run.path).close()
    assert _hidden(root) == []


# --- a whole job ----------------------------------------------------------------------------------------


class Small:
    """A job that takes a second, with a mirror and a target, and its uninterrupted result."""

    def __init__(self, organism: Path, root: Path) -> None:
        self._prompts = []
        for option, name in (("good", "good_train"), ("bad", "bad_train")):
            for end, split in (("", name), ("-eval", name.replace("train", "test"))):
                file = root / f"{split}.txt"
                lines = (organism / file.name).read_text().splitlines(keepends=True)
                file.write_text("".join(lines[:8]))
                self._prompts += [f"--{option}{end}-prompts", str(file)]
        self._model = str(organism / "model")
        self.root, self.whole, self.passed = root, root / "whole", root / "passed"
        self.passed.mkdir()
        (self.passed / "passed").touch()
        self.run(self.whole, self.passed).check()
        self.points = list(dict.fromkeys((self.passed / "passed").read_text().splitlines()))

    def arguments(self, place: Path, workspace: str = "runs") -> list[str]:
        return [
            *("run", self._model, *self._prompts, "--workspace", str(place / workspace)),
            *("--trials", "4", "--set", "trials_per_batch=2", "--set", "search.method=tpe", "--allow", "restarts.loop"),
            *("--checkpoint", (place / "mirror").as_uri(), "--upload", (place / "delivered").as_uri()),
        ]

    def environment(self, faults: Path) -> dict[str, str]:
        return {FAILPOINTS: str(faults), PACE: "0.05,60,0.02,0.1"}

    def run(self, place: Path, faults: Path, workspace: str = "runs") -> Result:
        process = start(*self.arguments(place, workspace), loaded=True, **self.environment(faults))
        _, err = process.communicate(timeout=300)
        return Result(process.returncode, "", err)

    def until_it_ends(self, place: Path, faults: Path, workspace: str = "runs") -> int:
        """Restart the job until nothing kills it any more; return the number of kills."""
        kills = 0
        while (done := self.run(place, faults, workspace)).code == -signal.SIGKILL:
            kills += 1
        done.check()
        return kills

    def is_whole(self, place: Path, workspace: str = "runs") -> None:
        """Assert that a job's result equals the uninterrupted one."""
        assert stored_trials(place / workspace) == stored_trials(self.whole / "runs")
        exports = [only_job(workspace) / "export" for workspace in (place / workspace, self.whole / "runs")]
        assert read_tree(exports[0].resolve()) == read_tree(exports[1].resolve())
        assert read_tree(place / "delivered") == read_tree(self.whole / "delivered")
        left = [path for path in place.rglob(".*") if path.name.endswith(".tmp") or "probe" in path.name]
        assert not left, left


@pytest.fixture(scope="module")
def small(organism: Path, tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(organism, tmp_path_factory.mktemp("small"))


def test_a_whole_job_passes_every_point_but_those_with_tests_of_their_own(small: Small) -> None:
    assert _named() - {*small.points} == ELSEWHERE - {*small.points}


@pytest.mark.slow
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.full("kills"))])
def test_a_job_killed_at_every_point_comes_to_the_same(small: Small, tmp_path: Path, every: bool) -> None:
    """Each start dies at the first point not yet used; points that this skips get another job."""
    alike = {pattern: set(fnmatch.filter(small.points, pattern)) for pattern in LIKE_ANOTHER}
    assert all(alike.values()), alike
    left = set(small.points) - (set() if every else set().union(*alike.values()))
    rounds = 0
    while left:
        place = tmp_path / str(rounds)
        faults = place / "faults"
        faults.mkdir(parents=True)
        plant(faults, left)
        kills = small.until_it_ends(place, faults)
        hit = left - {path.name.partition("@")[2] for path in faults.iterdir()}
        assert hit, left
        assert kills <= len(hit)
        small.is_whole(place)
        left -= hit
        rounds += 1


@pytest.mark.slow
def test_a_job_killed_while_it_is_restored_is_restored_whole(small: Small, tmp_path: Path, faults: Path) -> None:
    plant(faults, ["stage:export"])
    assert small.run(tmp_path, faults).code == -signal.SIGKILL
    plant(faults, ["restore:fetched", "restore:in", "lease:taken"])
    assert small.until_it_ends(tmp_path, faults, "elsewhere") == 3
    small.is_whole(tmp_path, "elsewhere")
    # In its first place, the state that another machine has continued is moved aside.
    (only_job(tmp_path / "runs") / "study.db-journal").touch()
    plant(faults, ["restore:aside", "restore:journal", "restore:in"])
    shutil.rmtree(tmp_path / "delivered")
    assert small.until_it_ends(tmp_path, faults) == 3
    assert not list(faults.iterdir())
    assert stored_trials(tmp_path / "runs") == stored_trials(small.whole / "runs")


# --- points that no plain job passes --------------------------------------------------------------------


def test_an_edit_that_is_applied_is_there_whole_or_not_at_all(small: Small, tmp_path: Path, faults: Path) -> None:
    workspace = tmp_path / "runs"
    shutil.copytree(small.whole / "runs", workspace, symlinks=True)
    edit = abliterate("export", "--workspace", workspace, "--format", "directions").check().out.strip()
    out = tmp_path / "out"
    command = ("apply", small.arguments(tmp_path)[1], edit, out)
    for point, there in (("applied:written", False), ("applied:replaced", True)):
        plant(faults, [point])
        process = start(*command, loaded=True, JOB_FAILPOINTS=str(faults))
        assert process.wait(120) == -signal.SIGKILL
        process.communicate()
        assert out.exists() is there
        assert not there or (out / DONE).exists()
    merged = only_job(workspace) / "export"
    assert sha256_file(out / "model.safetensors") == sha256_file(merged / "model.safetensors")


def test_a_study_is_restored_though_restoring_it_is_cut(tmp_path: Path, faults: Path) -> None:
    file = tmp_path / "study.db"
    whole = Runs().run(file, 6, 2)
    file.write_bytes(os.urandom(20_000))
    points = ["study:damaged", f"written:{file.name}"]
    kills = 0
    while dies(faults, points[kills : kills + 1], lambda: restore_if_damaged(file)):
        kills += 1
        assert file.with_name(BACKUP).exists()
    assert kills == len(points)
    assert read_trials(file) == whole


def test_a_repair_that_is_cut_is_taken_up_again(small: Small, tmp_path: Path, faults: Path) -> None:
    shutil.copytree(small.whole / "runs", tmp_path / "runs", symlinks=True)
    folder = RunFolder(only_job(tmp_path / "runs"))
    folder.figures_file("base").write_text("{")
    folder.state_file.write_text("{")
    points = ["repair:unsealed", "repair:aside"]
    kills = 0
    while dies(faults, points[kills : kills + 1], lambda: repair(folder, lambda _: None)):
        kills += 1
    assert kills == len(points)
    assert not folder.state_file.exists()
    assert (folder.path / "state.json.damaged").read_text() == "{"
    assert not (folder.export_link / DONE).exists()


def _export(folder: Path, words: str) -> Path:
    folder.mkdir()
    write_atomically(folder / "config.json", words.encode())
    write_atomically(folder / "model.safetensors", 3 * words.encode())
    write_record(folder / MANIFEST, build_manifest(folder))
    write_atomically(folder / DONE, (sha256_file(folder / MANIFEST) + "\n").encode())
    return folder


def test_a_delivery_to_a_folder_is_the_former_or_the_new_one(tmp_path: Path, faults: Path) -> None:
    first, second = _export(tmp_path / "first", "soup"), _export(tmp_path / "second", "stew")
    target = tmp_path / "target"
    local.deliver(first, target.as_uri())
    points = ["delivery:linked", "delivery:copied", "delivery:outgoing", "delivery:replaced"]
    for point in points:
        assert dies(faults, [point], lambda: local.deliver(second, target.as_uri())), point
        if target.exists():
            whole = second if point == "delivery:replaced" else first
            assert (target / "config.json").read_bytes() == (whole / "config.json").read_bytes()
            assert (target / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    local.deliver(second, target.as_uri())
    assert read_tree(target) == read_tree(second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faults", "first", "second", "target"]


def test_a_delivery_to_s3_goes_on_from_every_request(s3_place: Place, tmp_path: Path, faults: Path) -> None:
    options, state = s3_place.s3, tmp_path / "state"
    export = _export(tmp_path / "export", "soup " * 500_000)  # a multipart file

    def deliver() -> None:
        to_s3(export, f"{s3_place.uri}/soup", state, options)

    (faults / "passed").touch()
    assert not dies(faults, [], deliver)
    points = list(dict.fromkeys((faults / "passed").read_text().splitlines()))
    (faults / "passed").unlink()
    assert {"s3:create_multipart_upload", "s3:upload_part", "s3:complete_multipart_upload", "s3:put_object"} < {*points}
    whole = s3_place.contents()
    assert {f"soup/{name}": data for name, data in read_tree(export).items()} == whole
    for point in points:
        for name in whole:
            s3_place.put(name, None)
        shutil.rmtree(state)
        assert dies(faults, [point], deliver), point
        deliver()
        # A leftover probe is deleted once it is ten minutes old.
        found = s3_place.contents().items()
        assert {name: data for name, data in found if ".abliterate-probe-" not in name} == whole
        assert not [upload for upload in s3_place.server.uploads() if ".abliterate-probe-" not in str(upload)]
        assert not [path for path in state.iterdir() if not path.name.startswith(".")]


def test_a_delivery_to_the_hub_whose_commit_was_made_is_found_made(
    hub_place: Place, tmp_path: Path, faults: Path
) -> None:
    export = _export(tmp_path / "export", "soup")

    def deliver() -> None:
        to_hub(export, "hf://cook/soup", HubOptions(), report=print, progress=lambda _: None)

    assert dies(faults, ["hub:committed"], deliver)
    commits = len(hub_place.server.repo("model", "cook/soup").commits)
    deliver()
    assert len(hub_place.server.repo("model", "cook/soup").commits) == commits


@pytest.mark.parametrize("place", ["file", "s3", "hub"], indirect=True)
def test_a_mirror_names_what_is_there_at_every_point(place: Place, tmp_path: Path, faults: Path) -> None:
    run = write_folder(tmp_path / JOB)

    def work() -> None:
        claim = place.claim(run.path, CALM)
        claim.start()
        claim.request()
        claim.close()

    points = ["lease:taken", "snapshot:taken", "snapshot:staged", "lease:renewed", "lease:released"]
    for number, point in enumerate(points):
        add_trial(run.study_file, 10 + number)
        assert dies(faults, [point], work), point
        fresh = RunFolder(tmp_path / f"fresh-{number}" / JOB)
        claim = place.claim(fresh.path)
        head = claim.head
        claim.close(final=False)
        assert mirrored(fresh.path).keys() == head.files.keys()
    work()
    fresh = RunFolder(tmp_path / "last" / JOB)
    place.claim(fresh.path).close(final=False)
    assert mirrored(fresh.path) == mirrored(run.path)
