"""Start processes of the command with the slow libraries preloaded.

Loading torch and transformers takes a process several seconds. A server has loaded them, and nothing of ours, and forks
for every command. Its child is an ordinary process and runs the same code as a cold one.

Libraries read environment variables while they are loaded. So a command starts here only if its environment differs
from the server's in variables known to be read later; otherwise `server_for` returns None. If only the Hub differs, a
server forks another one for that Hub, which the next commands at the same Hub share.
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
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MAIN = "from job.cli.main import main; main()"
COLD = [sys.executable, "-c", MAIN]
SERVE = "from tests.warm import serve, run; serve(); run()"
SERVER = [sys.executable, "-c", SERVE]

# These start no thread, which a fork would lose, and do not read the Hub's address or cache.
ANYWHERE = (
    *("torch", "torch._dynamo", "optuna", "sqlalchemy.dialects.sqlite", "sqlalchemy.ext.declarative"),
    *(
        "optuna.storages._rdb.models",
        "alembic.command",
        "alembic.config",
        "alembic.migration",
        "boto3",
        "botocore.session",
        "httpx2",
        "pydantic_settings",
        "typer",
        "rich.console",
        "psutil",
    ),
    *("jinja2", "tokenizers", "safetensors.torch"),
)
# These do.
AT_ONE_HUB = (
    *("transformers.models.llama.modeling_llama", "transformers.models.qwen3.modeling_qwen3"),
    *("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto", "accelerate"),
)
# Our modules, for processes started by the dozen in tests that are not about imports.
OURS = (
    *(
        "job.cli.main",
        "job.lifecycle.supervisor",
        "job.lifecycle.search_limits",
        "job.pipeline",
        "job.preflight.runner",
    ),
    *("job.proof.truth_test", "job.stages.search", "job.stages.gradient", "job.stages.finalists", "job.stages.export"),
    *("job.stages.followups", "job.report.html", "job.mirror.folder_store", "job.transfer.s3"),
)
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "FTP_PROXY", "NO_PROXY")
# Prefixes of variables that are read on use, or by us.
LATE = (
    *("ABLITERATE_", "ABLITERATION_", "AWS_", "CONTAINER_", "JOB_", "PGPASSWORD", "PYTEST_", "RUNPOD_", "VAST_"),
    *PROXIES,
)
# Read late but cached: `forget_cached` resets them.
LATE_ONCE = ("TMPDIR", "TZ")
# Used only by tests of redaction; no library reads them.
SECRETS = ("DEPLOY_KEY", "DB_PASSWORD", "FOLDER_SECRET")

_servers: dict[str, Server] = {}
_at_other_hub: list[Server] = []
_starting = threading.Lock()
# What a forked process runs instead of the command.
_script: list[str] = []


class Server:
    """A server, controlled from the tests' process.

    Args:
        environment: Environment in which libraries are loaded.
        modules: Modules to load.
        base: The server that forks it; by default it is a new process.
    """

    def __init__(self, environment: Mapping[str, str], modules: Sequence[str], base: Server | None = None) -> None:
        self.line, other = socket.socketpair()
        # Only its children measure coverage.
        own = {**environment, "COVERAGE_PROCESS_START": "", "COVERAGE_PROCESS_CONFIG": ""}
        self.environment = dict(environment)
        self._process: subprocess.Popen[Any]
        # A pipe, so that the children inherit streams set up for pipes.
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
        """End the server; its forked processes continue."""
        atexit.unregister(self.close)
        self.line.close()
        self._process.communicate()


def read_early(environment: Mapping[str, str], usual: Mapping[str, str]) -> set[str]:
    """Return the variables that differ and that libraries read while they are loaded."""
    names = {name for name in environment.keys() | usual.keys() if environment.get(name) != usual.get(name)}
    late = {"HF_TOKEN", *LATE_ONCE, *SECRETS}
    return {name for name in names if not name.upper().startswith(LATE) and name not in late}


def forget_cached() -> None:
    """Forget the cached folder of temporary files and time zone."""
    tempfile.tempdir = None
    time.tzset()


def server_for(environment: Mapping[str, str], usual: Mapping[str, str], *, ours: bool = False) -> Server | None:
    """Return a server whose children start as a process in that environment would, None if impossible.

    Args:
        environment: Environment of the process.
        usual: Environment of the servers.
        ours: Preload our own modules, too.
    """
    early = read_early(environment, usual)
    if sys.platform != "linux" or not all(name.startswith("HF_") for name in early):
        return None
    with _starting:
        # Each forks from the one before, so that nothing is loaded twice.
        if early:
            return _at_hub(environment, _anywhere(usual))
        at_usual_hub = _server("usual", lambda: Server(usual, AT_ONE_HUB, _anywhere(usual)))
        return _server("ours", lambda: Server(usual, OURS, at_usual_hub)) if ours else at_usual_hub


def server_at(environment: Mapping[str, str], usual: Mapping[str, str], *modules: str) -> Server:
    """Return a new server, to be closed, in an environment with another Hub, with these modules loaded there."""
    with _starting:
        return Server(environment, modules, _anywhere(usual))


def _anywhere(usual: Mapping[str, str]) -> Server:
    return _server("anywhere", lambda: Server(usual, ANYWHERE))


def _server(name: str, made: Callable[[], Server]) -> Server:
    if name not in _servers:
        _servers[name] = made()
    return _servers[name]


def _at_hub(environment: Mapping[str, str], base: Server) -> Server:
    """Return the server for an environment's Hub; the previous Hub's ends."""
    if _at_other_hub and not read_early(environment, _at_other_hub[0].environment):
        return _at_other_hub[0]
    while _at_other_hub:
        _at_other_hub.pop().close()
    _at_other_hub.append(Server(environment, AT_ONE_HUB, base))
    return _at_other_hub[0]


class Warm(subprocess.Popen[str]):
    """A process forked by a server, with Popen's interface.

    It is no child of this process, so its start and its exit code are handled differently from Popen.
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
            told = b""  # closed: Popen still polls processes that a failed test left behind
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
    """Load the named modules, then fork for every command; return in the new process."""
    before = dict(os.environ)
    line = socket.socket(fileno=int(sys.argv[1]))
    for name in sys.argv[2:]:
        importlib.import_module(name)
    at_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end of the tests closes this server
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the keepers' exit codes are not needed
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
    """Run the command or a script and exit as the interpreter does, but without tearing down modules.

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
    """Fork the command's process and return in it; outside, report its id and then its exit status."""
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
        pass  # the process that started it is gone
    os._exit(0)


def _become(arguments: list[str], cwd: str, before: Mapping[str, str], environment: Mapping[str, str]) -> None:
    """Make this process equal to a cold one at the start of its code, whatever the server's environment was."""
    os.chdir(cwd)
    for name in before.keys() - environment.keys():
        del os.environ[name]
    # Equal variables stay: libraries have set a few themselves.
    os.environ.update({name: value for name, value in environment.items() if before.get(name) != value})
    forget_cached()
    sys.orig_argv[:] = [*COLD, *arguments]  # what a restart executes
    sys.argv[:] = ["-c", *arguments]
    sys.modules["numpy"].random.seed()  # Python's own generator reseeds itself; torch begins with a fixed seed
    if os.environ.get("COVERAGE_PROCESS_CONFIG") or os.environ.get("COVERAGE_PROCESS_START"):
        import coverage

        coverage.process_startup()
