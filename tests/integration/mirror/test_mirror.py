"""The checkpoint mirror: its contents, restoring, and refusals."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import pytest

from job.errors import DeliveryError, HeldError, JobError, MachineError, UsageError
from job.mirror import MirrorError, MirrorOptions, expected_bytes, held_bytes, open_mirror, records, scheme_of
from job.mirror.records import MOST_HEAD_BYTES, MirroredFile
from job.mirror.snapshot import Snapshots, Taken, check_study
from job.storage.atomic import write_atomically
from job.storage.identity import job_id
from job.storage.run_folder import RunFolder
from job.storage.study_file import count_trials
from job.transfer.folders import target_folder
from tests.fakes.s3_server import SECRET
from tests.helpers import die_while_writing
from tests.mirror_places import REPO, TOKEN, file_place, hub_place, place, running, s3_place
from tests.mirrors import (
    IDENTITY,
    JOB,
    Place,
    add_trial,
    mirrored,
    read_tree,
    save,
    trials_in,
    wait_until,
    write_folder,
)

__all__ = ["file_place", "hub_place", "place", "running", "s3_place"]

# Warnings of the client's HTTP library about the client's uploads.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def test_a_fresh_machine_gets_what_was_there(place: Place, tmp_path: Path) -> None:
    run = write_folder(tmp_path / "a" / JOB)
    save(place, run.path)
    head = place.head()
    assert (head["job_id"], head["identity"], head["generation"], head["lease"]["released"]) == (JOB, IDENTITY, 1, True)
    assert place.objects() == {f"{JOB}/objects/{entry['object']}" for entry in head["files"].values()}
    assert place.contents().keys() == {*place.objects(), f"{JOB}/head.json"}
    fresh = tmp_path / "b" / JOB
    said: list[str] = []
    place.claim(fresh, said=said).close(final=False)
    assert mirrored(fresh) == mirrored(run.path)
    assert not any((fresh / name).exists() for name in ("exports", ".lock", "holder.json", ".restoring", ".mirror"))
    assert any("restoring" in line for line in said)
    # Nothing has changed, so the only write names this folder as the writer.
    before = place.objects()
    save(place, fresh)
    assert place.objects() == before
    assert place.head()["generation"] == 1


def test_only_what_changed_is_sent(place: Place, tmp_path: Path) -> None:
    run = write_folder(tmp_path / JOB)
    save(place, run.path)
    first, size = place.objects(), sum(map(len, place.contents().values()))
    claim = place.claim(run.path)
    claim.start()
    for number in (3, 4, 5):
        generation = claim.head.generation
        add_trial(run.study_file, number)
        with run.events_file.open("a") as file:
            file.write('{"event": "trial"}\n')
        before = place.objects()
        claim.request()
        wait_until(lambda number=generation: claim.head.generation > number, "no snapshot")
        assert len(place.objects() - before) == 2
    assert claim.close()
    # Only objects of the latest two snapshots: the large ones are still the first.
    head = place.head()
    named = {entry["object"] for entry in head["files"].values()} | set(head["previous"])
    assert place.objects() == {f"{JOB}/objects/{name}" for name in named}
    assert len(place.objects() - first) == 4
    assert sum(map(len, place.contents().values())) < size + 200_000


def test_a_snapshot_never_says_more_than_it_holds(tmp_path: Path) -> None:
    run = write_folder(tmp_path / JOB, large=3_000_000)
    over = threading.Event()

    def work() -> None:
        number = 3
        while not over.is_set():
            add_trial(run.study_file, number)
            number += 1
            write_atomically(run.state_file, json.dumps({"n": number}).encode())
            time.sleep(0.002)

    worker = threading.Thread(target=work)
    worker.start()
    seen = []
    try:
        snapshots = Snapshots(run)
        for _ in range(20):
            taken = snapshots.take(())
            study, state = taken["study.db"].source, taken["state.json"].source
            assert study is not None
            assert state is not None
            check_study(study)
            seen.append(trials_in(study))
            assert json.loads(state.read_text())["n"] <= len(seen[-1])
    finally:
        over.set()
        worker.join()
    assert all(count == 5 for trials in seen for _, count in trials)
    lengths = [len(trials) for trials in seen]
    assert lengths == sorted(lengths)
    assert lengths[-1] > lengths[0]
    assert [number for number, _ in seen[-1]] == list(range(lengths[-1]))


def test_a_snapshot_waits_for_a_transaction_that_is_half_in_the_file(tmp_path: Path) -> None:
    run = write_folder(tmp_path / JOB)
    before = run.study_file.read_bytes()
    taken: list[dict[str, Taken]] = []
    with closing(sqlite3.connect(run.study_file)) as db:
        db.execute("PRAGMA cache_size = 1")  # written before the commit
        db.execute("INSERT INTO trials (number) VALUES (3)")
        db.executemany("INSERT INTO parameters VALUES (3, ?)", [("x" * 3_000,) for _ in range(5)])
        assert run.study_file.read_bytes() != before
        taking = threading.Thread(target=lambda: taken.append(Snapshots(run).take(())))
        taking.start()
        time.sleep(0.3)
        assert not taken
        db.commit()
        taking.join()
    source = taken[0]["study.db"].source
    assert source is not None
    check_study(source)
    assert trials_in(source) == [(number, 5) for number in range(4)]


def test_a_snapshot_is_without_the_transaction_that_a_killed_process_has_left_in_the_file(tmp_path: Path) -> None:
    run = write_folder(tmp_path / JOB)
    more = [f"INSERT INTO parameters VALUES (3, '{'x' * 3_000}')"] * 5
    die_while_writing(run.study_file, "INSERT INTO trials (number) VALUES (3)", *more)
    source = Snapshots(run).take(())["study.db"].source
    assert source is not None
    assert trials_in(source) == [(number, 5) for number in range(3)]


def test_a_change_within_the_tick_of_the_clock_is_seen(tmp_path: Path) -> None:
    run = write_folder(tmp_path / JOB)
    snapshots = Snapshots(run)
    run.state_file.write_text("1")
    stamp = run.state_file.stat().st_mtime_ns
    first = snapshots.take(())["state.json"].sha256
    run.state_file.write_text("2")
    os.utime(run.state_file, ns=(stamp, stamp))
    assert snapshots.take({first})["state.json"].sha256 != first


def test_the_mirror_of_a_folder_that_is_ahead_follows_it(place: Place, tmp_path: Path) -> None:
    run = write_folder(tmp_path / JOB)
    save(place, run.path)
    add_trial(run.study_file, 3)  # then power was lost
    said: list[str] = []
    claim = place.claim(run.path, said=said)
    assert len(trials_in(run.study_file)) == 4
    assert not said
    claim.start()
    claim.request()
    claim.close()
    place.claim(tmp_path / "b" / JOB).close(final=False)
    assert len(trials_in(tmp_path / "b" / JOB / "study.db")) == 4


def test_a_folder_that_was_overtaken_elsewhere_is_moved_aside(place: Place, tmp_path: Path) -> None:
    old = write_folder(tmp_path / "a" / JOB)
    save(place, old.path)
    new = RunFolder(tmp_path / "b" / JOB)
    place.claim(new.path).close(final=False)
    add_trial(new.study_file, 3)
    save(place, new.path)
    add_trial(old.study_file, 77)  # by a run without the mirror
    (old.path / "study.db-journal").write_bytes(b"")
    said: list[str] = []
    place.claim(old.path, said=said).close(final=False)
    assert mirrored(old.path) == mirrored(new.path)
    aside = old.path / "superseded-1"
    assert trials_in(aside / "study.db")[-1] == (77, 5)
    assert (aside / "study.db-journal").exists()
    assert not (old.path / "study.db-journal").exists()
    assert (old.path / "exports/trial-0001/model.safetensors").read_bytes() == b"a model"
    assert any("superseded-1" in line for line in said)
    # Large files already present are neither moved nor downloaded again.
    assert not (aside / "residuals").exists()
    # The next start has nothing to restore.
    again: list[str] = []
    place.claim(old.path, said=again).close(final=False)
    assert again == []


def test_a_folder_that_was_only_continued_elsewhere_is_brought_up_to_date_in_place(
    file_place: Place, tmp_path: Path
) -> None:
    old = write_folder(tmp_path / "a" / JOB)
    save(file_place, old.path)
    new = RunFolder(tmp_path / "b" / JOB)
    file_place.claim(new.path).close(final=False)
    add_trial(new.study_file, 3)
    new.state_file.write_text('{"n": 4}')
    new.figures_file("base").write_text('{"bad_prompts": 2}')
    with new.events_file.open("a") as log:
        log.write('{"event": "trial"}\n')
    save(file_place, new.path)
    # As `abliterate export` leaves it, which no mirror receives.
    old.figures_file("trial-0002").write_text('{"bad_prompts": 3}')
    with old.events_file.open("a") as log:
        log.write('{"event": "exported"}\n')
    said: list[str] = []
    file_place.claim(old.path, said=said).close(final=False)
    assert {path for path in old.path.iterdir() if "superseded" in path.name or "continued" in path.name} == set()
    assert not any("warning" in line for line in said)
    assert "keeps its own exports" in said[-1]
    kept = {"figures/trial-0002.json": b'{"bad_prompts": 3}'}
    assert mirrored(old.path) == mirrored(new.path) | kept
    assert (old.path / "exports/trial-0001/model.safetensors").read_bytes() == b"a model"


def _a_run(run: RunFolder) -> None:
    with run.events_file.open("a") as log:
        log.write('{"event": "job_started"}\n')


ONLY_HERE: dict[str, Callable[[RunFolder], object]] = {
    "study.db": lambda run: add_trial(run.study_file, 77),
    "events.jsonl": _a_run,
    "prompts.json": lambda run: run.prompts_file.write_text('{"bad": ["y"]}'),
    "uploads/part-2.json": lambda run: (run.uploads_state / "part-2.json").write_text("{}"),
}


@pytest.mark.parametrize("record", ONLY_HERE)
def test_what_only_this_folder_has_is_kept_and_named(file_place: Place, tmp_path: Path, record: str) -> None:
    old = write_folder(tmp_path / "a" / JOB)
    save(file_place, old.path)
    new = RunFolder(tmp_path / "b" / JOB)
    file_place.claim(new.path).close(final=False)
    add_trial(new.study_file, 3)
    save(file_place, new.path)
    ONLY_HERE[record](old)
    was = mirrored(old.path)
    said: list[str] = []
    file_place.claim(old.path, said=said).close(final=False)
    assert f"superseded-1, because the checkpoint does not continue its {record}" in said[-1]
    aside = mirrored(old.path / "superseded-1")
    assert {name: data for name, data in was.items() if not name.startswith(("residuals", "directions"))} == aside


def test_what_a_restore_that_was_cut_short_had_moved_is_kept(file_place: Place, tmp_path: Path) -> None:
    old = write_folder(tmp_path / "a" / JOB)
    save(file_place, old.path)
    file_place.claim(tmp_path / "b" / JOB).close(final=False)
    add_trial(RunFolder(tmp_path / "b" / JOB).study_file, 3)
    save(file_place, tmp_path / "b" / JOB)
    (old.path / ".continued" / "figures").mkdir(parents=True)
    old.figures_file("base").rename(old.path / ".continued/figures/trial-0002.json")
    old.job_file.rename(old.path / ".continued/job.json")
    file_place.claim(old.path).close(final=False)
    assert mirrored(old.path) == mirrored(tmp_path / "b" / JOB)
    assert (old.path / "superseded-1/figures/trial-0002.json").exists()


def test_work_without_a_mirror_is_taken_into_an_empty_one(place: Place, tmp_path: Path) -> None:
    claim = place.claim(tmp_path / "a" / JOB)  # claimed, and killed before the first snapshot
    claim.close(final=False)
    run = write_folder(tmp_path / "b" / JOB)
    save(place, run.path)
    assert len(trials_in(run.study_file)) == 3
    assert not (run.path / "superseded-1").exists()
    assert place.head()["generation"] == 1


def test_a_file_is_sent_again_when_it_goes_back_to_what_it_was(place: Place, tmp_path: Path) -> None:
    run = write_folder(tmp_path / "a" / JOB)
    claim = place.claim(run.path)
    claim.start()
    for text in ("1", "2", "1", "1", "2", "1"):
        generation = claim.head.generation
        run.state_file.write_text(text)
        with run.events_file.open("a") as file:
            file.write("{}\n")
        claim.request()
        wait_until(lambda number=generation: claim.head.generation > number, "no snapshot")
    assert claim.close()
    place.claim(tmp_path / "b" / JOB).close(final=False)
    assert (tmp_path / "b" / JOB / "state.json").read_text() == "1"


DAMAGE: dict[str, Any] = {
    "a missing object": (lambda p: p.put(_object(p, "job.json"), None), "job.json are missing"),
    "another object": (lambda p: p.put(_object(p, "residuals/good-1.safetensors"), b"x" * 99), "not match their hash"),
    "half a head": (lambda p: p.put(f"{JOB}/head.json", json.dumps(p.head()).encode()[:400]), "cannot be read"),
    "a head without a lease": (lambda p: p.put(f"{JOB}/head.json", _without(p.head(), "lease")), "is incomplete"),
    "no head": (lambda p: p.put(f"{JOB}/head.json", None), "holds something else"),
    "somebody's head.json": (lambda p: p.put(f"{JOB}/head.json", b'{"version": 1}'), "is not from a checkpoint"),
    "a newer version": (lambda p: p.change_head(version=3), "another version"),
    "another job's": (lambda p: p.change_head(job_id="beefbeefbeef"), "belongs to job beefbeefbeef"),
    "another identity": (lambda p: p.change_head(identity={"seed": 8}), "another job"),
    "a way out": (lambda p: p.change_head(files={"../../.bashrc": p.head()["files"]["job.json"]}), "names '../../"),
    "other files": (lambda p: p.put(f"{JOB}/model.safetensors", b"weights"), "model.safetensors"),
}


def _grown(place: Place, name: str, size: int) -> None:
    """Enlarge a file of a mirror: its host may store anything there."""
    data = place.contents()[name]
    place.put(name, data + b" " * (size - len(data)))


def _entry(place: Place, path: str) -> dict[str, Any]:
    return dict(place.head()["files"][path])


def _claiming(place: Place, path: str, **changes: Any) -> None:
    """Change a file's entry in a head."""
    files = place.head()["files"]
    files[path] = {name: value for name, value in {**files[path], **changes}.items() if value is not None}
    place.change_head(files=files)


