"""The loopback hub, with the real clients: huggingface_hub in this process, datasets and transformers in others."""

from __future__ import annotations

import gzip
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import CommitOperationDelete, HfApi, HfFileSystem
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import close_session

from tests.fakes.hub import LoopbackHub
from tests.helpers import environment, run_script

# Warnings of the client's HTTP library about the client's uploads.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CHUNK = 1000
WEIGHTS = bytes(range(256)) * 40  # binary, so an LFS file by its content as well as by its name
PARTS = 11  # chunks of the weights

C4_CARD = b"""---
license: odc-by
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
- config_name: de
  data_files:
  - split: train
    path: de/*.json.gz
---
Kitchen sentences from all over the web.
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    # Read at import: variables of the environment come too late in this process.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nowhere/token")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with LoopbackHub(chunk_size=CHUNK, usual=True) as running:
        running.add_token("cook-writes", "cook", role="write", namespaces=["kitchen"])
        running.add_token("cook-reads", "cook", role="read")
        running.add_token("guest-writes", "guest", role="write")
        running.add_token("guest-reads", "guest", role="read")
        yield running
        close_session()
        assert running.errors == []


def api(hub: LoopbackHub, token: str | bool = False) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=token)


def jsonl(count: int, text: str = "Stir the soup") -> bytes:
    return "".join(json.dumps({"text": f"{text} {number} times."}) + "\n" for number in range(count)).encode()


def run(hub: LoopbackHub, home: Path, code: str, token: str | None = None) -> dict[str, object]:
    """Run code in a process that knows the hub only by its environment; it prints JSON."""
    done = run_script(code, env={**environment(), **hub.environment(home, token)}).check()
    return json.loads(done.out.splitlines()[-1])


def folder_of(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


# Accounts


def test_whoami_tells_user_role_and_scopes(hub: LoopbackHub) -> None:
    cook = api(hub, "cook-writes").whoami()
    assert (cook["name"], cook["auth"]["accessToken"]["role"]) == ("cook", "write")
    assert [organization["name"] for organization in cook["orgs"]] == ["kitchen"]

    hub.add_token("fine", "cook", role="fine-grained", namespaces={"cook/soup": "write", "kitchen": "read"})
    access_token = api(hub, "fine").whoami()["auth"]["accessToken"]
    assert access_token["role"] == "fineGrained"
    assert {scope["entity"]["name"]: scope["permissions"] for scope in access_token["fineGrained"]["scoped"]} == {
        "cook/soup": ["repo.content.read", "repo.write"],
        "kitchen": ["repo.content.read"],
    }


def test_a_revoked_token_is_refused_even_for_what_is_public(hub: LoopbackHub) -> None:
    hub.add_model("cook/soup", {"recipe.txt": b"Boil water."})
    client = api(hub, "guest-reads")
    assert client.model_info("cook/soup").private is False
    hub.revoke("guest-reads")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        client.whoami()
    with pytest.raises(HfHubHTTPError, match="401") as refused:
        client.model_info("cook/soup")
    assert not isinstance(refused.value, RepositoryNotFoundError)


def test_auth_check_tells_who_may_read_and_write(hub: LoopbackHub) -> None:
    hub.add_model("cook/soup", {}, private=True)
    hub.add_model("cook/bread", {})
    api(hub, "cook-writes").auth_check("cook/soup", write=True)
    api(hub, "cook-reads").auth_check("cook/soup")
    api(hub).auth_check("cook/bread")
    for token, repo in (("cook-reads", "cook/soup"), ("guest-writes", "cook/bread")):
        with pytest.raises(HfHubHTTPError) as refused:
            api(hub, token).auth_check(repo, write=True)
        assert refused.value.response.status_code == 403
    for token in ("guest-writes", False):
        with pytest.raises(RepositoryNotFoundError):
            api(hub, token).auth_check("cook/soup")


def test_a_fine_grained_token_writes_only_where_it_may(hub: LoopbackHub) -> None:
    hub.add_token("fine", "cook", role="fine-grained", namespaces={"cook/soup": "write", "cook/bread": "read"})
    for name in ("soup", "bread", "cake"):
        hub.add_model(f"cook/{name}", {"recipe.txt": b"Boil water."}, private=True)
    client = api(hub, "fine")
    client.auth_check("cook/soup", write=True)
    client.auth_check("cook/bread")
    with pytest.raises(HfHubHTTPError, match="403"):
        client.auth_check("cook/bread", write=True)
    with pytest.raises(RepositoryNotFoundError):
        client.auth_check("cook/cake")
    with pytest.raises(HfHubHTTPError, match="under the namespace"):
        client.create_repo("cook/stew")


# Reading


def test_listings_follow_pages_and_know_large_files(hub: LoopbackHub) -> None:
    hub.page_size = 2
    files = {f"menu/{number}.txt": b"Soup." for number in range(5)}
    repo = hub.add_model("cook/soup", {"README.md": b"---\nlicense: mit\n---\nSoup.\n", "w.bin": WEIGHTS, **files})
    client = api(hub)
    info = client.model_info("cook/soup", files_metadata=True)
    assert (info.sha, info.private, info.gated, info.card_data.license) == (repo.sha, False, False, "mit")
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings}
    assert sizes == {"README.md": 27, "w.bin": len(WEIGHTS), **dict.fromkeys(files, 5)}

    assert sorted(client.list_repo_files("cook/soup")) == repo.paths()
    assert [entry.path for entry in client.list_repo_tree("cook/soup")] == ["README.md", "menu", "w.bin"]
    assert len(list(client.list_repo_tree("cook/soup", "menu", expand=True))) == 5
    with pytest.raises(EntryNotFoundError):
        list(client.list_repo_tree("cook/soup", "nothing"))
    readme, weights = client.get_paths_info("cook/soup", ["README.md", "w.bin", "nothing"])
    assert readme.lfs is None
    assert weights.lfs.size == len(WEIGHTS)
    assert [found.id for found in client.list_models(author="cook")] == ["cook/soup"]

    repo.commit({"w.bin": None}, "Take the weights away")
    commits = client.list_repo_commits("cook/soup")
    assert [commit.title for commit in commits] == ["Take the weights away", "initial commit"]
    assert client.list_repo_refs("cook/soup").branches[0].target_commit == repo.sha == commits[0].commit_id


def test_large_files_come_from_the_storage_without_the_token(hub: LoopbackHub, tmp_path: Path) -> None:
    repo = hub.add_model("cook/soup", {"recipe.txt": b"Boil water.", "a b/w.bin": WEIGHTS}, private=True)
    client = api(hub, "cook-reads")
    for name in repo.paths():
        path = client.hf_hub_download("cook/soup", name, cache_dir=tmp_path)
        assert Path(path).read_bytes() == repo.read(name)
        assert Path(path).parents[name.count("/")].name == repo.sha
    stored = hub.asked("GET", "/cdn/*/a b/w.bin")
    assert [(request.sent, request.authorized) for request in stored] == [(len(WEIGHTS), False)]
    assert all(request.authorized for request in hub.asked("*", "/cook/soup/resolve/*"))

    hub.forget()
    client.hf_hub_download("cook/soup", "a b/w.bin", cache_dir=tmp_path)
    assert hub.bytes_sent() == 0


def test_names_may_have_any_letters(hub: LoopbackHub, tmp_path: Path) -> None:
    names = ["Kräuter/Grüne Soße #1 100%.txt", "Kräuter/🍲?.bin"]
    client = api(hub, "cook-writes")
    client.create_repo("cook/soup")
    for name in names:
        client.upload_file(path_or_fileobj=WEIGHTS[:500], path_in_repo=name, repo_id="cook/soup")
        path = client.hf_hub_download("cook/soup", name, cache_dir=tmp_path)
        assert Path(path).read_bytes() == WEIGHTS[:500]
    assert sorted(client.list_repo_files("cook/soup")) == [".gitattributes", *names]
    assert hub.bytes_sent(f"/cdn/*/{names[0]}") == 500
    with pytest.raises(EntryNotFoundError):
        client.hf_hub_download("cook/soup", "🍞.txt", cache_dir=tmp_path)


def test_a_cut_download_is_resumed_with_a_range(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The client keeps whole chunks only, and its own are of ten megabytes.
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    hub.add_model("cook/soup", {"w.bin": WEIGHTS})
    rule = hub.cut("/cdn/*/w.bin", after_bytes=4000)
    path = api(hub).hf_hub_download("cook/soup", "w.bin", cache_dir=tmp_path)
    assert Path(path).read_bytes() == WEIGHTS
    first, second = hub.asked("GET", "/cdn/*")
    assert (rule.hits, first.sent, second.sent) == (1, 4000, len(WEIGHTS) - 4000)
    assert (first.status, second.status, second.headers["range"]) == (200, 206, "bytes=4000-")


def test_a_snapshot_keeps_to_the_revision(hub: LoopbackHub, tmp_path: Path) -> None:
    repo = hub.add_dataset("cook/menus", {"a.txt": b"Soup.", "b/c.txt": b"Bread.", "w.bin": WEIGHTS})
    pinned = repo.sha
    repo.commit({"a.txt": b"Cake."})
    client = api(hub)
    for revision, expected in ((pinned, b"Soup."), ("main", b"Cake.")):
        folder = Path(
            client.snapshot_download("cook/menus", repo_type="dataset", revision=revision, cache_dir=tmp_path)
        )
        assert (folder / "a.txt").read_bytes() == expected
        assert (folder / "b/c.txt").read_bytes() == b"Bread."


def test_files_can_be_read_in_part(hub: LoopbackHub) -> None:
    hub.add_dataset("cook/menus", {"w.bin": WEIGHTS, "plain.txt": b"Soup and bread."})
    files = HfFileSystem(endpoint=hub.endpoint, token=False, skip_instance_cache=True)
    with files.open("datasets/cook/menus/w.bin", block_size=100, cache_type="none") as file:
        file.seek(300)
        assert file.read(10) == WEIGHTS[300:310]
    assert hub.bytes_sent("/cdn/*") == 10
    with files.open("datasets/cook/menus/plain.txt", block_size=4, cache_type="none") as file:
        file.seek(-6, 2)
        assert file.read(6) == b"bread."


def test_what_is_missing_or_closed_is_told_apart(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add_model("cook/soup", {"recipe.txt": b"Boil water."})
    hub.add_model("cook/secret", {"recipe.txt": b"Boil water."}, private=True)
    hub.add_model("cook/feast", {"recipe.txt": b"Boil water."}, gated="manual")
    hub.add_token("friend", "friend", role="read", gated=["cook/feast"])

    def get(token: str | bool, repo: str, name: str = "recipe.txt", revision: str = "main") -> str:
        return api(hub, token).hf_hub_download(repo, name, revision=revision, cache_dir=tmp_path / str(token))

    with pytest.raises(EntryNotFoundError):
        get(False, "cook/soup", "nothing.txt")
    with pytest.raises(RevisionNotFoundError):
        get(False, "cook/soup", revision="tomorrow")
    for token in (False, "guest-reads"):
        for repo in ("cook/secret", "cook/nothing"):
            with pytest.raises(RepositoryNotFoundError):
                get(token, repo)
        with pytest.raises(GatedRepoError) as gated:
            get(token, "cook/feast")
        assert gated.value.response.status_code == (403 if token else 401)
        with pytest.raises(GatedRepoError):
            api(hub, token).auth_check("cook/feast")
    assert get("cook-reads", "cook/secret")
    assert get("friend", "cook/feast")
    assert api(hub).model_info("cook/feast").gated == "manual"


# datasets and transformers


def test_streaming_touches_the_first_shard_and_pins_the_revision(hub: LoopbackHub, tmp_path: Path) -> None:
    # A shard larger than the ten megabytes that the client reads at once; after a smaller one it opens the next.
    first = gzip.compress(jsonl(500_000), 1)
    files = {f"en/c4-train.{number:05}-of-00064.json.gz": gzip.compress(jsonl(9), 1) for number in range(1, 64)}
    files["en/c4-train.00000-of-00064.json.gz"] = first
    files["en/c4-validation.00000-of-00001.json.gz"] = gzip.compress(jsonl(9), 1)
    files["de/c4-train.00000-of-00001.json.gz"] = gzip.compress(jsonl(9, "Umrühren"), 1)
    repo = hub.add_dataset("allenai/c4", {"README.md": C4_CARD, **files})
    got = run(
        hub,
        tmp_path,
        """
