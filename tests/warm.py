"""Processes of the command that begin with the slow libraries loaded.

Loading torch and transformers takes a process several seconds. A server has loaded them, and nothing of ours, and
forks for every command: its child is a process like any other, and what it runs is what a cold one runs.

Libraries read variables of the environment while they are loaded. So a command is only started here if its environment
differs from the server's in nothing but what is known to be read later; else `server_for` says that there is none.
Where only the Hub differs, a server forks another one for that Hub, which the next commands at the same Hub share.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MAIN = "from job.cli.main import main; main()"
COLD = [sys.executable, "-c", MAIN]
SERVE = "from tests.warm import serve, run; serve(); run()"
SERVER = [sys.executable, "-c", SERVE]

# What neither starts a thread, which a fork would lose, nor reads where the Hub is and what is kept of it.
ANYWHERE = (
    *("torch", "torch._dynamo", "optuna", "sqlalchemy.dialects.sqlite", "sqlalchemy.ext.declarative"),
    *("alembic.command", "boto3", "botocore.session", "httpx2", "pydantic_settings", "typer", "rich.console", "psutil"),
    *("plotly.graph_objects", "plotly.subplots", "plotly.offline", "jinja2", "tokenizers", "safetensors.torch"),
)
# What does read that.
AT_ONE_HUB = (
    *("transformers.models.llama.modeling_llama", "transformers.models.qwen3.modeling_qwen3"),
    *("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto", "accelerate"),
)
# Ours, for processes that are started by the dozen: what a process loads is nothing that such tests are about.
OURS = (
    "job.pipeline",
    "job.stages.export",
    "job.preflight.runner",
    "job.proof.truth_test",
    "job.stages.followups",
    "job.mirror.folder_store",
)
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "FTP_PROXY", "NO_PROXY")
# The beginnings of names of variables that are read when they are needed, or by us.
LATE = ("ABLITERATE_", "AWS_", "CONTAINER_", "JOB_", "PGPASSWORD", "PYTEST_", "RUNPOD_", "VAST_", *PROXIES)
# Read late, too, but remembered: `forget_folder` has it read again.
LATE_ONCE = ("TMPDIR",)
# What nothing but a test of redaction gives, and no library reads.
SECRETS = ("DEPLOY_KEY", "DB_PASSWORD", "FOLDER_SECRET")

_servers: dict[tuple[bool, bool], Server] = {}
_at_other_hub: list[Server] = []
_starting = threading.Lock()
# What a forked process runs in place of the command.
_script: list[str] = []


class Server:
    """The end of a server that lives in the process of the tests.

    Args:
        environment: That in which libraries are loaded.
        modules: What it loads.
        base: The server that forks it; by default it is a process of its own.
    """

    def __init__(self, environment: Mapping[str, str], modules: Sequence[str], base: Server | None = None) -> None:
        self.line, other = socket.socketpair()
        # It measures nothing itself, its children do.
        own = {**environment, "COVERAGE_PROCESS_START": "", "COVERAGE_PROCESS_CONFIG": ""}
        self.environment = dict(environment)
        self._process: subprocess.Popen[Any]
        # Its output is a pipe so that what the children inherit is set up for pipes.
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "cwd": ROOT, "env": own}
        with other:
            if base is None:
                command = [*SERVER, str(other.fileno()), *modules]
                options |= {"stdin": subprocess.DEVNULL, "pass_fds": [other.fileno()]}
                self._process = subprocess.Popen(command, **options)
            else:  # a forked process inherits nothing but its streams
                self._process = Warm(base, ["0", *modules], script=SERVE, stdin=other, text=True, **options)
        atexit.register(self.close)

    def close(self) -> None:
        """End the server; the processes that it has forked go on."""
        atexit.unregister(self.close)
        self.line.close()
        self._process.communicate()


def read_early(environment: Mapping[str, str], usual: Mapping[str, str]) -> set[str]:
    """Return the variables that differ between two environments and that libraries read while they are loaded."""
    names = {name for name in environment.keys() | usual.keys() if environment.get(name) != usual.get(name)}
    late = {"HF_TOKEN", *LATE_ONCE, *SECRETS}
    return {name for name in names if not name.upper().startswith(LATE) and name not in late}


def forget_folder() -> None:
    """Have the folder of temporary files looked up anew."""
    tempfile.tempdir = None


def server_for(environment: Mapping[str, str], usual: Mapping[str, str], *, ours: bool = False) -> Server | None:
    """Return a server whose children begin as a process in that environment does, if there is one.

    Args:
        environment: That of the process.
        usual: That of the servers.
        ours: Our own modules are loaded, too.
    """
    early = read_early(environment, usual)
    at_usual_hub = not early
    if sys.platform != "linux" or not all(name.startswith("HF_") for name in early):
        return None
    with _starting:
        if (key := (at_usual_hub, ours and at_usual_hub)) not in _servers:
            libraries = [*ANYWHERE, *AT_ONE_HUB] if at_usual_hub else ANYWHERE
            _servers[key] = Server(usual, [*libraries, *(OURS if key[1] else ())])
        return _servers[key] if at_usual_hub else _at_hub(environment, _servers[key])


def _at_hub(environment: Mapping[str, str], base: Server) -> Server:
    """Return the server whose libraries know the Hub of an environment; the former Hub's ends."""
    if _at_other_hub and not read_early(environment, _at_other_hub[0].environment):
        return _at_other_hub[0]
    while _at_other_hub:
        _at_other_hub.pop().close()
    _at_other_hub.append(Server(environment, AT_ONE_HUB, base))
    return _at_other_hub[0]


