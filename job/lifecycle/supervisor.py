"""Parent process that ends the rental if the job's process cannot: it was killed, or its settings were refused.

It runs only if `--when-failed` asks for an end. It imports nothing of the job until then, so it stays small and is no
target of the out-of-memory killer. It forwards signals, and ends like its child.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from job.system.lifeline import LINE, adopt

# The commands that end rentals.
COMMANDS = ("run", "resume")
_STOPS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})
_PASSED_ON = _STOPS | {signal.SIGUSR1, signal.SIGUSR2}
_BLOCK = 1 << 16


def supervised() -> None:
    """Return in the working process; never in its supervisor."""
    if adopt() or asked_when_failed(sys.argv[1:], os.environ) == "nothing" or not hasattr(signal, "sigwait"):
        return
    _exit_like_child(*_supervise())


def asked_when_failed(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """Return the action of `--when-failed`, whatever is wrong elsewhere; a misspelt value counts as stop."""
    if command_of(arguments) not in COMMANDS:
        return "nothing"
    value = given("when_failed", arguments, environment) or "nothing"
    return value if value in ("nothing", "stop", "destroy") else "stop"


def command_of(arguments: Sequence[str]) -> str:
    """Return the called command, "" for none."""
    words = arguments[1:] if list(arguments[:1]) == ["abliterate"] else arguments
    return words[0] if words else ""


def given(name: str, arguments: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """Return a text setting without parsing anything else; None if it is not given."""
    option = f"--{name.replace('_', '-')}"
    found = _options(option, arguments)
    # As for all settings: the file, the environment, then options, then --set.
    assigned = [_assigned(name, text) for text in _options("--set", arguments)]
    for value in (*reversed(assigned), *reversed(found)):
        if value is not None:
            return value
    for variable, value in environment.items():
        if variable.upper() == f"ABLITERATE_{name.upper()}" and value:
            return _unquoted(value)
    for path in reversed(_options("--config", arguments)):
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                lines = file.read()
        except OSError:
            return None
        match = re.search(rf"^\s*{name}\s*=\s*[\"']([^\"'\n]*)[\"']", lines, re.MULTILINE)
        return match[1] if match else None
    return None


def _options(option: str, arguments: Sequence[str]) -> list[str]:
    found = []
    for position, word in enumerate(arguments):
        if word == "--":
            break
        if word == option and position + 1 < len(arguments):
            found.append(arguments[position + 1])
        elif word.startswith(f"{option}="):
            found.append(word.partition("=")[2])
    return found


def _assigned(name: str, text: str) -> str | None:
    key, separator, value = text.partition("=")
    return _unquoted(value) if separator and key.strip() == name else None


def _unquoted(text: str) -> str:
    return text.strip().strip("\"'")


def _supervise() -> tuple[int, bool, list[bytes]]:
    """Run the command in a child; return wait status, whether it was asked to stop, and its messages."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignoring it would hide how a child ended
    waited = _PASSED_ON | {signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    os.set_blocking(reading, False)
    child = os.posix_spawn(
        sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, LINE: str(writing)}, setsigmask=before
    )
    os.close(writing)
    told: list[bytes] = []
    signalled = False
    while (status := _reaped(child)) is None:
        number = signal.sigwait(waited)
        if number == signal.SIGCHLD:
            continue
        signalled = signalled or number in _STOPS
        try:
            os.kill(child, number)
        except ProcessLookupError:
            continue
    _read_messages(reading, told)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return status, signalled, told


def _reaped(child: int) -> int | None:
    """Return the ended child's wait status; other processes are reaped too, as PID 1 of a container must."""
    while True:
        try:
            number, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return None
        if number == 0:
            return None
        if number == child and not os.WIFSTOPPED(status):
            return status


def _read_messages(reading: int, told: list[bytes]) -> None:
    while True:
        try:
            data = os.read(reading, _BLOCK)
        except BlockingIOError:
            return
        if not data:
            return
        told.append(data)


def _exit_like_child(status: int, signalled: bool, told: list[bytes]) -> NoReturn:
    """End the rental if needed, then this process like its child."""
    code = os.waitstatus_to_exitcode(status)
    try:
        _settle_rental(code, signalled, b"".join(told))
    except Exception as error:  # callers must see how the child ended
        _say(f"warning: this rental may BILL ON: it could not be ended: {type(error).__name__}")
    if code < 0:
        _kill_self_with(-code)
    os._exit(code if code >= 0 else 128 - code)


def _settle_rental(code: int, signalled: bool, told: bytes) -> None:
    import json

    facts: dict[str, str | bool] = {}
    for line in told.splitlines():
        facts |= json.loads(line)
    if facts.get("settled") or code == 0:
        return
    from job.lifecycle.end_of_rental import end_after

    asked = facts.get("when_failed") or asked_when_failed(sys.argv[1:], os.environ)
    workspace = facts.get("workspace") or given("workspace", sys.argv[1:], os.environ)
    end_after(
        code,
        when_failed=str(asked),
        workspace=str(workspace) if workspace else None,
        job=str(facts["job"]) if "job" in facts else None,
        hung=bool(facts.get("hung")),
        signalled=signalled,
    )


def _kill_self_with(number: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _say(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        return  # stderr is closed