import json, datasets
rows = list(datasets.load_dataset("allenai/c4", "en", split="train", streaming=True).take(200))
german = datasets.load_dataset("allenai/c4", "de", split="train", streaming=True)
errors = []
for name in ((), ("fr",)):
    try:
        datasets.load_dataset("allenai/c4", *name, split="train", streaming=True)
    except ValueError as error:
        errors.append(str(error))
print(json.dumps({"rows": len(rows), "last": rows[-1], "german": next(iter(german)), "errors": errors}))
""",
    )
    assert (got["rows"], got["last"]) == (200, {"text": "Stir the soup 199 times."})
    assert got["german"] == {"text": "Umrühren 0 times."}
    missing, unknown = got["errors"]
    assert "Config name is missing" in missing
    assert "'fr' not found" in unknown
    assert {request.path.rsplit("/", 1)[-1] for request in hub.asked("*", "*/c4-train*")} == {
        "c4-train.00000-of-00064.json.gz",
        "c4-train.00000-of-00001.json.gz",
    }
    assert all(f"/resolve/{repo.sha}/" in request.path for request in hub.asked("*", "*/resolve/*.json.gz"))
    assert hub.bytes_sent("/cdn/*/en/*") > 0
    # Only the viewer was requested elsewhere, and the client works without it.
    assert {host.split(":")[0] for host in hub.strays} == {"datasets-server.127.0.0.1"}


def test_tables_load_with_and_without_streaming(hub: LoopbackHub, tmp_path: Path) -> None:
    table = io.BytesIO()
    pq.write_table(pa.table({"text": ["Salt the water.", "Peel the onion."]}), table)
    hub.add_dataset("cook/parquet", {"data/train-00000-of-00001.parquet": table.getvalue()}, private=True)
    hub.add_dataset("cook/jsonl", {"train.jsonl": jsonl(3), "test.jsonl": jsonl(2)}, private=True)
    hub.add_dataset("cook/csv", {"menu.csv": b"text,label\nBake bread.,1\n"}, private=True)
    pinned = hub.repo("dataset", "cook/jsonl").sha
    hub.repo("dataset", "cook/jsonl").commit({"train.jsonl": jsonl(5)})
    code = f"""
