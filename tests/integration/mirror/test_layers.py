"""Mirrors of long searches: only new data is sent, in layers; mirrors of the former version are continued."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import tracemalloc
import zlib
from contextlib import closing
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.errors import HeldError
from job.mirror import LeaseKeeper, Mirror, MirrorError, hub_history
from job.mirror.hub_store import HubStore
from job.mirror.layers import BLOCK, Layers, assemble
from job.mirror.records import Layered
from job.storage.identity import job_id
from job.storage.run_folder import RunFolder
from tests.growth import BATCH, Growing, Sent
from tests.mirror_places import REPO, file_place, hub_place, place, running, s3_place
from tests.mirrors import (
    CALM,
    IDENTITY,
    JOB,
    QUICK,
    Place,
    add_trial,
    mirrored,
    save,
    sha256,
    trials_in,
    wait_until,
    write_folder,
)

__all__ = ["file_place", "hub_place", "place", "running", "s3_place"]

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def add(claim: LeaseKeeper, run: RunFolder, number: int) -> None:
    """Add a trial and wait until it is mirrored."""
    generation = claim.head.generation
    add_trial(run.study_file, number)
    claim.request()
    wait_until(lambda: claim.head.generation > generation, "no snapshot", 60)


# A change: position as a share of the file, number of bytes, and whether they overwrite or append.
CHANGES = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 5 * BLOCK), st.sampled_from(["replace", "append", "cut"])), max_size=40
)


@given(size=st.integers(0, 30 * BLOCK), changes=CHANGES, arrives=st.lists(st.booleans(), min_size=40, max_size=40))
@settings(max_examples=40)
def test_layers_give_back_what_they_were_made_of(
    tmp_path_factory: pytest.TempPathFactory, size: int, changes: list[tuple[float, int, str]], arrives: list[bool]
) -> None:
    folder, random = tmp_path_factory.mktemp("layers"), Random(size)
    source, target = folder / "file", folder / "back"
    layers, objects = Layers(), dict[str, Path]()
    sent: Layered | None = None
    contents = bytearray(random.randbytes(size))
    for number, (share, length, how) in enumerate([(0.0, 0, "append"), *changes]):
        start = int(share * len(contents))
        if how == "cut":
            del contents[len(contents) - min(length, len(contents)) :]
        else:
            start = start if how == "replace" else len(contents)
            contents[start : start + length] = random.randbytes(length)
        source.write_bytes(contents)
        made = layers.make("study.db", source, sha256(contents), sent, f"{number}-00000000")
        kept = objects[made.layer.object] = folder / made.layer.object
        kept.write_bytes(made.source.read_bytes())
        assemble([objects[layer.object] for layer in made.entry.layers], target, made.entry.size)
        assert target.read_bytes() == contents
        assert len(made.entry.layers) <= 12
        if number == 0 or arrives[number - 1]:  # others never arrive, and the next is based on those that did
            sent = made.entry


@pytest.mark.parametrize(
    "torn", [b"", b"x", b"[]", b"[[0, 1]]\nshort", b'[["a", 1]]\n', b"[[-1, 2]]\n", b"[[9999999, 1]]\nx"]
)
def test_what_is_no_layer_is_refused(tmp_path: Path, torn: bytes) -> None:
    file = tmp_path / "layer"
    for data in (torn, zlib.compress(torn)[:-2], zlib.compress(torn + b"x" * 2_000_000)):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"."):
            assemble([file], tmp_path / "target", 4)
        assert not (tmp_path / "target").stat().st_size > 4 * BLOCK or torn.startswith(b"[[9999999")


def test_a_layer_is_not_unpacked_beyond_what_it_says_it_holds(tmp_path: Path) -> None:
    """Regression: took the layer's unpacked size in memory, or terabytes on disk."""
    layer, target = tmp_path / "layer", tmp_path / "target"
    much = zlib.compressobj()
    with layer.open("wb") as file:
        file.write(much.compress(b"[[0, 1]]\n"))
        for _ in range(256):
            file.write(much.compress(bytes(1 << 20)))
        file.write(much.flush())
    tracemalloc.start()
    with pytest.raises(ValueError, match="larger than its file"):
        assemble([layer], target, 1 << 40)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    for header in (b"[[1000000000, 1], [0, 1]]\n", b"[" * 100_000, b"[[0, 1]]" + b" " * (2 << 20)):
        layer.write_bytes(zlib.compress(header + bytes(2 * BLOCK)))
        with pytest.raises(ValueError, match=r"."):
            assemble([layer], target, 2 * BLOCK)
        assert target.stat().st_size <= 2 * BLOCK