class Warm(subprocess.Popen[str]):
    """A process that a server forks; with it everything can be done that can be with a process that Popen starts.

    It is no child of this process, so how it begins and how its end is known are other than in Popen.
    """

    def __init__(self, server: Server, arguments: Sequence[str], script: str | None = None, **options: Any) -> None:
        self._server, self._code = server, script
        super().__init__(arguments, **options)

    def _execute_child(
        self,
        args: Sequence[str],
        executable: None,
        preexec_fn: None,
        close_fds: bool,
        pass_fds: Sequence[int],
        cwd: str | os.PathLike[str] | None,
        env: Mapping[str, str],
        startupinfo: None,
        creationflags: int,
        shell: bool,
        p2cread: int,
        p2cwrite: int,
        c2pread: int,
        c2pwrite: int,
        errread: int,
        errwrite: int,
        *others: Any,
    ) -> None:
        self._line, theirs = socket.socketpair()
        with theirs:
            streams = [given if given >= 0 else usual for usual, given in enumerate((p2cread, c2pwrite, errwrite))]
            socket.send_fds(self._server.line, [b"."], [theirs.fileno(), *streams])
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
        wanted = {"arguments": args, "cwd": str(cwd or Path.cwd()), "environment": dict(env), "script": self._code}
        self._line.sendall(json.dumps(wanted).encode())
        self._line.shutdown(socket.SHUT_WR)
        (self.pid,) = struct.unpack("=i", self._line.recv(4))
        self._child_created = True

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        try:
            told = self._line.recv(4, socket.MSG_DONTWAIT if wait_flags & os.WNOHANG else 0)
        except BlockingIOError:
            return 0, 0
        except OSError:
            told = b""  # closed: Popen still asks after processes that a failed test has left behind
        self._line.close()
        return self.pid, struct.unpack("=i", told)[0] if len(told) == 4 else signal.SIGKILL

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None and self._waitpid_lock.acquire(blocking=False):
            try:
                if self.returncode is None:
                    pid, status = self._try_wait(os.WNOHANG)
                    if pid:
                        self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


def serve() -> None:
    """Load what is named, then fork for every command; return in its process."""
    before = dict(os.environ)
    line = socket.socket(fileno=int(sys.argv[1]))
    for name in sys.argv[2:]:
        importlib.import_module(name)
    at_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # who interrupts the tests ends this by their end
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    gc.collect()
    gc.freeze()  # so that the children's collections leave the memory shared
    while True:
        _, found, _, _ = socket.recv_fds(line, 1, 4)
        if not found:
            os._exit(0)
        if os.fork() == 0:
            line.close()
            _keep(before, *found)
            signal.signal(signal.SIGINT, at_interrupt)
            return
        for number in found:
            os.close(number)


def run() -> None:
    """Run the command or a script and end as the interpreter does, but for taking all modules apart.

    That would write to all the memory that is shared with the server, and so copy it.
    """
    try:
        exec(_script.pop() if _script else MAIN, {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        code = end.code or 0
    threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _keep(before: Mapping[str, str], line_number: int, *streams: int) -> None:
    """Fork the command's process and return in it; outside tell its number and, when it has ended, how."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    line = socket.socket(fileno=line_number)
    with line.makefile("rb") as file:
        wanted = json.load(file)
    process = os.fork()
    if process == 0:
        line.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        _become(wanted["arguments"], wanted["cwd"], before, wanted["environment"])
        _script[:] = [wanted["script"]] if wanted["script"] else []
        return
    for number in streams:
        os.close(number)
    try:
        line.send(struct.pack("=i", process))
        line.send(struct.pack("=i", os.waitpid(process, 0)[1]))
    except BrokenPipeError:
        pass  # whoever started it is gone
    os._exit(0)


def _become(arguments: list[str], cwd: str, before: Mapping[str, str], environment: Mapping[str, str]) -> None:
    """Make this process what a cold one is when its code begins, whatever was the server's environment before."""
    os.chdir(cwd)
    for name in before.keys() - environment.keys():
        del os.environ[name]
    # What is the same stays as it is: libraries have set a few themselves.
    os.environ.update({name: value for name, value in environment.items() if before.get(name) != value})
    forget_folder()
    sys.orig_argv[:] = [*COLD, *arguments]  # what a restart executes
    sys.argv[:] = ["-c", *arguments]
    sys.modules["numpy"].random.seed()  # Python's own generator does so itself; torch begins with a fixed seed
    if os.environ.get("COVERAGE_PROCESS_CONFIG") or os.environ.get("COVERAGE_PROCESS_START"):
        import coverage

        coverage.process_startup()
