"""Delivery as a user has it: targets on the Hub and on S3, checked by preflight, delivered to at the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from huggingface_hub import ModelCard
from moto.server import ThreadedMotoServer

from job.errors import UsageError
from job.transfer.s3.options import S3Target
from tests.fakes.hub import LoopbackHub
from tests.helpers import abliterate, job_arguments, only_job

TOKEN, READ_TOKEN = "hf_" + "cook" * 6, "hf_" + "read" * 6
KEYS = {"AWS_ACCESS_KEY_ID": "kitchen", "AWS_SECRET_ACCESS_KEY": "very-secret-spoon", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub(usual=True) as hub:
        hub.add_token(TOKEN, "cook", role="write")
        hub.add_token(READ_TOKEN, "cook", role="read")
        hub.add_model("cook/known", {"README.md": b"# Seen by all\n"})
        yield hub
        assert hub.errors == []


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="kitchen")
    yield client
    for item in client.list_objects_v2(Bucket="kitchen").get("Contents", []):
        client.delete_object(Bucket="kitchen", Key=item["Key"])
    client.delete_bucket(Bucket="kitchen")
    client.close()


def network(hub: LoopbackHub, home: Path, token: str = TOKEN) -> dict[str, str]:
    return {**hub.environment(home, token=token), "HF_HUB_OFFLINE": "0", **KEYS}


@pytest.mark.slow
def test_a_finished_job_is_delivered_to_the_hub_and_to_s3(
    organism: Path, finished: Path, hub: LoopbackHub, endpoint: str, bucket: Any, tmp_path: Path
) -> None:
    workspace = tmp_path / "runs"
    shutil.copytree(finished, workspace, symlinks=True)
    arguments = ["run", *job_arguments(organism), "--workspace", workspace, "--trials", 20]
    targets = ["--upload", "hf://cook/edited", "--upload", "s3://kitchen/models/edited"]
    targets += ["--set", f"s3.endpoint={endpoint}", "--set", "s3.addressing_style=path"]
    # The token may not write: the other target still gets its delivery.
    denied = abliterate(*arguments, *targets, **network(hub, tmp_path / "home", READ_TOKEN))
    denied.fails(6, "hf://cook/edited")
    export = (only_job(workspace) / "export").resolve()
    names = {path.name for path in export.iterdir()} - {".done"}
    stored = {
        item["Key"].removeprefix("models/edited/") for item in bucket.list_objects_v2(Bucket="kitchen")["Contents"]
    }
    assert stored == names
    uploads = {one["target"]: one["state"] for one in json.loads((only_job(workspace) / "uploads.json").read_text())}
    assert uploads == {"hf://cook/edited": "failed", "s3://kitchen/models/edited": "done"}

    abliterate(*arguments, *targets, **network(hub, tmp_path / "home")).check()
    repo = hub.repo("model", "cook/edited")
    assert repo.private
    assert set(repo.paths("main")) - {".gitattributes"} == names
    assert json.loads(repo.read("manifest.json", "main")) == json.loads((export / "manifest.json").read_text())
    assert "refusals" in repo.history("main")[0].title
    hub.forget()
    again = abliterate(*arguments, *targets, **network(hub, tmp_path / "home")).check()
    assert "nothing to do" in again.err
    assert hub.requests == []
    for path in only_job(workspace).rglob("*"):
        if path.is_file():
            assert not any(secret.encode() in path.read_bytes() for secret in (TOKEN, READ_TOKEN, "very-secret-spoon"))


@pytest.mark.parametrize(
    ("endpoint", "right"),
    [
        ("https://kitchen.nyc3.digitaloceanspaces.com", "https://nyc3.digitaloceanspaces.com"),
        ("https://kitchen.s3.eu-west-1.amazonaws.com", "https://s3.eu-west-1.amazonaws.com"),
        ("https://0123.r2.cloudflarestorage.com/kitchen", "https://0123.r2.cloudflarestorage.com"),
        ("https://cook:spoon@store.example/v1/kitchen", "https://store.example/v1"),
        ("https://kitchen.example:9000", None),
        ("http://kitchen:9000", None),
        ("https://store.example/storage/v1/s3", None),
    ],
)
def test_the_bucket_is_found_in_endpoints_as_dashboards_show_them(endpoint: str, right: str | None) -> None:
    target = S3Target.parse("s3://kitchen/models")
    if right is None:
        target.refuse_in(endpoint)
        return
    with pytest.raises(UsageError) as refused:
        target.refuse_in(endpoint)
    assert f"s3.endpoint={right} " in refused.value.line
    assert "spoon" not in refused.value.line


def test_a_card_that_the_hub_would_refuse_is_corrected_before_the_job(
    organism: Path, hub: LoopbackHub, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(organism / "model", model)
    (model / "README.md").write_text("---\nlicense: Apache 2.0\nlanguage: [en, no]\n---\n# Base\n")
    words = [model, *job_arguments(organism)[1:], "--workspace", tmp_path / "runs", "--upload", "hf://cook/carded"]
    words += ["--trials", "1", "--set", "startup_trials=1"]
    left_out = "licence: Apache 2.0; left out of the export's card: license: Apache 2.0, language: False"
    ran = abliterate("run", *words, **network(hub, tmp_path / "home")).check()
    assert left_out in ran.err
    card = ModelCard(hub.repo("model", "cook/carded").read("README.md", "main").decode())
    assert (card.data.language, card.data.license) == (["en"], None)


def test_targets_are_proven_in_preflight_and_nothing_is_left_there(
    random_model_folder: Path, hub: LoopbackHub, endpoint: str, bucket: Any, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"Where is kettle number {i}?\n" for i in range(30)))
    sets = [f"--{name}-prompts={prompts}" for name in ("good", "bad", "good-eval", "bad-eval")]

    def check(*targets: str, token: str = TOKEN) -> list[dict[str, Any]]:
        """Return the check of each target."""
        command = ["preflight", random_model_folder, *sets, "--workspace", tmp_path / "runs", "--json"]
        command += [word for target in targets for word in ("--upload", target)]
        command += ["--set", f"s3.endpoint={endpoint}", "--set", "s3.addressing_style=path"]
        result = abliterate(*command, **network(hub, tmp_path / "home", token))
        found = [one for one in json.loads(result.out)["checks"] if one["name"].startswith("target.")]
        assert len(found) == len(targets)
        assert result.code == (0 if all(one["status"] == "ok" for one in found) else 3)
        return found

    fresh = check("hf://cook/fresh", "s3://kitchen/models/fresh")
    assert [one["status"] for one in fresh] == ["ok", "ok"]
    assert bucket.list_objects_v2(Bucket="kitchen")["KeyCount"] == 0
    assert not bucket.list_multipart_uploads(Bucket="kitchen").get("Uploads")
    assert "cook/fresh" not in {repo.id for repo in hub.repos()}
    (denied,) = check("hf://cook/fresh", token=READ_TOKEN)
    assert (denied["status"], denied["name"]) == ("fail", "target.hf")
    public, absent = check("hf://cook/known", "s3://no-such-bucket/x")
    assert "public" in public["measured"]
    assert [one["status"] for one in (public, absent)] == ["fail", "fail"]