@pytest.mark.parametrize("runs", ["[[0, 2]]", "[[0, 1], [0, 1]]", "[[1, 1], [0, 1]]", "[[0, 1], [1, 0]]"])
def test_a_layer_holds_each_of_its_blocks_once_and_in_order(tmp_path: Path, runs: str) -> None:
    """Regression: a layer of 100 bytes that lists the same blocks many times kept a machine busy for days."""
    layer = tmp_path / "layer"
    layer.write_bytes(zlib.compress(runs.encode() + b"\n" + bytes(BLOCK)))
    with pytest.raises(ValueError, match=r"."):
        assemble([layer], tmp_path / "target", 2 * BLOCK)


def test_a_head_that_is_nested_without_end_is_a_torn_mirror(file_place: Place) -> None:
    file_place.put(f"{JOB}/head.json", b"[" * 100_000)
    with pytest.raises(MirrorError, match="inconsistent"):
        file_place.mirror().holder(JOB)


def _bytes_a_batch(tmp_path: Path, trials: int) -> tuple[float, int]:
    """Return the bytes sent per batch and the study's size."""
    growing = Growing(tmp_path / "a" / JOB)
    growing.grow(trials)
    sent = Sent(tmp_path / "other disk", growing.run)
    sent.snapshot()
    batches = []
    for _ in range(8):
        growing.grow(BATCH)
        batches.append(sent.snapshot())
    sent.close()
    # Another machine gets all of it.
    fresh = Sent(tmp_path / "other disk", RunFolder(tmp_path / "b" / JOB))
    assert mirrored_study(tmp_path / "b" / JOB) == mirrored_study(growing.run.path)
    assert (tmp_path / "b" / JOB / "events.jsonl").read_bytes() == growing.run.events_file.read_bytes()
    fresh.claim.close(final=False)
    return sum(batches) / len(batches), growing.run.study_file.stat().st_size


def mirrored_study(folder: Path) -> str:
    with closing(sqlite3.connect(folder / "study.db")) as db:
        return hashlib.sha256("\n".join(db.iterdump()).encode()).hexdigest()


def test_a_batch_sends_what_is_new(tmp_path: Path) -> None:
    sent, size = _bytes_a_batch(tmp_path, 1_000)
    assert size > 1_500_000
    assert sent < 100_000


@pytest.mark.slow
@pytest.mark.full("kills")
@pytest.mark.parametrize("trials", [3_000, 10_000])
def test_after_very_many_trials_a_batch_sends_no_more_than_after_a_thousand(tmp_path: Path, trials: int) -> None:
    sent, size = _bytes_a_batch(tmp_path, trials)
    assert size > 1_500 * trials
    assert sent < 100_000


def as_by_version_1(place: Place, folder: Path) -> None:
    """Make a mirror as the former version left it: every file in one object, no count of trials."""
    head = place.head()
    for path, entry in head["files"].items():
        data = (folder / path).read_bytes()
        if "layers" in entry or path == "study.db":
            name = f"{sha256(data)}.1-00000000"
            for layer in entry.get("layers", [entry]):
                place.put(f"{JOB}/objects/{layer['object']}", None)
            place.put(f"{JOB}/objects/{name}", data)
            head["files"][path] = {"sha256": sha256(data), "size": len(data), "object": name}
    head["version"] = 1
    del head["trials"]
    place.put(f"{JOB}/head.json", json.dumps(head).encode())


