"""A real PostgreSQL server on the loopback interface, in a folder of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

_DEBIAN = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
PROGRAMS = _DEBIAN[-1].parent if _DEBIAN else None
PASSWORD = "kept-out-of-every-file-0123"


def missing() -> str | None:
    """Return why no server can run here, None if one can."""
    if PROGRAMS is None:
        return "needs PostgreSQL (apt-get install postgresql)"
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        return "needs setpriv, since PostgreSQL does not run as root"
    return None


class Postgres:
    """A server with one user and one database, both named job, that asks for a password."""

    def __init__(self) -> None:
        # Not among pytest's folders, which nobody but their owner may pass.
        self._place = tempfile.TemporaryDirectory(prefix="postgres-")
        self._folder = Path(self._place.name)
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def __enter__(self) -> Self:
        password = self._folder / "password"
        password.write_text(PASSWORD)
        if os.geteuid() == 0:
            for path in (self._folder, password):
                shutil.chown(path, "postgres", "postgres")
        made = ["initdb", "-D", self._folder / "data", "-U", "job", "--auth=scram-sha-256", f"--pwfile={password}"]
        subprocess.run(self._as_postgres(*made, "--no-sync"), check=True, capture_output=True, cwd=self._folder)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._place.cleanup()

    def _as_postgres(self, program: str, *arguments: object) -> list[str]:
        assert PROGRAMS is not None
        change = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
        return [*change, str(PROGRAMS / program), *map(str, arguments)]

    def start(self) -> None:
        options = ["-D", self._folder / "data", "-p", self.port, "-h", "127.0.0.1", "-k", self._folder, "-F"]
        log = self._folder / "log"
        deadline = time.monotonic() + 60
        while True:
            with log.open("ab") as output:
                command = self._as_postgres("postgres", *options)
                self._process = self._process or subprocess.Popen(command, stdout=output, stderr=output)
            asked = self._as_postgres("pg_isready", "-h", "127.0.0.1", "-p", self.port)
            if self._process.poll() is None and subprocess.run(asked, capture_output=True).returncode == 0:
                break
            if self._process.poll() is not None:
                self._process = None  # the port is somebody's for a moment
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        if subprocess.run(self._sql("SELECT 1", "job"), capture_output=True, env=self._env).returncode:
            subprocess.run(self._sql("CREATE DATABASE job", "postgres"), check=True, capture_output=True, env=self._env)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()  # "smart": waits for clients
            try:
                self._process.wait(2)
            except subprocess.TimeoutExpired:
                self._process.send_signal(2)  # "fast": does not
                self._process.wait(30)
            self._process = None

    @property
    def _env(self) -> dict[str, str]:
        return {**os.environ, "PGPASSWORD": PASSWORD}

    def _sql(self, statement: str, database: str) -> list[str]:
        assert PROGRAMS is not None
        return [str(PROGRAMS / "psql"), "-h", "127.0.0.1", "-p", str(self.port), "-U", "job", "-c", statement, database]

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://job@127.0.0.1:{self.port}/job"