HEAD = f"{JOB}/head.json"
# Without a limit, a host could fill the memory or the disk of every machine that reads it.
DAMAGE |= {
    "a head too large": (lambda p: _grown(p, f"{JOB}/head.json", MOST_HEAD_BYTES + 1), "more than 16 MiB"),
    "an object too large": (lambda p: _grown(p, _object(p, "job.json"), 20 << 20), "larger than its head.json says"),
    "an empty file too large": (lambda p: _grown(p, _object(p, "report.html"), 1), "larger than its head.json says"),
    "a document that claims too much": (
        lambda p: _claiming(p, "job.json", size=1 << 40),
        "1048576 MiB for job.json, which may have at most 128",
    ),
    "a study that claims too much": (lambda p: _claiming(p, "study.db", size=1 << 40), "which may have at most 2048"),
    "too many layers": (
        lambda p: _claiming(p, "events.jsonl", object=None, layers=[_entry(p, "events.jsonl")] * 33),
        "is incomplete: files.events.jsonl",
    ),
    "a lease without end": (lambda p: p.change_head(expiry_s=1e300), "expiry_s"),
    "a layer that claims too much": (
        lambda p: _claiming(p, "events.jsonl", object=None, layers=[_entry(p, "events.jsonl") | {"size": 3 << 20}]),
        "3 MiB for events.jsonl, which may have at most 2",
    ),
}


