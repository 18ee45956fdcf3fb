"""A real Ray cluster on the loopback interface, whose nodes are processes of this machine."""

from __future__ import annotations

import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Self

import psutil

from tests.processes import environment

RAY = Path(sys.executable).with_name("ray")
# One for all clusters: Ray reads it once per process.
TOKEN = secrets.token_hex(32)


class RayCluster:
    """A token-protected cluster of a head and added nodes."""

    def __init__(self, port: int | None = None, **options: Any) -> None:
        """Set the head's port (a free one by default) and options, as `ray start` names them."""
        self._place = tempfile.TemporaryDirectory(prefix="ray-")
        self._options = options
        self.nodes: list[subprocess.Popen[str]] = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = port or probe.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.env = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # otherwise actors get no CPU on a busy machine
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_failure_threshold": "3",
        }

    def __enter__(self) -> Self:
        try:
            head = {"include-dashboard": "false", "temp-dir": self._place.name, **self._options}
            self._start("--head", f"--port={self.port}", **head)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for number, node in enumerate(self.nodes):
            self.kill(number)
            assert node.stdout is not None
            node.stdout.close()
        self._place.cleanup()

    def add(self, **options: Any) -> int:
        """Start another node; return its number."""
        return self._start(f"--address={self.address}", **options)

    def kill(self, node: int) -> None:
        """Kill all processes of a node at once, as a preemption does."""
        for process in family(self.nodes[node].pid):
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue  # it has ended
        self.nodes[node].wait()

    def actors(self) -> list[psutil.Process]:
        """Return the worker processes of all nodes."""
        all_of = (process for node in self.nodes for process in family(node.pid))
        return [process for process in all_of if "ray::_Actor" in " ".join(_command(process))]

    def _start(self, *words: str, **options: Any) -> int:
        given = {"node-ip-address": "127.0.0.1", "num-cpus": 2, "object-store-memory": 100_000_000, **options}
        arguments = [
            *words,
            *(f"--{name}={value}" for name, value in given.items()),
            "--block",
            "--disable-usage-stats",
        ]
        node = subprocess.Popen(
            [str(RAY), "start", *arguments],
            env=environment(**self.env),  # without what a cluster of an earlier test has set here
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.nodes.append(node)
        assert node.stdout is not None
        said = []
        for line in node.stdout:
            said.append(line)
            if "This command will now block" in line or "--block" in line:
                return len(self.nodes) - 1
        raise AssertionError("".join(said))


def family(pid: int) -> list[psutil.Process]:
    """Return a process and all its descendants."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