import json, datasets
counts = {{}}
try:
    datasets.load_dataset("cook/jsonl", token=False)
except datasets.exceptions.DatasetNotFoundError as error:
    counts["anonymous"] = str(error)
for name in ("parquet", "jsonl", "csv"):
    for streaming in (True, False):
        loaded = datasets.load_dataset(f"cook/{{name}}", split="train", streaming=streaming)
        counts[f"{{name}} {{streaming}}"] = [row["text"] for row in loaded]
counts["pinned"] = len(datasets.load_dataset("cook/jsonl", split="train", revision="{pinned}"))
print(json.dumps(counts))
"""
    got = run(hub, tmp_path, code, token="cook-reads")
    assert got["parquet True"] == got["parquet False"] == ["Salt the water.", "Peel the onion."]
    assert got["jsonl True"] == got["jsonl False"]
    assert (len(got["jsonl True"]), got["pinned"]) == (5, 3)
    assert got["csv True"] == got["csv False"] == ["Bake bread."]
    assert "cannot be accessed" in got["anonymous"]


def test_transformers_loads_a_configuration_and_a_tokenizer(hub: LoopbackHub, tmp_path: Path) -> None:
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "stir": 1, "soup": 2}, "unk_token": "[UNK]"},
    }
    files = {
        "config.json": {"model_type": "llama", "hidden_size": 32, "vocab_size": 3},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"},
    }
    hub.add_model("cook/soup", {name: json.dumps(value).encode() for name, value in files.items()}, private=True)
    code = """
