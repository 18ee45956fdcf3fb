"""Delivery to the Hub: the real client against a loopback Hub with injected faults."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub.utils import close_session

from job.errors import DeliveryError, MachineError, UsageError
from job.export.merged import seal
from job.records import Manifest
from job.storage.exports import DONE, MANIFEST
from job.system import hub_client as client
from job.upload.hub import HubOptions, deliver, parse_target, prepare, probe
from tests.fakes.hub import LoopbackHub, Repo

# Warnings of the client's HTTP library about the client's uploads.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CHUNK = 20_000
SECRET = "hf_CookWritesALotOfSoup0123"
CARD = "---\nlicense: mit\n---\nSoup without salt.\n"
URI = "hf://cook/soup"


def weights(seed: int, size: int) -> bytes:
    return bytes([0, seed]) + bytes((seed * 31 + n * 7) % 251 for n in range(size - 2))


def export_of(folder: Path, files: dict[str, bytes], card: str = CARD) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    seal(folder, lambda _: {"README.md": card.encode()})
    return folder


def first_trial(folder: Path) -> Path:
    """Write four LFS files, one of them in three parts, and small ones for git."""
    shards = {f"model-0000{n}-of-00004.safetensors": weights(n, 15_000) for n in (1, 2, 3)}
    shards["model-00004-of-00004.safetensors"] = weights(4, 50_000)
    return export_of(folder, {"config.json": b'{"layers": 4}\n', "empty.txt": b"", **shards})


def second_trial(folder: Path) -> Path:
    """Write fewer files, which share a name and a shard with the first trial."""
    shards = {
        "model-00001-of-00004.safetensors": weights(9, 15_000),
        "model-00002-of-00004.safetensors": weights(2, 15_000),
    }
    return export_of(folder, {"config.json": b'{"layers": 2}\n', **shards}, CARD + "Less soup.\n")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(chunk_size=CHUNK) as running:
        # Read at import: variables of the environment come too late in this process.
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.endpoint)
        template = running.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
        monkeypatch.setenv("HF_TOKEN", SECRET)
        running.add_token(SECRET, "cook", namespaces=["kitchen"])
        yield running
        close_session()
        assert running.errors == []
        assert running.strays == []


@dataclass
class Sender:
    """Delivers and keeps all messages."""

    said: list[str] = field(default_factory=list)
    arrived: int = 0
    on_arrival: Callable[[int], None] = lambda _: None

    def __call__(self, export: Path, uri: str = URI, **options: Any) -> str:
        self.arrived = 0
        return deliver(export, uri, HubOptions(**options), report=self.said.append, progress=self._progress)

    def _progress(self, files: int) -> None:
        self.arrived += files
        self.on_arrival(self.arrived)

    def fails(self, export: Path, *parts: str, uri: str = URI, **options: Any) -> DeliveryError:
        """Assert one line with these parts, a remedy, and no token anywhere in the failure."""
        with pytest.raises(DeliveryError) as caught:
            self(export, uri, **options)
        error = caught.value
        assert error.exit_code == 6
        assert error.remedy
        for part in parts:
            assert part in error.line, (part, error.line)
        chain: BaseException | None = error
        while chain is not None:
            assert SECRET not in f"{chain!r} {chain}"
            chain = chain.__cause__
        return error


@pytest.fixture
def send(capfd: pytest.CaptureFixture[str]) -> Iterator[Sender]:
    sender = Sender()
    yield sender
    printed = capfd.readouterr()
    assert SECRET not in printed.out + printed.err + "".join(sender.said)
    assert "signature=" not in printed.out + printed.err + "".join(sender.said)


def holds(repo: Repo, export: Path, revision: str = "main") -> None:
    names = {path.name for path in export.iterdir() if path.name != DONE}
    assert names <= set(repo.paths(revision))
    for name in names:
        assert repo.read(name, revision) == (export / name).read_bytes(), name


def never_mixed(repo: Repo, *, foreign: frozenset[str] = frozenset(), revision: str = "main") -> int:
    """Assert that every commit holds the files of exactly one manifest, or none; return the number of manifests."""
    manifests = 0
    for commit in repo.history(revision):
        files = {name: blob for name, blob in commit.files.items() if name not in foreign | {".gitattributes"}}
        if MANIFEST not in files:
            assert not [name for name in files if name != "README.md"]
            continue
        manifests += 1
        manifest = Manifest.model_validate_json(files.pop(MANIFEST).read())
        assert {name: (blob.sha256, blob.size) for name, blob in files.items()} == {
            name: (entry.sha256, entry.size) for name, entry in manifest.files.items()
        }
    return manifests


def put_bytes(hub: LoopbackHub) -> int:
    return sum(request.received for request in hub.asked("PUT", "/upload/*"))


def size_of(export: Path) -> int:
    return sum(path.stat().st_size for path in export.glob("*.safetensors"))


# --- deliveries and their visibility ---------------------------------------------------------------------


def test_a_fresh_private_delivery_arrives_whole_and_a_second_one_sends_nothing(
    hub: LoopbackHub, send: Sender, tmp_path: Path
) -> None:
    export = first_trial(tmp_path / "trial-0001")
    done = send(export, commit_message="Trial 1: refusals 3/100, KL 0.02")
    repo = hub.repo("model", "cook/soup")
    assert done == f"{hub.endpoint}/cook/soup/commit/{repo.sha}"
    assert repo.private
    holds(repo, export)
    assert DONE not in repo.paths()
    assert [commit.title for commit in repo.history()] == ["Trial 1: refusals 3/100, KL 0.02", "initial commit"]
    assert never_mixed(repo) == 1
    assert len(hub.asked("PUT", "/upload/*[0-9a-f]/[0-9]")) == 3  # the parts of the largest
    assert put_bytes(hub) == size_of(export)
    assert send.arrived == len(Manifest.model_validate_json((export / MANIFEST).read_bytes()).files) + 1

    hub.forget()
    start = time.monotonic()
    assert send(export) == done
    assert time.monotonic() - start < 1
    assert {request.method for request in hub.requests} == {"GET"}
    assert send.arrived == 9
    assert send.said == []


def test_the_gate_stands_before_the_first_file_and_the_page_is_shown_last(
    hub: LoopbackHub, send: Sender, tmp_path: Path
) -> None:
    export = first_trial(tmp_path / "export")
    shown: list[tuple[bool, bool | str]] = []

    def look(_: int) -> None:
        repo = hub.repo("model", "cook/soup")
        shown.append((repo.private, repo.gated))

    send.on_arrival = look
    send(export, visibility="gated")
    repo = hub.repo("model", "cook/soup")
    assert (repo.private, repo.gated) == (False, "auto")
    assert set(shown) == {(True, "auto")}
    changes = [request.path for request in hub.requests if request.method in ("PUT", "POST")]
    settings = [index for index, path in enumerate(changes) if path.endswith("/settings")]
    files = [index for index, path in enumerate(changes) if "/preupload/" in path or "/upload/" in path]
    assert settings[0] < files[0]
    assert settings[-1] == len(changes) - 1 > changes.index("/api/models/cook/soup/commit/main")
    hub.forget()
    send(export, visibility="gated")
    assert {request.method for request in hub.requests} == {"GET"}


def test_a_public_delivery_is_shown_when_it_is_complete(hub: LoopbackHub, send: Sender, tmp_path: Path) -> None:
    export = first_trial(tmp_path / "export")
    hub.fail("PUT", "*/settings", status=403, message="Not today")
    send.fails(export, "showing cook/soup (403)", "Not today", visibility="public")
    repo = hub.repo("model", "cook/soup")
    assert repo.private
    hub.forget()
    send(export, visibility="public")
    assert (repo.private, repo.gated, put_bytes(hub)) == (False, False, 0)
    assert never_mixed(repo) == 1


def test_a_public_repository_is_no_place_for_a_private_delivery(hub: LoopbackHub, send: Sender, tmp_path: Path) -> None:
    export = first_trial(tmp_path / "export")
    repo = hub.add_model("cook/soup", {"recipe.txt": b"Boil."})
    send.fails(export, "cook/soup is public", "make it private")
    assert len(repo.history()) == 1
    assert {request.method for request in hub.requests} == {"GET"}
    assert probe(URI, HubOptions()).ok is False
    assert "is public" in probe(URI, HubOptions()).what
    send(export, visibility="public")
    holds(repo, export)
    assert repo.read("recipe.txt") == b"Boil."


@pytest.mark.parametrize("visibility", ["public", "gated"])
def test_what_else_a_private_repository_held_is_not_made_public(
    hub: LoopbackHub, send: Sender, tmp_path: Path, visibility: str
) -> None:
    export = first_trial(tmp_path / "export")
    diary = hub.add_model("cook/diary", {"diary.txt": b"Secret."}, private=True)
    uri = "hf://cook/diary"
    send.fails(export, "would become public", uri=uri, visibility=visibility)
    assert not probe(uri, HubOptions(visibility=visibility)).ok
    diary.commit({"diary.txt": None})  # still in its history
    send.fails(export, "would become public", uri=uri, visibility=visibility)
    side = hub.add_model("cook/side", {"README.md": b"Mine."}, private=True)
    side.branches["other"] = "0" * 40
    send.fails(export, "would become public", uri="hf://cook/side", visibility=visibility)
    assert put_bytes(hub) == 0
    # Nor if a private delivery has already put everything in place.
    send(export, "hf://cook/diary")
    send.fails(export, "would become public", uri=uri, visibility=visibility)
    assert diary.private
    assert side.private


def test_a_stricter_gate_stays(hub: LoopbackHub, send: Sender, tmp_path: Path) -> None:
    repo = hub.add_model("cook/soup", {"README.md": b"Mine."}, gated="manual")
    send(second_trial(tmp_path / "export"), visibility="gated")
    assert (repo.private, repo.gated) == (False, "manual")


# --- replacing, and foreign files -------------------------------------------------------------------------


def test_shards_of_two_trials_never_mix(hub: LoopbackHub, send: Sender, tmp_path: Path) -> None:
    first, second = first_trial(tmp_path / "1"), second_trial(tmp_path / "2")
    send(first)
    repo = hub.repo("model", "cook/soup")
    repo.commit({"notes.txt": b"Mine."}, "notes")
    hub.forget()
    # On its way it is interrupted after every single file.
    for stop_after in range(5):
        seen = 0

        def stop(arrived: int, limit: int = stop_after) -> None:
            nonlocal seen
            seen += 1
            if seen > limit:
                raise KeyboardInterrupt

        send.on_arrival = stop
        with pytest.raises(KeyboardInterrupt):
            send(second)
        holds(repo, first)
    send.on_arrival = lambda _: None
    send(second)
    holds(repo, second)
    assert repo.paths() == sorted(
        {".gitattributes", "notes.txt", *(p.name for p in second.iterdir() if p.name != DONE)}
    )
    assert never_mixed(repo, foreign=frozenset({"notes.txt"})) == 3
    assert put_bytes(hub) == 15_000  # the other shard was there, and the interruptions cost nothing
    assert send.said[-1] == "cook/soup holds other files beside the delivery's: notes.txt"


def test_files_of_others_are_left_alone_and_not_overwritten(hub: LoopbackHub, send: Sender, tmp_path: Path) -> None:
    export = first_trial(tmp_path / "export")
    repo = hub.add_model(
        "cook/soup", {"config.json": b"{}", "README.md": b"Mine.", "a/b.bin": b"\0x", "empty.txt": b""}, private=True
    )
    send.fails(export, "cook/soup holds other files of the same names: README.md, config.json")
    assert len(repo.history()) == 1
    assert put_bytes(hub) == 0
    repo.commit({"config.json": None, "README.md": None, "manifest.json": b'{"name": "app"}'})
    send.fails(export, "same names: manifest.json")
    repo.commit({"manifest.json": None})
    send(export)
    holds(repo, export)
    assert repo.read("a/b.bin") == b"\0x"


def test_the_readme_of_a_fresh_repository_gives_way(hub: LoopbackHub, send: Sender, tmp_path: Path) -> None:
    repo = hub.add_model("cook/soup", {"README.md": b"---\nlicense: mit\n---\n", ".gitattributes": b""}, private=True)
    send(first_trial(tmp_path / "export"))
    assert repo.read("README.md").decode() == CARD


def test_somebody_commits_meanwhile(hub: LoopbackHub, send: Sender, tmp_path: Path) -> None:
    export = first_trial(tmp_path / "export")

    def interfere(arrived: int) -> None:
        if arrived == 3:
            hub.repo("model", "cook/soup").commit({"notes.txt": b"Mine."}, "notes")

    send.on_arrival = interfere
    send(export)
    repo = hub.repo("model", "cook/soup")
    holds(repo, export)
    assert [request.status for request in hub.asked("POST", "*/commit/main")] == [412, 200]
    assert repo.read("notes.txt") == b"Mine."
    assert put_bytes(hub) == size_of(export)


def test_a_branch_and_a_pull_request(hub: LoopbackHub, send: Sender, tmp_path: Path) -> None:
    first, second = first_trial(tmp_path / "1"), second_trial(tmp_path / "2")
    send(first, f"{URI}@trials/one")
    repo = hub.repo("model", "cook/soup")
    holds(repo, first, "trials/one")
    assert repo.paths() == [".gitattributes"]
    send(first)
    # The answer about the pull request is lost: there is still one, not two.
    hub.drop("POST", "*/commit/main")
    url = send(second, pull_request=True, commit_message="Trial 2")
    assert url == f"{hub.endpoint}/cook/soup/discussions/1"
    assert send(second, pull_request=True, commit_message="Trial 2") == url
    assert list(repo.pulls) == [1]
    holds(repo, first)
    holds(repo, second, "refs/pr/1")
    repo.merge(repo.pulls[1], "cook")
    holds(repo, second)
    assert never_mixed(repo) == 2
    assert send(second, pull_request=True, commit_message="Trial 2") == f"{hub.endpoint}/cook/soup/commit/{repo.sha}"


# --- faults -----------------------------------------------------------------------------------------------


def test_a_busy_and_a_broken_hub_are_waited_for(hub: LoopbackHub, send: Sender, tmp_path: Path) -> None:
    export = first_trial(tmp_path / "export")
    hub.fail("POST", "/api/repos/create", status=429, headers={"Retry-After": "1"})
    hub.fail("POST", "*/preupload/*", status=429, headers={"RateLimit": '"api";r=0;t=1'})
    hub.fail("POST", "*/commit/main", status=503)
    cut = hub.cut("/upload/*", after_bytes=5000, skip=1)
    hub.fail("PUT", "/upload/*", status=500, skip=3)
    start = time.monotonic()
    send(export)
    assert time.monotonic() - start > 3
    repo = hub.repo("model", "cook/soup")
    holds(repo, export)
    assert never_mixed(repo) == 1
    assert cut.hits == 1
    assert [request.status for request in hub.asked("POST", "/api/repos/create")] == [429, 200]
    assert any("answers 429" in line and "trying again in 1 s" in line for line in send.said)
    assert any("answers 503" in line for line in send.said)
    # Only the file that was cut and the one that was refused are sent twice.
    assert put_bytes(hub) <= size_of(export) + 15_000 + CHUNK


def test_a_hub_that_stays_broken_is_given_up_after_a_while(hub: LoopbackHub, send: Sender, tmp_path: Path) -> None:
    hub.fail("GET", "/api/whoami-v2", status=503, times=None)
    with pytest.raises(DeliveryError, match="answers 503 for the token") as caught:
        probe(URI, HubOptions(), report=send.said.append)
    assert isinstance(caught.value.__cause__, MachineError)
    assert len(send.said) == 5
    assert len(hub.asked("GET", "/api/whoami-v2")) == 6


def test_a_commit_whose_answer_is_lost_is_found(hub: LoopbackHub, send: Sender, tmp_path: Path) -> None:
    export = first_trial(tmp_path / "export")
    hub.drop("POST", "*/commit/main")
    send(export)
    repo = hub.repo("model", "cook/soup")
    assert len(repo.history()) == 2
    holds(repo, export)


def test_a_denied_write_is_one_line_that_says_what_to_do(
    hub: LoopbackHub, send: Sender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = first_trial(tmp_path / "export")
    hub.add_token("hf_GuestReadsSoup0123456789", "guest", role="read")
    repo = hub.add_model("cook/soup", {"README.md": b"Mine."})
    monkeypatch.setenv("HF_TOKEN", "hf_GuestReadsSoup0123456789")
    send.fails(
        export, "refuses", "(403)", "check HF_TOKEN and its rights", "run the same command again", visibility="public"
    )
    assert len(repo.history()) == 1
    send.fails(export, "making cook/new (403)", "rights to create", uri="hf://cook/new")
    monkeypatch.setenv("HF_TOKEN", "hf_UnknownToAnybody0123456")
    send.fails(export, "(401)", "check HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "two words")
    assert "two words" not in send.fails(export, "holds a space").line
    monkeypatch.delenv("HF_TOKEN")
    send.fails(export, "there is no token", "set HF_TOKEN")
    (Path(huggingface_hub.constants.HF_TOKEN_PATH)).write_text(f"{SECRET}\n")
    send(export, visibility="public")
    holds(repo, export)


def test_a_full_account_is_named_as_such(hub: LoopbackHub, send: Sender, tmp_path: Path) -> None:
    hub.fail("POST", "*/info/lfs/objects/batch", status=403, message="Private storage limit reached, upgrade")
    export = first_trial(tmp_path / "export")
    send.fails(export, "for cook/soup (403)", "Private storage limit reached")
    # So is a refusal by the storage, which the client wraps in an error of another type.
    hub.fail("PUT", "/upload/*", status=403, message="Out of space")
    send.fails(export, "refuses model-00001-of-00004.safetensors for cook/soup (403)", "Out of space")


def test_a_token_revoked_on_the_way_and_a_new_one_sends_what_is_missing(
    hub: LoopbackHub, send: Sender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = first_trial(tmp_path / "export")
    before = {path.name: path.read_bytes() for path in export.iterdir()}

    def revoke(arrived: int) -> None:
        if arrived == 5:
            hub.revoke(SECRET)

    send.on_arrival = revoke
    send.fails(export, "(401)", "check HF_TOKEN")
    repo = hub.repo("model", "cook/soup")
    assert repo.paths() == [".gitattributes"]
    assert 0 < put_bytes(hub) < size_of(export)
    assert {path.name: path.read_bytes() for path in export.iterdir()} == before
    new = "hf_CookHasAnotherToken01234"
    hub.add_token(new, "cook")
    monkeypatch.setenv("HF_TOKEN", new)
    send.on_arrival = lambda _: None
    send(export)
    holds(repo, export)
    assert put_bytes(hub) == size_of(export)  # both attempts together: no byte twice


SCRIPT = """
import sys
from pathlib import Path
from job.upload.hub import HubOptions, deliver
deliver(Path(sys.argv[1]), "hf://cook/soup", HubOptions(), report=print, progress=lambda files: None)
"""


def test_killed_on_the_way_it_sends_no_more_than_one_file_again(hub: LoopbackHub, send: Sender, tmp_path: Path) -> None:
    export = first_trial(tmp_path / "export")
    environment = {**os.environ, **hub.environment(tmp_path / "home", SECRET)}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(export)]
    hub.fail("PUT", "/upload/*", status=503)
    for kill, skip in enumerate((2, 1)):
        # The file or part after the next is delayed, and the process is killed meanwhile.
        hub.delay("PUT", "/upload/*", seconds=0.5, times=1, skip=skip)
        target = len(hub.asked("PUT", "/upload/*")) + skip + 1
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while len(hub.asked("PUT", "/upload/*")) < target:
            assert process.poll() is None, process.communicate()[0].decode()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        printed = process.communicate()[0].decode()
        assert process.returncode == -signal.SIGKILL
        assert SECRET not in printed
        assert ("HTTP Error 503 thrown while requesting PUT" in printed, "signature=" in printed) == (kill == 0, False)
        assert hub.repo("model", "cook/soup").paths() == [".gitattributes"], kill
        time.sleep(0.6)  # the delayed requests have ended as well
    send(export)
    repo = hub.repo("model", "cook/soup")
    holds(repo, export)
    assert never_mixed(repo) == 1
    largest = max(path.stat().st_size for path in export.glob("*.safetensors"))
    assert put_bytes(hub) <= size_of(export) + 2 * largest
    assert all(SECRET not in path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())


def test_what_is_not_as_it_was_sent_is_found(hub: LoopbackHub, send: Sender, tmp_path: Path) -> None:
    export = first_trial(tmp_path / "export")
    for name in ("model-00002-of-00004.safetensors", "config.json"):
        repo = hub.find_repo("model", "cook/soup")
        if repo is not None:
            hub.remove(repo)
        hub.delay("GET", "*/revision/main", seconds=0.2)

        def tamper(name: str = name) -> None:
            while len((repo := hub.repo("model", "cook/soup")).history()) < 2:
                time.sleep(0.01)
            content = (export / name).read_bytes()
            repo.commit({name: content[:-1] + b"!"}, "tampered")

        prepare(URI, HubOptions(), report=send.said.append)
        thread = threading.Thread(target=tamper)
        thread.start()
        send.fails(export, f"main of cook/soup does not hold what was sent: {name}")
        thread.join()
        hub.faults.clear()
        send(export)
        holds(hub.repo("model", "cook/soup"), export)


def test_an_export_that_is_not_what_it_was_is_not_published(hub: LoopbackHub, send: Sender, tmp_path: Path) -> None:
    export = first_trial(tmp_path / "export")
    shard = export / "model-00004-of-00004.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + b"!")
    send.fails(export, "is not what the export's manifest says")
    shard.unlink()
    send.fails(export, "is not what the export's manifest says")
    assert hub.repo("model", "cook/soup").paths() == [".gitattributes"]
    shard.write_bytes(good)
    (export / DONE).unlink()
    send.fails(export, "is not a complete export")
    bad_card = export_of(tmp_path / "bad", {"w.safetensors": weights(1, 999)}, "---\nlicense: [\n---\n")
    send.fails(bad_card, "the metadata of README.md")
    assert not hub.asked(
        "PUT", f"*{Manifest.model_validate_json((bad_card / MANIFEST).read_bytes()).files['w.safetensors'].sha256}"
    )


# --- before anything is sent ------------------------------------------------------------------------------


def test_targets_are_understood() -> None:
    assert parse_target("hf://cook/soup@a/b", HubOptions()).branch == "a/b"
    assert parse_target("hf://cook/soup", HubOptions(revision="v2")).branch == "v2"
    for uri in (
        "hf://soup",
        "hf://datasets/soup",
        "hf://cook/soup/x",
        "hf://cook/so up",
        "hf://cook/-soup",
        "s3://a/b",
    ):
        with pytest.raises(UsageError):
            parse_target(uri, HubOptions())
    with pytest.raises(UsageError, match="two branches"):
        parse_target("hf://cook/soup@a", HubOptions(revision="b"))
    with pytest.raises(UsageError, match="pull request"):
        parse_target("hf://cook/soup@a", HubOptions(pull_request=True))
    assert SECRET not in repr(HubOptions(token=SECRET))


def test_the_probe_proves_what_it_can_and_leaves_nothing(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_model("cook/soup", {"w.bin": b"\0"}, private=True)
    hub.add_model("cook/open", {"w.bin": b"\0"})
    scopes: dict[str, tuple[str, Any]] = {
        "hf_Reads": ("read", []),
        "hf_Fine": ("fine-grained", {"cook": "write"}),
        "hf_FineRepo": ("fine-grained", {"cook/soup": "write", "kitchen": "read"}),
    }
    for value, (role, namespaces) in scopes.items():
        hub.add_token(value, "cook", role=role, namespaces=namespaces)

    def ok(token: str, uri: str, **options: Any) -> bool:
        found = probe(uri, HubOptions(token=token, **options))
        assert found.what
        assert bool(found.remedy) is not found.ok
        return found.ok

    assert [ok(SECRET, uri) for uri in (URI, "hf://cook/new", "hf://kitchen/new", "hf://guest/new")] == [
        *(True, True, True, False)
    ]
    assert [ok("hf_Reads", uri) for uri in (URI, "hf://cook/new")] == [False, False]
    assert [ok("hf_Fine", uri) for uri in (URI, "hf://cook/new", "hf://kitchen/new")] == [True, True, False]
    assert [ok("hf_FineRepo", uri) for uri in (URI, "hf://cook/new", "hf://kitchen/new")] == [True, False, False]
    assert not ok("hf_Unknown", URI)
    assert not ok(SECRET, "hf://cook/open")
    assert ok(SECRET, "hf://cook/open", visibility="public")
    assert ok(SECRET, "hf://cook/open", visibility="public", pull_request=True)
    assert not ok("hf_Reads", "hf://cook/open", visibility="public", pull_request=True)
    assert {request.method for request in hub.requests} == {"GET"}
    assert len(hub.repos()) == 2
