"""Third-party S3 servers on the loopback, each in its own temporary folder.

`tests/integration/upload/test_s3_other_servers.py` says how to install them.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

BUCKET = "results"
SECRET = "averysecretsecretaccesskeyforthetests0000"
_PATIENCE_S = 60.0
# Ports handed out by this process; once a server is up, its port is in use anyway.
_given: set[int] = set()


class OtherServer:
    """A server with an empty bucket; a context manager.

    Attributes:
        needs: Programs that must be installed.
        key_id: Key id of its only account.
    """

    needs: tuple[str, ...] = ()
    key_id = "AKIAEXAMPLEEXAMPLE00"

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self.port = _free_port()
        self.host = "127.0.0.1"

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def __enter__(self) -> Self:
        self._holder = tempfile.TemporaryDirectory(prefix="s3-", ignore_cleanup_errors=True)
        self.folder = Path(self._holder.name)
        try:
            self._start()
            self._wait("create_bucket", self._make_bucket)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._holder.cleanup()

    def _start(self) -> None:
        raise NotImplementedError

    def _serve(self, *command: object) -> None:
        """Start a part of the server; its output goes to a file."""
        with (self.folder / f"out-{len(self._processes)}.log").open("wb") as log:
            process = subprocess.Popen(
                [str(part) for part in command], cwd=self.folder, stdout=log, stderr=log, env=_environment()
            )
        self._processes.append(process)

    def _do(self, *command: object) -> None:
        assert self._does(*command), f"{command}: {(self.folder / 'out-done.log').read_text(errors='replace')}"

    def _does(self, *command: object) -> bool:
        words = [str(part) for part in command]
        with (self.folder / "out-done.log").open("wb") as log:
            out = {"stdout": log, "stderr": log, "timeout": _PATIENCE_S, "env": _environment()}
            return subprocess.run(words, cwd=self.folder, **out).returncode == 0

    def _wait(self, what: str, done: Callable[[], bool]) -> None:
        end = time.monotonic() + _PATIENCE_S
        while not done():
            dead = [process.args for process in self._processes if process.poll() is not None]
            logs = "".join(path.read_text(errors="replace")[-500:] for path in self.folder.glob("out-*.log"))
            assert not dead, f"{dead} ended: {logs}"
            assert time.monotonic() < end, f"{what}: {logs}"
            time.sleep(0.2)

    def _make_bucket(self) -> bool:
        client = self.client()
        try:
            client.create_bucket(Bucket=BUCKET)
        except (BotoCoreError, ClientError):
            return False
        finally:
            client.close()
        return True

    def client(self) -> Any:
        """Return a separate client, to inspect and tamper."""
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=self.key_id,
            aws_secret_access_key=SECRET,
            config=Config(
                s3={"addressing_style": "path"},
                retries={"total_max_attempts": 1},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def contents(self) -> dict[str, bytes]:
        client = self.client()
        try:
            listed = client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
            return {item["Key"]: client.get_object(Bucket=BUCKET, Key=item["Key"])["Body"].read() for item in listed}
        finally:
            client.close()

    def uploads(self) -> list[tuple[str, str]]:
        client = self.client()
        try:
            listed = client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
            return [(item["Key"], item["UploadId"]) for item in listed]
        finally:
            client.close()

    def empty(self) -> None:
        client = self.client()
        for key, upload in self.uploads():
            client.abort_multipart_upload(Bucket=BUCKET, Key=key, UploadId=upload)
        for item in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
            client.delete_object(Bucket=BUCKET, Key=item["Key"])
        client.close()


class Ceph(OtherServer):
    """Ceph's object gateway on a cluster of one monitor and one disk, which is a sparse file."""

    needs = ("radosgw", "radosgw-admin", "ceph", "ceph-mon", "ceph-osd", "monmaptool")

    def _start(self) -> None:
        cluster, disk, monitor = uuid.uuid4(), uuid.uuid4(), f"v1:127.0.0.1:{_free_port()}"
        settings = {
            "fsid": cluster,
            "mon_host": monitor,
            "public_addr": "127.0.0.1",
            "auth_cluster_required": "none",
            "auth_service_required": "none",
            "auth_client_required": "none",
            "osd_pool_default_size": 1,
            "osd_pool_default_min_size": 1,
            "osd_pool_default_pg_num": 1,
            "osd_pool_default_pg_autoscale_mode": "off",
            "osd_crush_chooseleaf_type": 0,
            "mon_allow_pool_size_one": "true",
            "mon_max_pg_per_osd": 1000,
            "run_dir": self.folder,
            "admin_socket": f"{self.folder}/$name.asok",
            "log_file": f"{self.folder}/$name.log",
            "pid_file": f"{self.folder}/$name.pid",
            "mon_data": self.folder / "mon",
            "osd_data": self.folder / "osd",
            "rgw_data": self.folder / "rgw",
            "osd_objectstore": "bluestore",
            "bluestore_block_size": 10 << 30,
            "osd_memory_target": 896 << 20,
            "rgw_frontends": f"beast endpoint=127.0.0.1:{self.port}",
        }
        for name in ("mon", "osd", "rgw"):
            (self.folder / name).mkdir()
        conf = self.folder / "ceph.conf"
        conf.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
        self._do("monmaptool", "--create", "--fsid", cluster, "--addv", "a", f"[{monitor}]", "monmap")
        self._do("ceph-mon", "-c", conf, "--mkfs", "-i", "a", "--monmap", "monmap")
        self._serve("ceph-mon", "-c", conf, "-f", "-i", "a")
        # Retried: the monitor may not be up yet.
        self._wait("the monitor", lambda: self._does("ceph", "-c", conf, "osd", "new", disk))
        self._do("ceph-osd", "-c", conf, "-i", "0", "--mkfs", "--osd-uuid", disk)
        self._serve("ceph-osd", "-c", conf, "-f", "-i", "0")
        keys = ("--access-key", self.key_id, "--secret-key", SECRET)
        self._do("radosgw-admin", "-c", conf, "user", "create", "--uid", "tests", "--display-name", "tests", *keys)
        self._serve("radosgw", "-c", conf, "-n", "client.rgw", "-f")


SERVERS: dict[str, type[OtherServer]] = {"ceph": Ceph}


def missing(kind: type[OtherServer]) -> list[str]:
    """Return the programs that a server needs and that are not installed."""
    return [program for program in kind.needs if shutil.which(program, path=_environment()["PATH"]) is None]


def _environment() -> dict[str, str]:
    """Return an environment for system programs, without the tests' virtual environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PYTHON"))}
    return {**kept, "PATH": f"{kept.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"}


def _free_port() -> int:
    """Return a port outside the ephemeral range."""
    while True:
        port = random.randrange(20_000, 32_000)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        if port not in _given:
            _given.add(port)
            return port