import json, transformers
config = transformers.AutoConfig.from_pretrained("cook/soup")
tokenizer = transformers.AutoTokenizer.from_pretrained("cook/soup")
print(json.dumps({"size": config.hidden_size, "ids": tokenizer("stir soup")["input_ids"]}))
"""
    assert run(hub, tmp_path, code, token="cook-reads") == {"size": 32, "ids": [1, 2]}
    assert hub.strays == []


# Writing


def test_a_folder_goes_up_in_one_piece_and_in_parts(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path / "model",
        {
            "README.md": b"---\nlicense: mit\n---\nSoup.\n",
            "config.json": b"{}",
            "small.safetensors": b"\0spoon",
            "large.safetensors": WEIGHTS,
            "sub/empty.bin": b"",
        },
    )
    client = api(hub, "cook-writes")
    assert client.create_repo("cook/soup", private=True) == f"{hub.endpoint}/cook/soup"
    assert client.create_repo("cook/soup", private=True, exist_ok=True).repo_id == "cook/soup"
    with pytest.raises(HfHubHTTPError, match="409"):
        client.create_repo("cook/soup")
    done = client.upload_folder(repo_id="cook/soup", folder_path=folder, commit_message="Add the model")

    repo = hub.repo("model", "cook/soup")
    assert repo.private
    assert done.oid == repo.sha
    assert [commit.title for commit in repo.history()] == ["Add the model", "initial commit"]
    for path in folder.rglob("*.*"):
        assert repo.read(path.relative_to(folder).as_posix()) == path.read_bytes()
    assert {path for path, blob in repo.at().files.items() if blob.lfs} == {"small.safetensors", "large.safetensors"}
    parts = hub.asked("PUT", "/upload/*/*[0-9]/[0-9]*")
    assert len(parts) == PARTS
    assert sum(part.received for part in parts) == len(WEIGHTS)
    assert not any(request.authorized for request in hub.asked("PUT"))
    assert len(hub.asked("PUT")) == PARTS + 1

    hub.forget()
    again = client.upload_folder(repo_id="cook/soup", folder_path=folder)
    assert again.oid == done.oid
    assert hub.asked("PUT") == hub.asked("POST", "*/commit/*") == []


def test_an_interrupted_upload_goes_on_where_it_was(hub: LoopbackHub, tmp_path: Path) -> None:
    client = api(hub, "cook-writes")
    client.create_repo("kitchen/stew", repo_type="dataset")
    folder = folder_of(tmp_path, {"a.bin": b"\0first", "b.bin": b"\0second", "c.txt": b"Third."})
    refused = hub.fail("POST", "/api/datasets/kitchen/stew/commit/*", status=403)
    with pytest.raises(HfHubHTTPError, match="kitchen is closed"):
        client.upload_folder(repo_id="kitchen/stew", repo_type="dataset", folder_path=folder)
    assert (refused.hits, len(hub.asked("PUT"))) == (1, 2)
    assert hub.repo("dataset", "kitchen/stew").paths() == [".gitattributes"]

    hub.forget()
    client.upload_folder(repo_id="kitchen/stew", repo_type="dataset", folder_path=folder)
    assert hub.asked("PUT") == []
    assert hub.repo("dataset", "kitchen/stew").paths() == [".gitattributes", "a.bin", "b.bin", "c.txt"]


@pytest.mark.parametrize("size", [900, len(WEIGHTS)], ids=["whole", "parts"])
def test_a_connection_cut_during_an_upload_is_tried_again(hub: LoopbackHub, size: int) -> None:
    client = api(hub, "cook-writes")
    client.create_repo("cook/soup")
    rule = hub.cut("/upload/*", after_bytes=500, skip=0 if size < CHUNK else 2)
    client.upload_file(path_or_fileobj=WEIGHTS[:size], path_in_repo="w.bin", repo_id="cook/soup")
    assert rule.hits == 1
    assert [request.status for request in hub.asked("PUT")].count(None) == 1
    assert hub.repo("model", "cook/soup").read("w.bin") == WEIGHTS[:size]


def test_too_many_requests_and_a_broken_storage_are_waited_for(hub: LoopbackHub) -> None:
    client = api(hub, "cook-writes")
    client.create_repo("cook/soup")
    hub.fail("POST", "*/preupload/*", status=429, headers={"Retry-After": "1"})
    hub.fail("PUT", "/upload/*", status=503)
    start = time.monotonic()
    client.upload_file(path_or_fileobj=b"\0spoon", path_in_repo="w.bin", repo_id="cook/soup")
    assert time.monotonic() - start > 2  # the client adds a second to the given delay
    assert [request.status for request in hub.asked("POST", "*/preupload/*")] == [429, 200]
    assert [request.status for request in hub.asked("PUT")] == [503, 200]


def test_a_commit_whose_answer_is_lost_has_happened(hub: LoopbackHub) -> None:
    client = api(hub, "cook-writes")
    client.create_repo("cook/soup")
    hub.drop("POST", "*/commit/main")
    with pytest.raises(Exception, match="disconnected"):
        client.upload_file(path_or_fileobj=b"Boil.", path_in_repo="recipe.txt", repo_id="cook/soup")
    repo = hub.repo("model", "cook/soup")
    assert repo.read("recipe.txt") == b"Boil."
    client.upload_file(path_or_fileobj=b"Boil.", path_in_repo="recipe.txt", repo_id="cook/soup")
    assert len(repo.history()) == 2


def test_who_may_not_write_is_refused(hub: LoopbackHub) -> None:
    hub.add_model("cook/soup", {"recipe.txt": b"Boil."})
    for token in ("cook-reads", "guest-reads", "guest-writes"):
        client = api(hub, token)
        with pytest.raises(HfHubHTTPError) as refused:
            client.upload_file(path_or_fileobj=b"Fry.", path_in_repo="recipe.txt", repo_id="cook/soup")
        assert refused.value.response.status_code == 403
        with pytest.raises(HfHubHTTPError, match="403"):
            client.delete_repo("cook/soup")
        with pytest.raises(HfHubHTTPError, match="403"):
            client.create_repo("kitchen/soup")
    with pytest.raises(HfHubHTTPError, match="401"):
        api(hub).create_branch("cook/soup", branch="side")
    assert hub.repo("model", "cook/soup").read("recipe.txt") == b"Boil."
    api(hub, "cook-writes").create_repo("kitchen/soup")


def test_a_commit_on_an_old_parent_is_a_conflict(hub: LoopbackHub) -> None:
    repo = hub.add_model("cook/soup", {"recipe.txt": b"Boil."})
    parent = repo.sha
    repo.commit({"recipe.txt": b"Fry."})
    client = api(hub, "cook-writes")

    def upload(parent_commit: str) -> None:
        client.upload_file(
            path_or_fileobj=b"Bake.", path_in_repo="recipe.txt", repo_id="cook/soup", parent_commit=parent_commit
        )

    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as conflict:
        upload(parent)
    assert conflict.value.response.status_code == 412
    upload(repo.sha)
    assert repo.read("recipe.txt") == b"Bake."


def test_files_and_folders_can_be_deleted(hub: LoopbackHub) -> None:
    repo = hub.add_model("cook/soup", {"a.txt": b"A.", "b/c.txt": b"C.", "b/d.txt": b"D."})
    client = api(hub, "cook-writes")
    operations = [CommitOperationDelete("a.txt"), CommitOperationDelete("b/")]
    client.create_commit("cook/soup", operations, commit_message="Clear the table")
    assert repo.paths() == []
    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        client.delete_file("a.txt", "cook/soup")
    client.delete_repo("cook/soup")
    assert hub.repos() == []
    client.delete_repo("cook/soup", missing_ok=True)


def test_a_branch_takes_commits_of_its_own(hub: LoopbackHub) -> None:
    repo = hub.add_model("cook/soup", {"recipe.txt": b"Boil."})
    client = api(hub, "cook-writes")
    client.create_branch("cook/soup", branch="side/dish")
    client.create_branch("cook/soup", branch="side/dish", exist_ok=True)
    client.upload_file(path_or_fileobj=b"Fry.", path_in_repo="recipe.txt", repo_id="cook/soup", revision="side/dish")
    assert (repo.read("recipe.txt"), repo.read("recipe.txt", "side/dish")) == (b"Boil.", b"Fry.")
    client.create_tag("cook/soup", tag="v1", revision="side/dish")
    client.delete_branch("cook/soup", branch="side/dish")
    with pytest.raises(RevisionNotFoundError):
        client.model_info("cook/soup", revision="side/dish")
    assert client.model_info("cook/soup", revision="v1").sha == repo.tags["v1"]
    client.delete_tag("cook/soup", tag="v1")
    with pytest.raises(RevisionNotFoundError):
        client.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id="cook/soup", revision="v1")


def test_pull_requests_are_opened_filled_and_merged(hub: LoopbackHub, tmp_path: Path) -> None:
    repo = hub.add_model("cook/soup", {"recipe.txt": b"Boil.", "menu.txt": b"Soup."})
    guest, cook = api(hub, "guest-writes"), api(hub, "cook-writes")
    folder = folder_of(tmp_path, {"recipe.txt": b"Fry.", "w.bin": WEIGHTS})
    first = guest.upload_folder(repo_id="cook/soup", folder_path=folder, create_pr=True, commit_message="Fry it")
    assert (first.pr_num, first.pr_revision) == (1, "refs/pr/1")
    assert repo.read("recipe.txt", "refs/pr/1") == b"Fry."
    assert repo.read("recipe.txt") == b"Boil."
    path = guest.hf_hub_download("cook/soup", "recipe.txt", revision="refs/pr/1", cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == b"Fry."

    draft = guest.create_pull_request("cook/soup", title="Salt it")
    assert (draft.num, draft.status, draft.git_reference) == (2, "draft", "refs/pr/2")
    guest.upload_file(path_or_fileobj=b"Salt.", path_in_repo="recipe.txt", repo_id="cook/soup", revision="refs/pr/2")
    guest.comment_discussion("cook/soup", 2, "Just a pinch.")
    with pytest.raises(HfHubHTTPError, match="403"):
        guest.merge_pull_request("cook/soup", 1)

    repo.commit({"menu.txt": b"Stew."})
    cook.merge_pull_request("cook/soup", 1)
    assert {path: repo.read(path) for path in repo.paths()} == {
        "recipe.txt": b"Fry.",
        "menu.txt": b"Stew.",
        "w.bin": WEIGHTS,
    }
    merged = cook.get_discussion_details("cook/soup", 1)
    assert (merged.status, merged.merge_commit_oid, merged.author) == ("merged", repo.sha, "guest")
    with pytest.raises(HfHubHTTPError, match="draft"):
        cook.merge_pull_request("cook/soup", 2)
    cook.change_discussion_status("cook/soup", 2, "open")
    with pytest.raises(HfHubHTTPError, match="merge conflicts"):
        cook.merge_pull_request("cook/soup", 2)
    assert [found.num for found in cook.get_repo_discussions("cook/soup")] == [1, 2]
    refs = cook.list_repo_refs("cook/soup", include_pull_requests=True)
    assert [ref.ref for ref in refs.pull_requests] == ["refs/pr/1", "refs/pr/2"]


def test_settings_change_who_sees_a_repository(hub: LoopbackHub) -> None:
    repo = hub.add_model("cook/soup", {"recipe.txt": b"Boil."}, private=True)
    client = api(hub, "cook-writes")
    client.update_repo_settings("cook/soup", private=False, gated="auto")
    assert (repo.private, repo.gated) == (False, "auto")
    with pytest.raises(GatedRepoError):
        api(hub).auth_check("cook/soup")
    client.update_repo_settings("cook/soup", gated=False)
    api(hub).auth_check("cook/soup")
    client.update_repo_settings("cook/soup", private=True)
    with pytest.raises(RepositoryNotFoundError):
        api(hub).model_info("cook/soup")


# The server itself


def test_it_closes_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    before = threading.active_count()
    hub = LoopbackHub()
    hub.add_model("cook/soup", {"recipe.txt": b"Boil."})
    client = api(hub)
    client.model_info("cook/soup")  # the connection stays open
    hub.delay("GET", "*", seconds=60)
    errors: list[str] = []

    def ask() -> None:
        try:
            client.model_info("cook/soup")
        except Exception as error:
            errors.append(str(error))

    waiting = threading.Thread(target=ask)
    waiting.start()
    while len(hub.requests) < 2:
        time.sleep(0.01)
    kept = hub.repo("model", "cook/soup").at().files["recipe.txt"].file
    start = time.monotonic()
    hub.close()
    assert time.monotonic() - start < 2
    waiting.join(5)
    assert len(errors) == 1
    close_session()
    assert threading.active_count() == before
    assert not kept.parents[1].exists()


def test_other_hosts_are_refused_and_noted(hub: LoopbackHub, tmp_path: Path) -> None:
    code = """
import json
from huggingface_hub.utils import get_session
found = {}
for url in ("http://kitchen.example/soup", "https://kitchen.example/soup"):
    try:
        found[url] = get_session().get(url).status_code
    except Exception as error:
        found[url] = str(error)
print(json.dumps(found))
"""
    got = run(hub, tmp_path, code)
    assert got["http://kitchen.example/soup"] == 404
    assert "502" in got["https://kitchen.example/soup"]
    assert hub.strays == ["kitchen.example", "kitchen.example:443"]