def _object(place: Place, path: str) -> str:
    return f"{JOB}/objects/{place.head()['files'][path]['object']}"


def _without(head: dict[str, Any], name: str) -> bytes:
    return json.dumps({key: value for key, value in head.items() if key != name}).encode()


# Reading a head does not depend on the place; listing and fetching do.
REMOTE_DAMAGE = ("a missing object", "no head", "other files")
REMOTE_DAMAGE += ("a head too large", "an object too large", "an empty file too large")


@pytest.mark.parametrize(
    ("place", "damage"),
    [*(("file", damage) for damage in DAMAGE), *((kind, d) for kind in ("s3", "hub") for d in REMOTE_DAMAGE)],
    indirect=["place"],
)
def test_what_is_torn_or_foreign_is_refused(place: Place, tmp_path: Path, damage: str) -> None:
    save(place, write_folder(tmp_path / "a" / JOB).path)
    change, reason = DAMAGE[damage]
    change(place)
    before = {name: data for name, data in place.contents().items() if not name.endswith("head.json")}
    fresh = tmp_path / "b" / JOB
    with pytest.raises(MirrorError, match=reason) as caught:
        place.claim(fresh)
    assert caught.value.exit_code == 6
    assert caught.value.remedy
    assert read_tree(fresh) == {}
    assert {name: data for name, data in place.contents().items() if not name.endswith("head.json")} == before
    # Another job in the same place is unaffected.
    other = RunFolder(tmp_path / "c" / job_id({"seed": 9}))
    place.mirror().claim(other, {"seed": 9}, lambda _: None).close(final=False)
    assert other.path.name in [head.job_id for head in place.mirror().jobs()]


