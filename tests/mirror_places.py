"""Fixtures of places for mirrors: a folder, a bucket of a real S3 server, a repository of the loopback Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.endpoint
import huggingface_hub.constants
import pytest
from huggingface_hub.utils import close_session

from job.mirror import backoff
from job.system import hub_client as client
from job.transfer.s3 import S3Options
from tests.fakes.hub import LoopbackHub
from tests.fakes.hurried import CLOCK
from tests.fakes.s3_server import BUCKET, KEY_ID, SECRET, S3Server
from tests.mirrors import Place, put_tree, read_tree

TOKEN = "hf_CookWritesALotOfSoup0123"
REPO = "cook/mirror"


@pytest.fixture(scope="module")
def running() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


def s3_options(endpoint: str, **changes: Any) -> S3Options:
    given: dict[str, Any] = {
        "endpoint": endpoint,
        "region": "us-east-1",
        "addressing_style": "path",
        "part_mib": 5,
        "parallel_parts": 2,
        "connect_timeout_s": 2.0,
        "read_timeout_s": 5.0,
    }
    return S3Options(**{**given, **changes})


@pytest.fixture
def s3_place(running: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Place]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    env = {
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(botocore.endpoint, "time", CLOCK)
    monkeypatch.setattr(backoff, "FIRST_RETRY_S", 0.05)
    own = running.client()
    own.create_bucket(Bucket=BUCKET)
    running.front.requests.clear()

    def contents() -> dict[str, bytes]:
        return {name.removeprefix("mirrors/"): data for name, data in running.contents("mirrors/").items()}

    def put(name: str, data: bytes | None) -> None:
        if data is None:
            own.delete_object(Bucket=BUCKET, Key=f"mirrors/{name}")
        else:
            own.put_object(Bucket=BUCKET, Key=f"mirrors/{name}", Body=data)

    place = Place(f"s3://{BUCKET}/mirrors", contents, put, env, s3_options(running.url), running)
    yield place
    place.close()
    running.reset()
    own.close()


@pytest.fixture
def hub_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Place]:
    with LoopbackHub(chunk_size=100_000) as hub:
        # Read at import: variables of the environment come too late in this process.
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
        monkeypatch.setattr(backoff, "FIRST_RETRY_S", 0.05)
        monkeypatch.setattr(client, "TRIES", 3)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        hub.add_token(TOKEN, "cook")

        def contents() -> dict[str, bytes]:
            repo = hub.find_repo("model", REPO)
            files = repo.at().files if repo else {}
            return {name: blob.read() for name, blob in files.items() if "/" in name}

        def put(name: str, data: bytes | None) -> None:
            hub.repo("model", REPO).commit({name: data})

        place = Place(f"hf://{REPO}", contents, put, hub.environment(tmp_path / "home", TOKEN), None, hub)
        yield place
        place.close()
        close_session()
        assert hub.errors == []
        assert hub.strays == []


@pytest.fixture
def file_place(tmp_path: Path) -> Place:
    root = tmp_path / "other disk"
    uri = root.as_uri()
    return Place(uri, lambda: read_tree(root) if root.exists() else {}, lambda name, data: put_tree(root, name, data))


@pytest.fixture(params=["file", "s3", "hub"])
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.getfixturevalue(f"{request.param}_place")
    return found
