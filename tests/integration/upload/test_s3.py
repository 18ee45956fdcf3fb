"""Delivery to S3: the real client against a real server on the loopback, over a line that is cut."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from math import inf
from pathlib import Path
from typing import Any

import botocore.endpoint
import pytest

import job.upload.s3 as uploading
from job.errors import DeliveryError, Stopped, UsageError
from job.records import Manifest
from job.system.signals import StopSignals
from job.transfer.s3 import S3Options, probe
from job.transfer.s3.client import S3Client
from job.transfer.s3.options import S3Target
from job.upload.s3 import Delivery, deliver
from tests.fakes.fault_proxy import FaultProxy
from tests.fakes.hurried import CLOCK
from tests.fakes.s3_server import BUCKET, KEY_ID, SECRET, Answer, Request, S3Server, make_export, policy
from tests.helpers import environment, start_script

MIB = 1 << 20
URI = f"s3://{BUCKET}/models/one"
PREFIX = "models/one/"
# Overhead beside the request bodies, on one connection: headers, and the probe's few requests.
OVERHEAD = 64 << 10
SIZES = {"config.json": 300, "empty.txt": 0, "model.safetensors": 12 * MIB + 17, "tokenizer/vocab.json": 4000}


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait shortly between tries: how long botocore and we wait is not the point here."""
    monkeypatch.setattr(botocore.endpoint, "time", CLOCK)
    monkeypatch.setattr(uploading, "_FIRST_WAIT_S", 0.02)


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))


@pytest.fixture(scope="module")
def running() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture
def server(running: S3Server) -> Iterator[S3Server]:
    client = running.client()
    client.create_bucket(Bucket=BUCKET)
    running.front.requests.clear()
    yield running
    running.reset()
    client.close()


def _options(endpoint: str, **changes: Any) -> S3Options:
    given: dict[str, Any] = {
        "endpoint": endpoint,
        "region": "us-east-1",
        "addressing_style": "path",
        "part_mib": 5,
        "parallel_parts": 2,
        "patience_s": 10.0,
        "read_timeout_s": 20.0,
    }
    return S3Options(**{**given, **changes})


def _expected(export: Path, prefix: str = PREFIX) -> dict[str, bytes]:
    files = [path for path in export.rglob("*") if path.is_file()]
    return {f"{prefix}{path.relative_to(export)}": path.read_bytes() for path in files}


def _start(export: Path, state: Path, options: S3Options, *, cold: bool = False) -> subprocess.Popen[str]:
    """Start an upload in its own process; `cold`: with nothing loaded, so that its memory can be measured."""
    words = [str(export), URI, str(state), json.dumps(vars(options))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if not cold:
        return start_script(
            "import sys, tests.fakes.s3_upload as one; sys.exit(one.main(*sys.argv[1:]))", *words, **pipes
        )
    command = [sys.executable, "-m", "tests.fakes.s3_upload", *words]
    return subprocess.Popen(command, text=True, env=environment(COVERAGE_PROCESS_START=""), **pipes)


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.005)


def _finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return json.loads(out)


@pytest.mark.parametrize("checksums", ["auto", "when_required"])
def test_everything_arrives_and_the_manifest_last(server: S3Server, tmp_path: Path, checksums: Any) -> None:
    export = make_export(tmp_path / "export", SIZES)
    told: list[int] = []
    options = _options(server.url, checksums=checksums)
    done = deliver(export, URI, tmp_path / "state", options, progress=told.append)
    assert server.contents() == _expected(export)
    assert sum(told) == sum(SIZES.values()) == done.sent_bytes
    assert (done.sent, done.skipped, done.resumed_bytes, done.removed, done.aborted) == (5, 0, 0, 0, 0)
    written = [request.key for request in server.front.requests if request.operation in ("PUT", "complete")]
    assert written[-1] == f"{PREFIX}manifest.json"
    assert not any("x-amz-acl" in request.headers for request in server.front.requests)
    has_checksums = any("x-amz-checksum-sha256" in request.headers for request in server.front.requests)
    assert has_checksums == (checksums == "auto")
    # botocore never returns if the line is cut within the answer "100 Continue".
    assert not any("expect" in request.headers for request in server.front.requests)
    made = {r.key: r.headers for r in server.front.requests if r.operation in ("PUT", "create")}
    for name in SIZES:
        sha256 = hashlib.sha256((export / name).read_bytes()).hexdigest()
        assert made[PREFIX + name]["x-amz-meta-abliterate-sha256"] == sha256
    assert not server.uploads()
    assert not list((tmp_path / "state").glob("*"))