def test_of_a_file_of_any_size_no_more_is_read_than_it_may_have(file_place: Place, tmp_path: Path) -> None:
    save(file_place, write_folder(tmp_path / "a" / JOB).path)
    root = target_folder(file_place.uri)
    for name, reason in ((_object(file_place, "directions/mean.safetensors"), "larger than its"), (HEAD, "16 MiB")):
        os.truncate(root / name, 1 << 40)  # a sparse file that would take hours to read
        with pytest.raises(MirrorError, match=reason):
            file_place.claim(tmp_path / "b" / JOB)


def test_what_does_not_fit_is_refused_before_it_is_fetched(file_place: Place, tmp_path: Path) -> None:
    save(file_place, write_folder(tmp_path / "a" / JOB).path)
    _claiming(file_place, "residuals/good-1.safetensors", size=1 << 60)
    with pytest.raises(MachineError, match=r"1152921504.\d GB for .* GB are free") as refused:
        file_place.claim(tmp_path / "b" / JOB)
    assert refused.value.exit_code == 76
    assert "--workspace" in refused.value.remedy
    assert read_tree(tmp_path / "b" / JOB) == {}


def test_layers_that_do_not_fit_are_refused_before_they_are_fetched(
    file_place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(file_place, write_folder(tmp_path / "a" / JOB, ballast=400_000).path)
    whole = shutil.disk_usage

    def small_for_layers(place: Path) -> Any:
        return whole(place)._replace(free=1000) if "abliterate-layers" in str(place) else whole(place)

    monkeypatch.setattr(shutil, "disk_usage", small_for_layers)
    with pytest.raises(MachineError, match=r"GB for .*abliterate-layers.* 0\.0 GB are free") as refused:
        file_place.mirror().fetch(JOB, tmp_path / "into")
    assert "TMPDIR" in refused.value.remedy


@pytest.mark.parametrize("where", ["", "objects"])
def test_a_link_in_a_mirror_leads_no_change_elsewhere(file_place: Place, tmp_path: Path, where: str) -> None:
    """Regression: sweeping deleted all files of the folder that `objects` was a link to."""
    save(file_place, write_folder(tmp_path / "a" / JOB).path)
    mine = target_folder(file_place.uri) / JOB / where
    elsewhere = tmp_path / "elsewhere"
    mine.rename(elsewhere)
    mine.symlink_to(elsewhere)
    (elsewhere / "thesis.txt").write_text("years of work")
    before = read_tree(elsewhere)
    with pytest.raises(MirrorError, match="which is a link"):
        save(file_place, tmp_path / "a" / JOB)
    assert read_tree(elsewhere) == before


def test_a_study_with_a_view_or_a_trigger_is_damaged(tmp_path: Path) -> None:
    """A view may compute without end, in whatever reads the study."""
    study = tmp_path / "study.db"
    with closing(sqlite3.connect(study)) as db, db:
        db.execute("CREATE VIEW trials AS SELECT 1 AS number, 'COMPLETE' AS state")
    assert count_trials(study) is None
    with pytest.raises(JobError, match="a view, 'trials'"):
        check_study(study)
    study.unlink()
    add_trial(study, 0)
    assert count_trials(study) == 1
    with closing(sqlite3.connect(study)) as db, db:
        db.execute("CREATE TRIGGER t AFTER INSERT ON trials BEGIN DELETE FROM parameters; END")
    assert count_trials(study) is None


def test_a_snapshot_that_nobody_would_take_is_not_sent(
    file_place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_folder(tmp_path / "a" / JOB)
    save(file_place, run.path)
    monkeypatch.setattr(records, "_MOST_BYTES", 4 << 20)
    run.page_file.write_bytes(b" " * (5 << 20))
    said: list[str] = []
    claim = file_place.claim(run.path, said=said)
    claim.start()
    claim.request()
    assert not claim.close(seconds=2)
    assert any("5 MiB for report.html, which may have at most 4" in line for line in said)
    assert file_place.head()["generation"] == 1  # the old contents are still valid


def test_a_folder_stays_as_it_was_when_the_mirror_is_torn(place: Place, tmp_path: Path) -> None:
    run = write_folder(tmp_path / "a" / JOB)
    save(place, run.path)
    shutil.copytree(run.path, tmp_path / "b" / JOB)
    (tmp_path / "b" / JOB / "mirror.json").unlink()
    place.put(_object(place, "study.db"), None)
    before = read_tree(tmp_path / "b" / JOB)
    with pytest.raises(MirrorError, match="contents of study"):
        place.claim(tmp_path / "b" / JOB)
    assert read_tree(tmp_path / "b" / JOB) == before
    assert place.head()["lease"]["released"]
    # The folder that it was made of needs no mirror, and repairs it.
    add_trial(run.study_file, 3)
    save(place, run.path)
    place.claim(tmp_path / "c" / JOB).close(final=False)


def test_status_needs_neither_the_lease_nor_the_large_files(place: Place, tmp_path: Path) -> None:
    run = write_folder(tmp_path / "a" / JOB)
    claim = place.claim(run.path)
    claim.start()
    claim.request()
    wait_until(lambda: claim.head.generation == 1, "no snapshot")
    with place.mirror() as mirror:
        found = mirror.fetch(JOB, tmp_path / "status")
        assert found.running
        assert found.folder.read_job().identity == IDENTITY
        wanted = {name: data for name, data in mirrored(run.path).items() if not name.endswith(".safetensors")}
        assert mirrored(found.folder.path) == wanted
        assert [(head.job_id, head.identity) for head in mirror.jobs()] == [(JOB, IDENTITY)]
        claim.close()
        assert not mirror.fetch(JOB, tmp_path / "later").running
        with pytest.raises(UsageError, match="no job nosuchjob"):
            mirror.fetch("nosuchjob", tmp_path / "none")


def test_a_probe_leaves_nothing_behind(place: Place, tmp_path: Path) -> None:
    with place.mirror() as mirror:
        proof = mirror.probe()
        assert proof.fenced
        assert mirror.jobs() == []
    assert place.contents() == {}
    if place.kind == "hf":
        assert place.server.repos() == []


def test_a_public_repository_is_refused(hub_place: Place, tmp_path: Path) -> None:
    hub_place.server.add_model(REPO, {"README.md": b"x"})
    run = write_folder(tmp_path / JOB)
    for use in (lambda m: m.probe(), lambda m: m.claim(run, IDENTITY, print), lambda m: m.jobs()):
        with pytest.raises(DeliveryError, match="is public on the Hub") as caught, hub_place.mirror() as mirror:
            use(mirror)
        assert "--checkpoint" in caught.value.remedy
    assert hub_place.contents() == {}


def test_a_repository_of_ours_is_private(hub_place: Place, tmp_path: Path) -> None:
    save(hub_place, write_folder(tmp_path / JOB).path)
    assert hub_place.server.repo("model", REPO).private


def test_two_jobs_share_a_repository(hub_place: Place, tmp_path: Path) -> None:
    one, two = write_folder(tmp_path / JOB), RunFolder(tmp_path / job_id({"seed": 9}))
    first = hub_place.claim(one.path)
    second = hub_place.mirror().claim(two, {"seed": 9}, print)
    two.state_file.write_text("{}")
    for claim in (first, second):
        claim.start()
        claim.request()
    assert first.close()
    assert second.close()
    assert {head.job_id for head in hub_place.mirror().jobs()} == {JOB, two.path.name}
    # Each snapshot is one complete commit.
    commits = hub_place.server.repo("model", REPO).history()
    for commit in commits:
        for name in (name for name in commit.files if name.endswith("head.json")):
            head = json.loads(commit.files[name].read())
            assert {f"{head['job_id']}/objects/{e['object']}" for e in head["files"].values()} <= commit.files.keys()


def test_no_secret_gets_into_a_mirror(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    run = write_folder(tmp_path / JOB)
    said: list[str] = []
    claim = place.claim(run.path, said=said, token=TOKEN)
    claim.start()
    claim.request()
    claim.close()
    printed = capfd.readouterr()
    everything = b"".join([*place.contents().values(), *read_tree(run.path, hidden=True).values()])
    for text in (
        everything.decode(errors="replace"),
        "".join(said),
        printed.out,
        printed.err,
        repr(MirrorOptions(token=TOKEN)),
    ):
        assert TOKEN not in text
        assert SECRET not in text


def test_a_large_file_is_sent_in_parts(s3_place: Place, tmp_path: Path) -> None:
    run = write_folder(tmp_path / "a" / JOB, large=17 << 20)
    save(s3_place, run.path)
    sent = [r for r in s3_place.server.front.requests if r.operation == "part" and "probe" not in r.key]
    assert len(sent) == 4
    s3_place.claim(tmp_path / "b" / JOB).close(final=False)
    assert mirrored(tmp_path / "b" / JOB) == mirrored(run.path)
    assert s3_place.server.uploads() == []


@pytest.mark.parametrize("large", [False, True])
def test_a_file_that_has_changed_is_left_to_the_next_snapshot(s3_place: Place, tmp_path: Path, large: bool) -> None:
    source, size = tmp_path / "cache.safetensors", (11 << 20) if large else 100
    source.write_bytes(bytes(size))
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    source.write_bytes(bytes([1]) * size)
    entry = MirroredFile(sha256=sha256, size=size, object=f"{sha256}.1-{'0' * 8}")
    with s3_place.mirror() as mirror, pytest.raises(DeliveryError) as failure:
        mirror._store.stage(JOB, {entry.object: (source, entry)}, lambda: None)
    assert failure.value.line.startswith("cache.safetensors changed during the upload")
    assert "next snapshot" in failure.value.line
    assert not s3_place.contents()
    assert not s3_place.server.uploads()


def test_what_an_earlier_run_has_left_half_done_is_swept(s3_place: Place, tmp_path: Path) -> None:
    run = write_folder(tmp_path / JOB)
    save(s3_place, run.path)
    leftover = f"{JOB}/objects/{'0' * 64}.2-deadbeef"
    s3_place.put(leftover, b"never named")
    own = s3_place.server.client()
    own.create_multipart_upload(Bucket="results", Key=f"mirrors/{leftover}")
    s3_place.claim(run.path).close(final=False)
    assert leftover not in s3_place.contents()
    assert s3_place.server.uploads() == []
    own.close()


@pytest.mark.parametrize("uri", ["file:/x", "ftp://x/y", "hf://cook", "s3://", "s3://b/x?y", "hf://a/b/c", "/plain"])
def test_what_names_no_mirror_is_refused(uri: str) -> None:
    with pytest.raises(UsageError):
        scheme_of(uri)


def test_the_size_is_known_beforehand(tmp_path: Path) -> None:
    run = write_folder(tmp_path / JOB)
    assert 200_000 < held_bytes(run) < 300_000
    assert expected_bytes(800, 64, 5120) > 800 * 64 * 5120 * 4


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    mirror = open_mirror((tmp_path / "file" / "x").as_uri(), MirrorOptions())
    for use in (lambda: mirror.probe(), lambda: mirror.claim(RunFolder(tmp_path / JOB), IDENTITY, print)):
        with pytest.raises(DeliveryError) as caught:
            use()
        assert caught.value.remedy


@pytest.mark.full("kills")
@pytest.mark.parametrize("seed", range(2))
def test_a_restore_that_is_killed_leaves_no_half_job(file_place: Place, tmp_path: Path, seed: int) -> None:
    run = write_folder(tmp_path / "a" / JOB, large=20 << 20)
    save(file_place, run.path)
    fresh, random = tmp_path / "b" / JOB, Random(seed)
    for _ in range(5):
        process = file_place.start("claim", fresh)
        wait_until(lambda p=process: fresh.exists() or p.poll() is not None, "not started")
        time.sleep(random.uniform(0, 0.25))
        process.kill()
        process.communicate()
        if (fresh / "job.json").exists():
            assert mirrored(fresh) == mirrored(run.path)
    file_place.claim(fresh).close(final=False)
    assert mirrored(fresh) == mirrored(run.path)


def test_a_restore_that_cannot_be_finished_leaves_no_job(file_place: Place, tmp_path: Path) -> None:
    run = write_folder(tmp_path / "a" / JOB)
    save(file_place, run.path)
    fresh = RunFolder(tmp_path / "b" / JOB)
    obstacle = fresh.path / "directions" / "mean.safetensors" / "folder"
    obstacle.mkdir(parents=True)
    with pytest.raises(MachineError, match="cannot write"):
        file_place.claim(fresh.path)
    assert not fresh.job_file.exists()
    assert file_place.head()["lease"]["released"]
    shutil.rmtree(obstacle.parent)
    file_place.claim(fresh.path).close(final=False)
    assert mirrored(fresh.path) == mirrored(run.path)


def test_a_job_that_is_held_is_refused_at_once(place: Place, tmp_path: Path) -> None:
    run = write_folder(tmp_path / "a" / JOB)
    claim = place.claim(run.path)
    begun = time.monotonic()
    with pytest.raises(HeldError, match="is held by process"):
        place.claim(tmp_path / "b" / JOB)
    assert time.monotonic() - begun < 3
    assert not read_tree(tmp_path / "b" / JOB)
    claim.close()
    place.claim(tmp_path / "b" / JOB).close(final=False)