@pytest.mark.parametrize("place", ["file", "s3", "hub"], indirect=True)
def test_a_mirror_of_the_former_version_is_restored_and_gone_on_with(place: Place, tmp_path: Path) -> None:
    run = write_folder(tmp_path / "a" / JOB, ballast=400_000)
    save(place, run.path)
    assert place.head()["version"] == 2
    assert any("layers" in entry for entry in place.head()["files"].values())
    as_by_version_1(place, run.path)
    fresh = tmp_path / "b" / JOB
    claim = place.claim(fresh)
    assert mirrored(fresh) == mirrored(run.path)
    claim.start()
    add_trial(fresh / "study.db", 3)
    claim.request()
    assert claim.close()
    assert (place.head()["version"], place.head()["trials"]) == (2, 4)
    place.claim(tmp_path / "c" / JOB).close(final=False)
    assert len(trials_in(tmp_path / "c" / JOB / "study.db")) == 4
    # No object of the former layout is left but those of the previous snapshot.
    head = place.head()
    named = {layer["object"] for e in head["files"].values() for layer in e.get("layers", [e])} | set(head["previous"])
    assert place.objects() == {f"{JOB}/objects/{name}" for name in named}


@pytest.mark.parametrize("place", ["file", "s3", "hub"], indirect=True)
def test_a_layer_that_is_missing_or_damaged_is_a_torn_mirror(place: Place, tmp_path: Path) -> None:
    run = write_folder(tmp_path / "a" / JOB, ballast=400_000)
    claim = place.claim(run.path)
    claim.start()
    for number in range(3, 6):
        add(claim, run, number)
    assert claim.close()
    layers = place.head()["files"]["study.db"]["layers"]
    assert len(layers) > 1
    whole = place.contents()[name := f"{JOB}/objects/{layers[-1]['object']}"]
    for damage, said in ((whole[:-9], "not match their hash"), (None, "are missing")):
        place.put(name, damage)
        with pytest.raises(MirrorError, match=said):
            place.claim(tmp_path / "b" / JOB)


EMPTIED = {
    "without a byte": lambda file: file.write_bytes(b""),
    "gone": lambda file: file.unlink(),
    "with fewer trials": lambda file: _forget(file, 2),
    "torn": lambda file: file.write_bytes(file.read_bytes()[:9000]),
}


def _forget(file: Path, first: int) -> None:
    with closing(sqlite3.connect(file)) as db, db:
        db.execute("DELETE FROM trials WHERE number >= ?", (first,))


@pytest.mark.parametrize("damage", EMPTIED)
@pytest.mark.parametrize("former", [False, True])
def test_a_study_that_lost_trials_is_restored_from_its_mirror(
    file_place: Place, tmp_path: Path, damage: str, former: bool
) -> None:
    run = write_folder(tmp_path / "a" / JOB)
    save(file_place, run.path)
    if former:
        as_by_version_1(file_place, run.path)
    EMPTIED[damage](run.study_file)
    said: list[str] = []
    claim = file_place.claim(run.path, said=said)
    assert trials_in(run.study_file) == [(0, 5), (1, 5), (2, 5)]
    assert any("superseded-1" in line and "study" in line for line in said)
    claim.start()
    claim.request()
    assert claim.close()
    assert file_place.head()["trials"] == 3


@pytest.mark.parametrize("damage", ["without a byte", "gone", "with fewer trials"])
def test_a_study_that_is_lost_in_the_run_is_not_mirrored_over(file_place: Place, tmp_path: Path, damage: str) -> None:
    run = write_folder(tmp_path / "a" / JOB)
    save(file_place, run.path)
    said: list[str] = []
    claim = file_place.claim(run.path, said=said)
    claim.start()
    EMPTIED[damage](run.study_file)
    run.state_file.write_text("{}")
    claim.request()
    wait_until(lambda: any("the checkpoint is not overwritten" in line for line in said), str(said))
    claim.close(seconds=1.0)
    assert file_place.head()["generation"] == 1
    file_place.close()
    file_place.opened.clear()


def commits(place: Place) -> int:
    return len(place.server.repo("model", REPO).history())


