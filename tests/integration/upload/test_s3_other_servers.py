"""Delivery to third-party S3 servers: Ceph's.

They run only where OTHER_S3 is set and the server is installed (Linux):

    apt-get install radosgw ceph-mon ceph-osd ceph-common
    OTHER_S3=1 pytest tests/integration/upload/test_s3_other_servers.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from job.errors import DeliveryError
from job.transfer.s3 import S3Options, probe
from job.upload.s3 import Delivery, deliver
from tests.fakes.fault_proxy import FaultProxy
from tests.fakes.s3_others import BUCKET, SECRET, SERVERS, OtherServer, missing
from tests.fakes.s3_server import make_export
from tests.helpers import environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("OTHER_S3"), reason="OTHER_S3 is not set: see the head of this file"),
    # All tests of one server run in one process.
    pytest.mark.xdist_group("other-s3"),
]

MIB = 1 << 20
URI = f"s3://{BUCKET}/models/one"
PREFIX = "models/one/"
OVERHEAD = 64 << 10
SIZES = {"config.json": 300, "empty.txt": 0, "model.safetensors": 12 * MIB + 17, "tokenizer/vocab.json": 4000}


@pytest.fixture(scope="module", params=SERVERS)
def running(request: pytest.FixtureRequest) -> Iterator[OtherServer]:
    kind = SERVERS[request.param]
    if lacking := missing(kind):
        pytest.skip(f"not installed: {', '.join(lacking)}")
    with kind() as server:
        yield server


@pytest.fixture
def server(running: OtherServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> OtherServer:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", running.key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    running.empty()
    return running


def _options(endpoint: str, **changes: Any) -> S3Options:
    given: dict[str, Any] = {
        "endpoint": endpoint,
        "region": "us-east-1",
        "addressing_style": "path",
        "part_mib": 5,
        "parallel_parts": 2,
        "patience_s": 20.0,
    }
    return S3Options(**{**given, **changes})


def _expected(export: Path) -> dict[str, bytes]:
    files = [path for path in export.rglob("*") if path.is_file()]
    return {f"{PREFIX}{path.relative_to(export)}": path.read_bytes() for path in files}


def _start(export: Path, state: Path, options: S3Options) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.fakes.s3_upload", str(export), URI, str(state), json.dumps(vars(options))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment(COVERAGE_PROCESS_START=""), **pipes)


def _finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    done: dict[str, Any] = json.loads(out)
    return done


def _killed_after(line: FaultProxy, point: int, export: Path, state: Path) -> None:
    process = _start(export, state, _options(line.url))
    end = time.monotonic() + 60
    while line.sent < point:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "the upload does not get on"
        time.sleep(0.005)
    process.kill()
    assert process.wait(10) == -signal.SIGKILL
    process.communicate()


def test_the_probe_leaves_nothing(server: OtherServer) -> None:
    found = probe(URI, _options(server.url))
    assert all("S3 server" in quirk for quirk in found.quirks)
    assert server.contents() == {}
    assert not server.uploads()


@pytest.mark.parametrize("checksums", ["auto", "when_required"])
def test_everything_arrives_once_and_the_manifest_last(server: OtherServer, tmp_path: Path, checksums: Any) -> None:
    export = make_export(tmp_path / "export", SIZES)
    options = _options(server.url, checksums=checksums)
    complete: list[bool] = []
    told: list[int] = []

    def progress(size: int) -> None:
        told.append(size)
        complete.append(f"{PREFIX}manifest.json" in server.contents())

    done = deliver(export, URI, tmp_path / "state", options, progress=progress)
    assert server.contents() == _expected(export)
    assert not any(complete)
    assert sum(told) == sum(SIZES.values()) == done.sent_bytes
    assert (done.sent, done.skipped, done.removed, done.aborted) == (5, 0, 0, 0)
    assert not server.uploads()
    assert not list((tmp_path / "state").glob("*"))
    assert deliver(export, URI, tmp_path / "elsewhere", options) == Delivery(skipped=4)


def test_a_line_that_is_cut_again_and_again(server: OtherServer, tmp_path: Path) -> None:
    size, part, cuts = 60 * MIB, 5 * MIB, 8
    export = make_export(tmp_path / "export", {"model.safetensors": size})
    points = [(number + 1) * size // (cuts + 1) for number in range(cuts)]
    with FaultProxy(server.host, server.port, cut_up=points) as line:
        done = _finished(_start(export, tmp_path / "state", _options(line.url)))
        assert line.cuts == cuts
        assert line.sent - size <= cuts * part + OVERHEAD
    assert done["sent_bytes"] == size
    assert server.contents() == _expected(export)
    assert not server.uploads()


@pytest.mark.filterwarnings("ignore:tzname")  # a date in a header that has been cut
def test_a_line_that_is_cut_for_everyone_and_in_answers(server: OtherServer, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", {"a.safetensors": 21 * MIB, "b.json": 100, "c.safetensors": 11 * MIB})
    cuts = {"cut_up": [7 * MIB, 19 * MIB], "cut_down": [300 + 1000 * step for step in range(12)]}
    with FaultProxy(server.host, server.port, everyone=True, **cuts) as line:
        deliver(export, URI, tmp_path / "state", _options(line.url))
        assert line.cuts >= 8
    assert server.contents() == _expected(export)
    assert not server.uploads()


def test_kill_9_twice(server: OtherServer, tmp_path: Path) -> None:
    size, part, lanes = 40 * MIB, 5 * MIB, 2
    export = make_export(tmp_path / "export", {"config.json": 100, "model.safetensors": size})
    with FaultProxy(server.host, server.port, bytes_per_s=40e6) as line:
        for point in (13 * MIB, 27 * MIB):
            _killed_after(line, point, export, tmp_path / "state")
            assert f"{PREFIX}manifest.json" not in server.contents()
        done = _finished(_start(export, tmp_path / "state", _options(line.url)))
        assert line.sent - size <= 2 * lanes * part + 3 * OVERHEAD
    assert done["resumed_bytes"] >= 15 * MIB
    assert done["skipped"] == 1
    assert server.contents() == _expected(export)
    assert not server.uploads()


def test_a_part_that_is_not_what_was_sent_is_sent_again(server: OtherServer, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", {"model.safetensors": 30 * MIB})
    with FaultProxy(server.host, server.port, bytes_per_s=40e6) as line:
        _killed_after(line, 18 * MIB, export, tmp_path / "state")
        [(key, upload)] = server.uploads()
        client = server.client()
        there = client.list_parts(Bucket=BUCKET, Key=key, UploadId=upload)["Parts"]
        spoilt = {"PartNumber": there[0]["PartNumber"], "Body": bytes(there[0]["Size"])}
        client.upload_part(Bucket=BUCKET, Key=key, UploadId=upload, **spoilt)
        client.close()
        # Over the same line: an endpoint of another name is another target.
        done = deliver(export, URI, tmp_path / "state", _options(line.url))
    assert done.resumed_bytes >= sum(part["Size"] for part in there[1:])
    assert done.sent_bytes >= there[0]["Size"]
    assert server.contents() == _expected(export)


def test_an_upload_that_the_server_has_forgotten_is_begun_again(server: OtherServer, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", {"model.safetensors": 30 * MIB})
    with FaultProxy(server.host, server.port, bytes_per_s=40e6) as line:
        _killed_after(line, 12 * MIB, export, tmp_path / "state")
        assert server.uploads()
        server.empty()
        done = deliver(export, URI, tmp_path / "state", _options(line.url))
    assert (done.resumed_bytes, done.sent_bytes) == (0, 30 * MIB)
    assert server.contents() == _expected(export)


@pytest.mark.parametrize("large", [False, True])
def test_what_does_not_match_its_checksum_is_refused(server: OtherServer, large: bool) -> None:
    client = server.client()
    wrong = {"Bucket": BUCKET, "Key": "any", "Body": b"what arrives", "ContentMD5": "1B2M2Y8AsgTpgAmY7PhCfg=="}
    if large:
        upload = client.create_multipart_upload(Bucket=BUCKET, Key="any")["UploadId"]
        with pytest.raises(ClientError, match="BadDigest"):
            client.upload_part(UploadId=upload, PartNumber=1, **wrong)
    else:
        with pytest.raises(ClientError, match="BadDigest"):
            client.put_object(**wrong)
    client.close()
    assert server.contents() == {}


def test_what_was_changed_behind_our_back_is_sent_again(server: OtherServer, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", SIZES)
    deliver(export, URI, tmp_path / "state", _options(server.url))
    client = server.client()
    key = f"{PREFIX}config.json"
    metadata = client.head_object(Bucket=BUCKET, Key=key)["Metadata"]
    client.put_object(Bucket=BUCKET, Key=key, Body=bytes(SIZES["config.json"]), Metadata=metadata)
    client.close()
    again = deliver(export, URI, tmp_path / "state", _options(server.url))
    assert (again.sent, again.skipped) == (2, 3)
    assert server.contents() == _expected(export)


def test_a_delivery_is_replaced_and_nobody_sees_a_mixture(server: OtherServer, tmp_path: Path) -> None:
    shared = {"changed.json": 700, "model.safetensors": 12 * MIB}
    first = make_export(tmp_path / "first", {**shared, "gone.json": 50, "gone.safetensors": 11 * MIB})
    second = make_export(tmp_path / "second", {**shared, "new.json": 20}, seed=1)
    deliver(first, URI, tmp_path / "state", _options(server.url))
    client = server.client()
    client.put_object(Bucket=BUCKET, Key=f"{PREFIX}notes.txt", Body=b"somebody's")
    client.close()
    markers: list[bool] = []

    def look(_size: int) -> None:
        markers.append(f"{PREFIX}manifest.json" in server.contents())

    done = deliver(second, URI, tmp_path / "state", _options(server.url), progress=look)
    assert markers
    assert not any(markers)
    assert (done.sent, done.removed) == (4, 2)
    assert server.contents() == {**_expected(second), f"{PREFIX}notes.txt": b"somebody's"}


def test_files_of_somebody_else_are_not_overwritten(server: OtherServer, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", SIZES)
    client = server.client()
    client.put_object(Bucket=BUCKET, Key=f"{PREFIX}config.json", Body=b"somebody's")
    client.close()
    with pytest.raises(DeliveryError, match=r"objects of something else.*config\.json"):
        deliver(export, URI, tmp_path / "state", _options(server.url))
    assert server.contents() == {f"{PREFIX}config.json": b"somebody's"}


@pytest.mark.parametrize("replacing", [False, True])
@pytest.mark.parametrize("size", [700, 12 * MIB])
def test_a_writer_in_between_is_noticed_where_the_server_says_so(
    server: OtherServer, tmp_path: Path, replacing: bool, size: int
) -> None:
    found = probe(URI, _options(server.url))
    kept = found.conditional and (size <= 5 * MIB or found.conditional_complete)
    if replacing:
        first = make_export(tmp_path / "first", {"a.json": 10, "b.bin": size})
        deliver(first, URI, tmp_path / "state", _options(server.url))
    export = make_export(tmp_path / "export", {"a.json": 10, "b.bin": size}, seed=1)
    wrote = threading.Event()

    def write(_size: int) -> None:
        if not wrote.is_set():
            wrote.set()
            client = server.client()
            client.put_object(Bucket=BUCKET, Key=f"{PREFIX}b.bin", Body=b"the other's")
            client.close()

    def send() -> None:
        deliver(export, URI, tmp_path / "state", _options(server.url), capabilities=found, progress=write)

    if kept:
        with pytest.raises(DeliveryError, match=r"something else wrote .*b\.bin"):
            send()
        assert server.contents()[f"{PREFIX}b.bin"] == b"the other's"
        assert f"{PREFIX}manifest.json" not in server.contents()
    else:
        send()
        assert server.contents() == _expected(export)
    assert not server.uploads()


def test_abandoned_uploads_under_our_names_are_aborted(server: OtherServer, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", {"model.safetensors": 12 * MIB})
    keys = [f"{PREFIX}model.safetensors", f"{PREFIX}model.safetensors.old", "models/other/model.safetensors"]
    client = server.client()
    for key in keys:
        upload = client.create_multipart_upload(Bucket=BUCKET, Key=key)["UploadId"]
        client.upload_part(Bucket=BUCKET, Key=key, UploadId=upload, PartNumber=1, Body=bytes(100))
    client.close()
    assert len(server.uploads()) == 3
    done = deliver(export, URI, tmp_path / "state", _options(server.url))
    assert done.aborted == 1
    assert sorted(key for key, _ in server.uploads()) == sorted(keys[1:])
    assert server.contents() == _expected(export)


def test_failures_have_their_names(server: OtherServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = make_export(tmp_path / "export", {"config.json": 10})

    def fails(uri: str, what: str) -> None:
        with pytest.raises(DeliveryError, match=what) as failure:
            probe(uri, _options(server.url))
        assert os.environ["AWS_SECRET_ACCESS_KEY"] not in failure.value.line
        with pytest.raises(DeliveryError, match=what):
            deliver(export, uri, tmp_path / "state", _options(server.url))

    fails("s3://nowhere/at/all", "no such bucket")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "quitewrong" * 4)
    fails(URI, "does not accept the credentials")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAWRONGWRONGWRONG0")
    fails(URI, "does not accept the credentials")