def test_what_is_there_is_not_sent_again(server: S3Server, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", SIZES)
    deliver(export, URI, tmp_path / "state", _options(server.url))
    server.front.requests.clear()
    again = deliver(export, URI, tmp_path / "elsewhere", _options(server.url))
    assert again == Delivery(skipped=4)
    assert set(server.operations()) == {"GET", "HEAD"}


def test_encryption_is_asked_for(server: S3Server, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", SIZES)
    deliver(export, URI, tmp_path / "state", _options(server.url, sse="aws:kms", kms_key="alias/ours"))
    made = [request for request in server.front.requests if request.operation in ("PUT", "create")]
    assert made
    assert {request.headers.get("x-amz-server-side-encryption") for request in made} == {"aws:kms"}
    assert {request.headers.get("x-amz-server-side-encryption-aws-kms-key-id") for request in made} == {"alias/ours"}


def test_a_line_that_is_cut_again_and_again(server: S3Server, tmp_path: Path) -> None:
    size, part, cuts = 96 * MIB, 5 * MIB, 8
    export = make_export(tmp_path / "export", {"model.safetensors": size})
    points = [(number + 1) * size // (cuts + 1) for number in range(cuts)]
    with FaultProxy(server.host, server.port, cut_up=points) as line:
        options = _options(line.url)
        done = _finished(_start(export, tmp_path / "state", options, cold=True))
        assert line.cuts == cuts
        assert line.sent - size <= cuts * part + OVERHEAD
    assert server.contents() == _expected(export)
    assert done["sent_bytes"] == size
    # The interpreter with boto3 takes about 90 MB; the rest are the parts in flight.
    assert done["peak_bytes"] < 150e6 + options.parallel_parts * part


@pytest.mark.filterwarnings("ignore:tzname")  # a date in a header that has been cut
def test_a_line_that_is_cut_for_everyone_and_in_answers(server: S3Server, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", {"a.safetensors": 11 * MIB, "b.json": 100, "c.safetensors": 6 * MIB})
    for round_ in range(2):
        first = 300 + 217 * round_
        with FaultProxy(
            server.host,
            server.port,
            cut_up=[4 * MIB, 9 * MIB],
            cut_down=[first + 1500 * step for step in range(8)],
            everyone=True,
        ) as line:
            deliver(export, f"{URI}-{round_}", tmp_path / "state", _options(line.url, patience_s=15.0))
            assert line.cuts >= 8
        assert not server.uploads()
        assert server.contents(f"models/one-{round_}/") == _expected(export, f"models/one-{round_}/")


def test_kill_9_twice(server: S3Server, tmp_path: Path) -> None:
    size, part, lanes = 40 * MIB, 5 * MIB, 2
    export = make_export(tmp_path / "export", {"config.json": 100, "model.safetensors": size})
    with FaultProxy(server.host, server.port, bytes_per_s=80e6) as line:
        for point in (13 * MIB, 27 * MIB):
            process = _start(export, tmp_path / "state", _options(line.url))
            _wait_until(lambda point=point: line.sent > point, "the upload does not get on")  # type: ignore[misc]
            process.kill()
            assert process.wait(10) == -signal.SIGKILL
            process.communicate()
            assert f"{PREFIX}manifest.json" not in server.contents()
        done = _finished(_start(export, tmp_path / "state", _options(line.url)))
        assert line.sent - size <= 2 * lanes * part + 3 * OVERHEAD
    assert done["resumed_bytes"] >= 20 * MIB
    assert done["skipped"] == 1
    assert server.contents() == _expected(export)
    assert not server.uploads()


def test_a_stop_signal_leaves_at_once_and_the_next_run_goes_on(server: S3Server, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", {"model.safetensors": 30 * MIB})
    with FaultProxy(server.host, server.port, bytes_per_s=25e6) as line:
        process = _start(export, tmp_path / "state", _options(line.url))
        _wait_until(lambda: line.sent > 12 * MIB, "the upload does not get on")
        begin = time.monotonic()
        process.terminate()
        assert process.wait(10) == 75
        assert time.monotonic() - begin < 3
        process.communicate()
        line.bytes_per_s = None
        done = deliver(export, URI, tmp_path / "state", _options(line.url))
    assert done.resumed_bytes >= 5 * MIB
    assert server.contents() == _expected(export)


def _interrupted(line: FaultProxy, export: Path, state: Path, after: int) -> None:
    """Deliver until this many bytes are uploaded and the line is dead; it is repaired afterwards."""
    cutter = threading.Thread(target=_cut_for_good, args=(line, line.sent + after))
    cutter.start()
    with pytest.raises(DeliveryError, match="cannot be reached"):
        deliver(export, URI, state, _options(line.url, patience_s=0.3))
    cutter.join()
    line.refusing = False


def _cut_for_good(line: FaultProxy, after: int) -> None:
    _wait_until(lambda: line.sent > after, "the upload does not get on")
    line.refusing = True
    line.cut_now()


@pytest.mark.parametrize("code", ["NoSuchUpload", "NoSuchKey"])
def test_an_upload_that_the_server_has_forgotten_is_begun_again(server: S3Server, tmp_path: Path, code: str) -> None:
    export = make_export(tmp_path / "export", {"model.safetensors": 30 * MIB})
    options = _options(server.url)
    stopping = _Stopping(server, "part", 3)
    with pytest.raises(DeliveryError):
        deliver(export, URI, tmp_path / "state", options)
    stopping.over()
    [(key, upload)] = server.uploads()
    client = server.client()
    client.abort_multipart_upload(Bucket=BUCKET, Key=key, UploadId=upload)
    client.close()

    def unknown(request: Request, _environ: dict[str, Any]) -> Answer | None:
        asked = request.operation == "parts" and upload in request.query["uploadId"]
        return Answer("404 Not Found", code) if asked else None

    server.front.rules.append(unknown)
    done = deliver(export, URI, tmp_path / "state", options)
    assert done.resumed_bytes == 0
    assert server.contents() == _expected(export)


class _Stopping:
    """The server denies requests of one kind from the nth on."""

    def __init__(self, server: S3Server, operation: str, number: int, answer: Answer | None = None) -> None:
        self._server, self._operation, self._left = server, operation, number
        self._answer = answer or Answer("403 Forbidden", "AccessDenied")
        self._key = ""
        server.front.rules.append(self._rule)

    def _rule(self, request: Request, _environ: dict[str, Any]) -> Answer | None:
        if request.operation != self._operation or "probe" in request.key:
            return None
        self._left -= 1
        return self._answer if self._left < 0 else None

    def over(self) -> None:
        self._server.front.rules.remove(self._rule)


def test_an_upload_forgotten_in_the_middle_is_begun_again(server: S3Server, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", {"model.safetensors": 30 * MIB})
    parts: list[str] = []

    def forget(request: Request, _environ: dict[str, Any]) -> None:
        if request.operation == "part" and "probe" not in request.key:
            parts.append(request.query["uploadId"][0])
            if len(parts) == 3:
                client = server.client()
                client.abort_multipart_upload(Bucket=BUCKET, Key=request.key, UploadId=parts[0])
                client.close()

    # One part at a time: the server itself fails on a part that crosses the abort.
    server.front.rules.append(forget)
    told: list[int] = []
    deliver(export, URI, tmp_path / "state", _options(server.url, parallel_parts=1), progress=told.append)
    assert len(set(parts)) == 2
    assert sum(told) == 30 * MIB
    assert server.contents() == _expected(export)


def test_a_completion_whose_answer_is_lost_is_found_done(server: S3Server, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", {"model.safetensors": 12 * MIB})
    seen = []

    def lose(request: Request, _environ: dict[str, Any]) -> Answer | None:
        if request.operation != "complete" or "probe" in request.key:
            return None
        seen.append(request)
        if len(seen) == 1:
            return Answer("503 Service Unavailable", "ServiceUnavailable", passed_on=True)
        return Answer("404 Not Found", "NoSuchUpload")

    server.front.rules.append(lose)
    done = deliver(export, URI, tmp_path / "state", _options(server.url))
    assert len(seen) == 2
    assert done.sent_bytes == 12 * MIB
    assert server.contents() == _expected(export)


def test_a_completion_that_outlasts_the_read_timeout_is_waited_for(server: S3Server, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", {"model.safetensors": 12 * MIB})
    begun: list[float] = []

    def dawdle(request: Request, _environ: dict[str, Any]) -> Answer | None:
        if request.operation != "complete" or "probe" in request.key:
            return None
        begun.append(time.monotonic())
        if len(begun) > 1:  # what the server has taken for the first is no upload any more
            return Answer("404 Not Found", "NoSuchUpload")
        time.sleep(3.5)  # until then there is no object
        return None

    server.front.rules.append(dawdle)
    told: list[int] = []
    options = _options(server.url, read_timeout_s=1.0)
    done = deliver(export, URI, tmp_path / "state", options, progress=told.append)
    assert time.monotonic() - begun[0] > 3.5
    assert done.sent_bytes == sum(told) == 12 * MIB
    parts = [request for request in server.front.requests if request.operation == "part" and "probe" not in request.key]
    assert len(parts) == 3
    assert server.contents() == _expected(export)


def test_no_reader_ever_sees_a_marker_over_mixed_files(server: S3Server, tmp_path: Path) -> None:
    shared = {"same.json": 500, "changed.json": 700, "model.safetensors": 22 * MIB}
    first = make_export(tmp_path / "first", {**shared, "gone.json": 50})
    second = make_export(tmp_path / "second", shared, seed=1)
    (second / "same.json").write_bytes((first / "same.json").read_bytes())
    manifest = Manifest.model_validate_json((second / "manifest.json").read_bytes())
    same = Manifest.model_validate_json((first / "manifest.json").read_bytes()).files["same.json"]
    (second / "manifest.json").write_text(Manifest(files={**manifest.files, "same.json": same}).model_dump_json())
    deliver(first, URI, tmp_path / "state", _options(server.url))
    client = server.client()
    client.put_object(Bucket=BUCKET, Key=f"{PREFIX}notes.txt", Body=b"somebody's")
    client.close()
    looks: list[bool] = []
    over = threading.Event()
    reader = threading.Thread(target=_read_on, args=(server, over, looks))
    reader.start()
    with FaultProxy(server.host, server.port, bytes_per_s=50e6, cut_up=[6 * MIB, 15 * MIB]) as line:
        done = deliver(second, URI, tmp_path / "state", _options(line.url))
    over.set()
    reader.join()
    assert all(looks)
    assert len(looks) > 3
    assert (done.skipped, done.removed) == (1, 1)
    assert server.contents() == {**_expected(second), f"{PREFIX}notes.txt": b"somebody's"}


def _read_on(server: S3Server, over: threading.Event, looks: list[bool]) -> None:
    """Record repeatedly whether all files match the marker, if it is the same before and after."""
    client = server.client()

    def marker() -> bytes | None:
        try:
            with client.get_object(Bucket=BUCKET, Key=f"{PREFIX}manifest.json")["Body"] as body:
                return bytes(body.read())
        except client.exceptions.NoSuchKey:
            return None

    while not over.is_set():
        before = marker()
        there = {name.removeprefix(PREFIX): data for name, data in server.contents(PREFIX).items()}
        if before is not None and before == marker():
            files = Manifest.model_validate_json(before).files
            right = [hashlib.sha256(there.get(n, b"-")).hexdigest() == entry.sha256 for n, entry in files.items()]
            looks.append(all(right))
        else:
            looks.append(True)
    client.close()


def test_a_replacement_that_breaks_off_leaves_no_marker_and_no_remains(server: S3Server, tmp_path: Path) -> None:
    first = make_export(tmp_path / "first", {"gone.json": 50, "model.safetensors": 22 * MIB})
    second = make_export(tmp_path / "second", {"also-gone.json": 60, "model.safetensors": 22 * MIB}, seed=1)
    third = make_export(tmp_path / "third", {"config.json": 70}, seed=2)
    with FaultProxy(server.host, server.port, bytes_per_s=100e6) as line:
        deliver(first, URI, tmp_path / "state", _options(line.url))
        _interrupted(line, second, tmp_path / "state", 12 * MIB)
        assert f"{PREFIX}manifest.json" not in server.contents()
        assert len(server.uploads()) == 1
        done = deliver(third, URI, tmp_path / "state", _options(line.url))
    assert server.contents() == _expected(third)
    assert done.removed == 3
    assert done.aborted == 1
    assert not server.uploads()


def test_objects_of_somebody_else_are_never_overwritten(server: S3Server, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", SIZES)
    client = server.client()
    for name in ("config.json", "manifest.json"):
        client.put_object(Bucket=BUCKET, Key=PREFIX + name, Body=b"{}")
        with pytest.raises(DeliveryError, match=f"something else .*{name}") as failure:
            deliver(export, URI, tmp_path / "state", _options(server.url))
        assert failure.value.exit_code == 6
        assert failure.value.remedy
        assert server.contents() == {PREFIX + name: b"{}"}
        client.delete_object(Bucket=BUCKET, Key=PREFIX + name)
    client.close()


@pytest.mark.parametrize(("name", "operation"), [("model.safetensors", "create"), ("config.json", "HEAD")])
def test_a_writer_in_between_is_noticed(server: S3Server, tmp_path: Path, name: str, operation: str) -> None:
    export = make_export(tmp_path / "export", SIZES)

    def write(request: Request, environ: dict[str, Any]) -> None:
        if request.operation == "create" and "probe" not in request.key:
            server.front.rules.remove(write)
            client = server.client()
            client.put_object(Bucket=BUCKET, Key=request.key, Body=b"the other's")
            client.close()

    def write_early(request: Request, environ: dict[str, Any]) -> None:
        # After the delivery's check and before its write: at its own first put.
        if request.operation == "PUT" and request.key == f"{PREFIX}config.json":
            server.front.rules.remove(write_early)
            client = server.client()
            client.put_object(Bucket=BUCKET, Key=request.key, Body=b"the other's")
            client.close()

    server.front.rules.append(write if operation == "create" else write_early)
    with pytest.raises(DeliveryError, match=f"something else wrote {PREFIX}{name}"):
        deliver(export, URI, tmp_path / "state", _options(server.url))
    assert server.contents()[PREFIX + name] == b"the other's"
    assert f"{PREFIX}manifest.json" not in server.contents()


def test_what_the_server_holds_is_compared_at_the_end(server: S3Server, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", {"a.safetensors": 12 * MIB, "b.json": 10})

    def corrupt(request: Request, _environ: dict[str, Any]) -> None:
        # When the last file is uploaded, the first one changes: same size, same metadata.
        if request.operation == "PUT" and request.key.endswith("b.json"):
            server.front.rules.remove(corrupt)
            client = server.client()
            head = client.head_object(Bucket=BUCKET, Key=f"{PREFIX}a.safetensors")
            body = bytearray((export / "a.safetensors").read_bytes())
            body[5] ^= 1
            client.put_object(Bucket=BUCKET, Key=f"{PREFIX}a.safetensors", Body=bytes(body), Metadata=head["Metadata"])
            client.close()

    for checksums in ("auto", "when_required"):
        server.front.rules.append(corrupt)
        with pytest.raises(DeliveryError, match=r"a\.safetensors is not what was sent"):
            deliver(export, URI, tmp_path / "state", _options(server.url, checksums=checksums))
        assert f"{PREFIX}manifest.json" not in server.contents()
        client = server.client()
        client.delete_object(Bucket=BUCKET, Key=f"{PREFIX}b.json")
        client.close()
    deliver(export, URI, tmp_path / "state", _options(server.url))
    assert server.contents() == _expected(export)


def test_an_export_that_has_changed_is_not_delivered(server: S3Server, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", {"model.safetensors": 12 * MIB})
    with (export / "model.safetensors").open("r+b") as file:
        file.seek(7 * MIB)
        file.write(b"damage")
    with pytest.raises(DeliveryError, match="not what the manifest says"):
        deliver(export, URI, tmp_path / "state", _options(server.url))
    assert server.contents() == {}
    assert not server.uploads()
    with (export / "model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(DeliveryError, match="not what the manifest says"):
        deliver(export, URI, tmp_path / "state", _options(server.url))


def test_abandoned_uploads_are_aborted_and_only_ours(server: S3Server, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", SIZES)
    client = server.client()
    keys = [f"{PREFIX}model.safetensors", f"{PREFIX}model.safetensors.other", "elsewhere/model.safetensors"]
    for key in keys:
        client.create_multipart_upload(Bucket=BUCKET, Key=key)
    client.close()
    done = deliver(export, URI, tmp_path / "state", _options(server.url))
    assert done.aborted == 1
    assert sorted(key for key, _ in server.uploads()) == sorted(keys[1:])


@pytest.mark.parametrize("key", ["model.safetensors", "probe"])
def test_an_upload_whose_id_is_lost_on_the_line_is_aborted(server: S3Server, tmp_path: Path, key: str) -> None:
    export = make_export(tmp_path / "export", {"model.safetensors": 11 * MIB})
    begun: list[str] = []

    def lose(request: Request, _environ: dict[str, Any]) -> Answer | None:
        if request.operation != "create" or key not in request.key:
            return None
        begun.append(request.key)
        # The server carries out the request, but the answer is lost.
        return Answer("503 Service Unavailable", "ServiceUnavailable", passed_on=True) if len(begun) == 1 else None

    server.front.rules.append(lose)
    deliver(export, URI, tmp_path / "state", _options(server.url))
    assert len(begun) >= 2
    assert server.contents() == _expected(export)
    assert not server.uploads()


def test_a_part_that_is_not_what_was_sent_is_sent_again(server: S3Server, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", {"model.safetensors": 20 * MIB})
    stopping = _Stopping(server, "part", 3)
    with pytest.raises(DeliveryError):
        deliver(export, URI, tmp_path / "state", _options(server.url))
    stopping.over()
    [(key, upload)] = server.uploads()
    client = server.client()
    there = client.list_parts(Bucket=BUCKET, Key=key, UploadId=upload)["Parts"]
    spoilt = {"PartNumber": there[0]["PartNumber"], "Body": bytes(there[0]["Size"])}
    client.upload_part(Bucket=BUCKET, Key=key, UploadId=upload, **spoilt)
    client.close()
    done = deliver(export, URI, tmp_path / "state", _options(server.url))
    assert done.resumed_bytes == sum(part["Size"] for part in there[1:])
    assert server.contents() == _expected(export)


def test_what_somebody_put_in_place_of_ours_is_not_deleted(server: S3Server, tmp_path: Path) -> None:
    first = make_export(tmp_path / "first", {"config.json": 50, "gone.json": 60})
    second = make_export(tmp_path / "second", {"config.json": 50}, seed=1)
    deliver(first, URI, tmp_path / "state", _options(server.url))
    client = server.client()
    client.put_object(Bucket=BUCKET, Key=f"{PREFIX}gone.json", Body=b"somebody's")
    client.close()
    assert deliver(second, URI, tmp_path / "state", _options(server.url)).removed == 0
    assert server.contents() == {**_expected(second), f"{PREFIX}gone.json": b"somebody's"}


def test_a_writer_in_between_is_noticed_where_an_object_is_replaced(server: S3Server, tmp_path: Path) -> None:
    first = make_export(tmp_path / "first", {"config.json": 50})
    second = make_export(tmp_path / "second", {"config.json": 50}, seed=1)
    deliver(first, URI, tmp_path / "state", _options(server.url))

    def write(request: Request, _environ: dict[str, Any]) -> None:
        if request.operation == "PUT" and request.key == f"{PREFIX}config.json":
            server.front.rules.remove(write)
            client = server.client()
            client.put_object(Bucket=BUCKET, Key=request.key, Body=b"the other's")
            client.close()

    server.front.rules.append(write)
    with pytest.raises(DeliveryError, match=r"something else wrote .*config\.json"):
        deliver(second, URI, tmp_path / "state", _options(server.url))
    assert server.contents() == {f"{PREFIX}config.json": b"the other's"}


def test_no_thread_goes_on_sending_after_a_stop(server: S3Server, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", {"model.safetensors": 30 * MIB})
    main = threading.get_ident()
    with FaultProxy(server.host, server.port, bytes_per_s=2.5e6) as line:

        def stop() -> None:
            _wait_until(lambda: line.sent > 2 * MIB, "the upload does not get on")
            signal.pthread_kill(main, signal.SIGTERM)

        stopping = threading.Thread(target=stop)
        with StopSignals().installed():
            stopping.start()
            with pytest.raises(Stopped):
                deliver(export, URI, tmp_path / "state", _options(line.url))
        stopping.join()
        names = [thread.name for thread in threading.enumerate()]
        _wait_until(lambda: not [name for name in names if name.startswith("s3-part")], f"still there: {names}")
    assert len(server.uploads()) == 1
    assert list((tmp_path / "state").glob("s3-*.json"))


def test_a_silent_server_does_not_hold_up_the_end_of_the_process(server: S3Server, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", {"model.safetensors": 30 * MIB})
    silent, over = threading.Event(), threading.Event()

    def say_nothing(request: Request, environ: dict[str, Any]) -> None:
        if request.operation == "part" and "probe" not in request.key:
            environ["wsgi.input"] = BytesIO(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
            silent.set()
            over.wait(40)

    server.front.rules.append(say_nothing)
    process = _start(export, tmp_path / "state", _options(server.url, read_timeout_s=60.0))
    try:
        assert silent.wait(30)
        time.sleep(0.5)
        begin = time.monotonic()
        process.terminate()
        assert process.wait(30) == 75
        assert time.monotonic() - begin < 5
    finally:
        over.set()
        process.kill()
        process.communicate()


def test_parts_that_a_server_does_not_find_are_looked_at_again(server: S3Server, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", {"model.safetensors": 12 * MIB})
    seen = []

    def refuse(request: Request, _environ: dict[str, Any]) -> Answer | None:
        if request.operation != "complete" or "probe" in request.key:
            return None
        seen.append(request)
        return Answer("400 Bad Request", "InvalidPart") if len(seen) < 3 else None

    server.front.rules.append(refuse)
    told: list[int] = []
    deliver(export, URI, tmp_path / "state", _options(server.url), progress=told.append)
    assert len(seen) == 3
    assert sum(told) == 12 * MIB
    assert server.contents() == _expected(export)


def test_a_server_that_asks_for_patience_gets_it(server: S3Server, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", {"config.json": 10})
    times: list[float] = []

    def busy(request: Request, _environ: dict[str, Any]) -> Answer | None:
        if request.operation != "PUT" or not request.key.endswith("config.json"):
            return None
        times.append(time.monotonic())
        return Answer("503 Slow Down", "SlowDown", {"Retry-After": "1"}) if len(times) == 1 else None

    server.front.rules.append(busy)
    deliver(export, URI, tmp_path / "state", _options(server.url))
    assert times[1] - times[0] >= 1


def test_a_server_that_keeps_failing_is_given_up(server: S3Server, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", {"config.json": 10})
    _Stopping(server, "PUT", 0, Answer("503 Service Unavailable", "ServiceUnavailable"))
    with pytest.raises(DeliveryError, match="kept failing: ServiceUnavailable"):
        deliver(export, URI, tmp_path / "state", _options(server.url, patience_s=0.0))
    assert server.operations().count("PUT") == 4 + 5  # the probe's and botocore's


def test_a_server_that_fails_for_longer_than_botocore_tries_is_waited_for(server: S3Server, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", {"a.safetensors": 11 * MIB, "b.json": 10, "c.safetensors": 12 * MIB})
    begun: list[float] = []

    def fail(request: Request, _environ: dict[str, Any]) -> Answer | None:
        if request.operation != "part" or not request.key.endswith("c.safetensors"):
            return None
        begun.append(time.monotonic())
        return Answer("503 Service Unavailable", "ServiceUnavailable") if begun[-1] - begun[0] < 1 else None

    server.front.rules.append(fail)
    told: list[int] = []
    done = deliver(export, URI, tmp_path / "state", _options(server.url, patience_s=20.0), progress=told.append)
    assert (done.sent, sum(told)) == (4, 23 * MIB + 10)
    assert server.contents() == _expected(export)
    assert not server.uploads()
    created = [request.key for request in server.front.requests if request.operation == "create"]
    assert created.count(f"{PREFIX}c.safetensors") == 1  # what was begun goes on


def test_the_probe_finds_what_the_server_does_and_leaves_nothing(server: S3Server) -> None:
    found = probe(URI, _options(server.url))
    assert found.conditional
    assert found.conditional_complete
    assert found.sha256_checksums
    assert not found.quirks
    assert server.contents() == {}
    assert not server.uploads()


def test_a_server_without_conditions_and_checksums_serves_too(server: S3Server, tmp_path: Path) -> None:
    def ignore(_request: Request, environ: dict[str, Any]) -> None:
        environ.pop("HTTP_IF_NONE_MATCH", None)
        environ.pop("HTTP_IF_MATCH", None)

    server.front.rules.append(ignore)
    server.front.hidden_headers = ("x-amz-checksum",)
    found = probe(URI, _options(server.url))
    assert not found.conditional
    assert not found.conditional_complete
    assert not found.sha256_checksums
    assert any("refuse to overwrite" in quirk for quirk in found.quirks)
    export = make_export(tmp_path / "export", SIZES)
    deliver(export, URI, tmp_path / "state", _options(server.url), capabilities=found)
    assert server.contents() == _expected(export)
    conditional = [r for r in server.front.requests if "if-none-match" in r.headers and "probe" not in r.key]
    assert not conditional


def test_a_server_that_knows_neither_is_served_too(server: S3Server, tmp_path: Path) -> None:
    def unknown(request: Request, environ: dict[str, Any]) -> Answer | None:
        strange = {"if-none-match", "if-match", "x-amz-checksum-sha256", "x-amz-checksum-algorithm"}
        refused = request.method in ("PUT", "POST") and strange & request.headers.keys()
        return Answer("501 Not Implemented", "NotImplemented") if refused else None

    server.front.rules.append(unknown)
    found = probe(URI, _options(server.url))
    assert not found.conditional
    assert not found.sha256_checksums
    assert server.contents() == {}
    assert not server.uploads()
    export = make_export(tmp_path / "export", SIZES)
    deliver(export, URI, tmp_path / "state", _options(server.url))
    assert server.contents() == _expected(export)


def test_a_server_that_refuses_conditions_that_hold_is_given_none(server: S3Server, tmp_path: Path) -> None:
    first = make_export(tmp_path / "first", SIZES)
    second = make_export(tmp_path / "second", SIZES, seed=1)
    deliver(first, URI, tmp_path / "state", _options(server.url))

    def refuse(request: Request, _environ: dict[str, Any]) -> Answer | None:
        refused = request.operation == "PUT" and "if-match" in request.headers
        return Answer("412 Precondition Failed", "PreconditionFailed") if refused else None

    server.front.rules.append(refuse)
    found = probe(URI, _options(server.url))
    assert not found.conditional
    assert found.conditional_complete
    assert not server.uploads()
    deliver(second, URI, tmp_path / "state", _options(server.url))
    assert server.contents() == _expected(second)


def test_a_server_whose_objects_cannot_be_verified_is_refused_by_the_probe(server: S3Server) -> None:
    server.front.own_part_etags = True
    server.front.hidden_headers = ("x-amz-checksum",)
    with pytest.raises(DeliveryError, match="neither SHA-256 checksums nor MD5s") as failure:
        probe(URI, _options(server.url))
    assert failure.value.exit_code == 6
    assert server.contents() == {}
    assert not server.uploads()


def _user(server: S3Server, monkeypatch: pytest.MonkeyPatch, *actions: str) -> Callable[[str], None]:
    """Become a user with these permissions only, and return a function that changes the policy."""
    iam = server.client("iam")
    iam.create_user(UserName="admin")
    iam.put_user_policy(UserName="admin", PolicyName="all", PolicyDocument=policy("*"))
    admin = iam.create_access_key(UserName="admin")["AccessKey"]
    iam.create_user(UserName="uploader")
    iam.put_user_policy(UserName="uploader", PolicyName="given", PolicyDocument=policy(*actions))
    uploader = iam.create_access_key(UserName="uploader")["AccessKey"]
    iam.close()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", uploader["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", uploader["SecretAccessKey"])
    server.require_permissions(after=0)

    def change(*now: str) -> None:
        client = server.client("iam", admin["AccessKeyId"], admin["SecretAccessKey"])
        client.put_user_policy(UserName="uploader", PolicyName="given", PolicyDocument=policy(*now))
        client.close()

    return change


@pytest.mark.parametrize(
    "denied",
    ["s3:PutObject", "s3:GetObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"],
)
def test_the_probe_names_the_missing_permission(server: S3Server, monkeypatch: pytest.MonkeyPatch, denied: str) -> None:
    needed = {
        "s3:PutObject",
        "s3:GetObject",
        "s3:DeleteObject",
        "s3:AbortMultipartUpload",
        "s3:ListMultipartUploadParts",
        "s3:ListBucketMultipartUploads",
    }
    _user(server, monkeypatch, *(needed - {denied}))
    with pytest.raises(DeliveryError, match=f"not allowed: {denied}") as failure:
        probe(URI, _options(server.url))
    assert failure.value.exit_code == 6
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in failure.value.line
    assert os.environ["AWS_ACCESS_KEY_ID"] not in failure.value.line
    if denied not in ("s3:DeleteObject", "s3:AbortMultipartUpload"):
        server.require_permissions(after=inf)
        assert server.contents() == {}
        assert not server.uploads()


def test_a_right_that_is_taken_away_during_the_upload(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = make_export(tmp_path / "export", {"config.json": 10, "model.safetensors": 40 * MIB})
    change = _user(server, monkeypatch, "s3:*")
    with FaultProxy(server.host, server.port, bytes_per_s=60e6) as line:

        def revoke() -> None:
            _wait_until(lambda: line.sent > 22 * MIB, "the upload does not get on")
            change("s3:GetObject")

        revoking = threading.Thread(target=revoke)
        revoking.start()
        with pytest.raises(DeliveryError, match="not allowed: s3:PutObject") as failure:
            deliver(export, URI, tmp_path / "state", _options(line.url))
        revoking.join()
        assert failure.value.exit_code == 6
        assert "run again" in failure.value.line
        assert line.sent < 40 * MIB
        change("s3:*")
        done = deliver(export, URI, tmp_path / "state", _options(line.url))
    assert done.resumed_bytes >= 15 * MIB
    assert done.sent_bytes == 40 * MIB - done.resumed_bytes
    server.require_permissions(after=inf)
    assert server.contents() == _expected(export)


def test_wrong_credentials(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = make_export(tmp_path / "export", SIZES)
    _user(server, monkeypatch, "s3:*")
    wrong = {"AWS_SECRET_ACCESS_KEY": "quitewrong" * 4, "AWS_ACCESS_KEY_ID": "AKIAWRONGWRONGWRONG0"}
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
        server.front.requests.clear()
        with pytest.raises(DeliveryError, match="does not accept the credentials") as failure:
            deliver(export, URI, tmp_path / "state", _options(server.url))
        assert failure.value.exit_code == 6
        assert value not in failure.value.line
        assert len(server.front.requests) == 1


def test_no_credentials(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(DeliveryError, match="no S3 credentials"):
        deliver(make_export(tmp_path / "export", SIZES), URI, tmp_path / "state", _options(server.url))
    with pytest.raises(DeliveryError, match="no S3 credentials"):
        probe(URI, _options(server.url))
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(DeliveryError, match="nobody"):
        probe(URI, _options(server.url))


def test_no_bucket_and_no_server(server: S3Server, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", SIZES)
    with pytest.raises(DeliveryError, match="no such bucket"):
        deliver(export, "s3://nowhere/at/all", tmp_path / "state", _options(server.url))
    with pytest.raises(DeliveryError, match="no such bucket"):
        probe("s3://nowhere/at/all", _options(server.url))
    with FaultProxy("127.0.0.1", 9) as dead, pytest.raises(DeliveryError, match="cannot be reached"):
        probe(URI, _options(dead.url))
    with pytest.raises(UsageError, match="endpoint"):
        probe(URI, _options("not a url"))


@pytest.mark.parametrize("uri", ["s3://", "s3:///prefix", "https://bucket/prefix", "s3://bucket/a?b=c"])
def test_what_is_no_target(uri: str) -> None:
    with pytest.raises(UsageError, match="not an S3 target"):
        probe(uri, _options("http://127.0.0.1:9"))


def test_options_that_make_no_sense() -> None:
    with pytest.raises(UsageError):
        S3Options(kms_key="k")


def test_parts_are_equal_and_never_too_many() -> None:
    options = S3Options()
    assert options.part_bytes(1) == 16 * MIB
    for size in (160_000 * MIB, 160_000 * MIB + 1, 5 << 40):
        part = options.part_bytes(size)
        assert part % MIB == 0
        assert -(-size // part) <= 10_000


def test_a_bucket_without_a_prefix(server: S3Server, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", {"config.json": 10})
    deliver(export, f"s3://{BUCKET}", tmp_path / "state", _options(server.url))
    assert server.contents() == _expected(export, "")


class Silent(BaseHTTPRequestHandler):
    """A server whose answers have lost their contents."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        return


def test_a_listing_without_contents_is_no_empty_one() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Silent) as silent:
        threading.Thread(target=silent.serve_forever, args=(0.02,), daemon=True).start()
        store = S3Client(S3Target.parse(URI), _options(f"http://127.0.0.1:{silent.server_port}"))
        with closing(store), pytest.raises(DeliveryError):
            store.names()
        silent.shutdown()


def test_what_one_test_left_under_way_does_not_reach_the_next(running: S3Server) -> None:
    begun = threading.Event()

    def slow(request: Request, _environ: dict[str, Any]) -> None:
        if request.operation == "create":
            begun.set()
            time.sleep(0.2)

    with closing(running.client()) as client:
        client.create_bucket(Bucket=BUCKET)
        running.front.rules.append(slow)
        late = threading.Thread(target=client.create_multipart_upload, kwargs={"Bucket": BUCKET, "Key": "late"})
        late.start()
        assert begun.wait(10)
        running.reset()
        late.join(10)
        client.create_bucket(Bucket=BUCKET)
        assert not running.uploads()