def test_a_hub_mirror_squashes_its_history(hub_place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_history, "_LONGEST", 5)
    hub_place.server.page_size = 5
    run = write_folder(tmp_path / "a" / JOB, ballast=300_000)
    claim = hub_place.claim(run.path)
    claim.start()
    longest = 0
    for number in range(3, 15):
        add(claim, run, number)
        longest = max(longest, commits(hub_place))
    assert claim.close()
    assert longest <= 7
    fresh = tmp_path / "b" / JOB
    # The next runner after a long history squashes it with its first commit.
    for _ in range(8):
        hub_place.server.repo("model", REPO).commit({"note": Random(_).randbytes(9)})
    hub_place.claim(fresh).close(final=False)
    assert commits(hub_place) <= 3
    assert len(trials_in(fresh / "study.db")) == 15


def test_a_reader_at_a_revision_that_is_squashed_meanwhile_looks_again(hub_place: Place, tmp_path: Path) -> None:
    run = write_folder(tmp_path / "a" / JOB)
    save(hub_place, run.path)
    repo = hub_place.server.repo("model", REPO)
    with hub_place.mirror() as mirror:
        stored = mirror._store.read(JOB)
        repo.squash("main", "Checkpoint", "cook")
        entry = mirror.jobs()[0].files["job.json"]
        mirror._store.read(JOB)
        repo.squash("main", "Checkpoint again", "cook")
        mirror._store.fetch(JOB, entry, tmp_path / "job.json")
        assert (tmp_path / "job.json").read_bytes() == run.job_file.read_bytes()
        assert mirror._store.read(JOB).data == stored.data


def test_a_runner_that_lost_its_lease_cannot_write_after_a_squash(
    hub_place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other's head comes between the former runner's last commit and its squash."""
    monkeypatch.setattr(hub_history, "_LONGEST", 2)
    run = write_folder(tmp_path / "a" / JOB)
    claim = hub_place.claim(run.path, QUICK)
    claim.start()
    claim.request()
    wait_until(lambda: claim.head.generation == 1, "no snapshot")
    repo, history = hub_place.server.repo("model", REPO), claim._store._history
    asked = history._has_other_runners

    def overtaken(job: str) -> bool:
        head = hub_place.head()
        head["lease"] = {**head["lease"], "runner": "f" * 32, "host": "elsewhere"}
        repo.commit({f"{JOB}/head.json": json.dumps(head).encode()})
        return bool(asked(job))

    monkeypatch.setattr(history, "_has_other_runners", overtaken)
    add_trial(run.study_file, 3)
    claim.request()
    wait_until(lambda: hub_place.head()["lease"]["runner"] == "f" * 32, "not overtaken")
    add_trial(run.study_file, 4)
    claim.request()
    wait_until(lambda: claim._holding.lost is not None, "the loss was not noticed")
    with pytest.raises(HeldError, match="has taken it over"):
        claim.check()
    claim.close(seconds=1)
    assert hub_place.head()["lease"]["runner"] == "f" * 32


def test_a_history_is_kept_while_another_job_writes_to_it(
    hub_place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_history, "_LONGEST", 3)
    one = write_folder(tmp_path / "a" / JOB)
    other = hub_place.mirror().claim(RunFolder(tmp_path / job_id({"seed": 9})), {"seed": 9}, print)
    claim = hub_place.claim(one.path)
    claim.start()
    for number in range(3, 9):
        add(claim, one, number)
    kept = commits(hub_place)
    assert kept >= 8
    other.close(final=False)
    for number in range(9, 13):
        add(claim, one, number)
    assert claim.close()
    assert commits(hub_place) < kept


def test_a_squash_that_fails_is_said_and_the_mirror_goes_on(
    hub_place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub_history, "_LONGEST", 3)
    hub_place.server.fail("POST", "*/super-squash/*", status=403)
    run, said = write_folder(tmp_path / "a" / JOB), list[str]()
    store = HubStore(hub_place.uri, pace=CALM, report=said.append)
    claim = Mirror(store, required=False).claim(run, IDENTITY, said.append)
    claim.start()
    for number in range(3, 8):
        add(claim, run, number)
    assert claim.close()
    store.close()
    assert any("cannot squash" in line for line in said)
    hub_place.claim(tmp_path / "b" / JOB).close(final=False)
    assert len(trials_in(tmp_path / "b" / JOB / "study.db")) == 8
