"""The user that the container's entrypoint runs as, on this machine's own files and users."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.helpers import Result

ENTRYPOINT = Path(__file__).parents[2] / "entrypoint.sh"
OWNER = 4321  # a user unknown to this machine
# Replaces the program: prints its user, PID 1 and its arguments.
PROGRAM = '#!/bin/sh\necho "$(id -u):$(id -g):$(id -G) $(cat /proc/1/comm):$(stat -c %u /proc/1) $*"\n'
FORBIDDEN = ("setpriv", "--bounding-set=-setuid,-setgid", "--inh-caps=-setuid,-setgid")
APART = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="containers run Linux"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as a container's entrypoint mostly is"),
    pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv"),
]


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder readable by any user, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    shutil.copy(ENTRYPOINT, folder)
    (folder / "bin").mkdir()
    (folder / "bin" / "abliterate").write_text(PROGRAM)
    (folder / "bin" / "abliterate").chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def make(path: Path, owner: int) -> Path:
    path.mkdir()
    os.chown(path, owner, owner)
    return path


def start(place: Path, workspace: Path, *arguments: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start the entrypoint, optionally through another command."""
    env = {**os.environ, "ABLITERATE_WORKSPACE": str(workspace), "PATH": f"{place / 'bin'}:{os.environ['PATH']}"}
    command = [*before, str(place / "entrypoint.sh"), *arguments]
    return subprocess.Popen(
        command, env=env, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )


def enter(place: Path, workspace: Path, *arguments: str, before: tuple[str, ...] = ()) -> Result:
    with start(place, workspace, *arguments, before=before) as process:
        try:
            out, err = process.communicate(timeout=60)
        finally:
            end(process)
    return Result(process.returncode, out, err)


def end(process: subprocess.Popen[str]) -> None:
    """Kill the remaining processes, PID 1 first: --kill-child does not survive a change of user."""
    if process.poll() is None:
        for one in psutil.Process(process.pid).children(recursive=True):
            one.kill()
        process.kill()


def user(result: Result) -> str:
    return result.check().out.split()[0].partition(":")[0]


EVERYTHING = [(), ("run", "MODEL"), ("abliterate", "run"), ("bash", "-c", "id -u"), ("sh", "-c", "id -u")]


@pytest.mark.parametrize("arguments", EVERYTHING, ids=" ".join)
def test_everything_runs_as_the_owner_in_silence(place: Path, arguments: tuple[str, ...]) -> None:
    result = enter(place, make(place / "workspace", OWNER), *arguments)
    assert (user(result), result.err) == (str(OWNER), "")


@pytest.mark.parametrize("arguments", EVERYTHING, ids=" ".join)
def test_root_is_said_in_one_line_where_the_workspace_is_roots(place: Path, arguments: tuple[str, ...]) -> None:
    workspace = make(place / "workspace", 0)
    result = enter(place, workspace, *arguments)
    assert user(result) == "0"
    (line,) = result.err.splitlines()
    assert f"running as root: {workspace} belongs to root" in line
    assert "chown" in line


@pytest.mark.parametrize("arguments", EVERYTHING, ids=" ".join)
def test_root_is_said_in_one_line_where_no_change_of_user_is_allowed(place: Path, arguments: tuple[str, ...]) -> None:
    result = enter(place, make(place / "workspace", OWNER), *arguments, before=FORBIDDEN)
    assert user(result) == "0"
    (line,) = result.err.splitlines()
    assert "running as root: no change of user is allowed here (setpriv: " in line


def test_the_owners_groups_are_all_that_it_has(place: Path) -> None:
    assert f"{OWNER}:{OWNER}:{OWNER} " in enter(place, make(place / "workspace", OWNER)).check().out


def test_another_user_stays_whoever_owns_the_workspace(place: Path) -> None:
    before = ("setpriv", "--reuid=1234", "--regid=1234", "--clear-groups")
    for name, owner in (("mine", 1234), ("theirs", OWNER), ("roots", 0)):
        result = enter(place, make(place / name, owner), before=before)
        assert (user(result), result.err) == ("1234", "")


def test_a_workspace_behind_a_link_is_its_owners_not_the_links(place: Path) -> None:
    make(place / "workspace", OWNER)
    (place / "link").symlink_to(place / "workspace")
    result = enter(place, place / "link")
    assert (user(result), result.err) == (str(OWNER), "")


@pytest.mark.parametrize("missing", ["jobs", "jobs/of/mine"])
def test_a_workspace_that_is_still_to_be_made_belongs_to_the_owner_of_its_folder(place: Path, missing: str) -> None:
    folder = make(place / "data", OWNER)
    result = enter(place, folder / missing)
    assert (user(result), result.err) == (str(OWNER), "")
    roots = make(place / "roots", 0)
    assert f"{roots} belongs to root" in enter(place, roots / missing).check().err
    # A name without a folder is one of the working directory's.
    assert ". belongs to root" in enter(place, Path(missing)).check().err


def needs_processes_of_its_own() -> None:
    if shutil.which("tini") is None:  # a program of the image; .ci/run installs it where possible
        pytest.skip("needs tini (apt-get install tini)")
    if subprocess.run([*APART, "true"], capture_output=True).returncode:
        pytest.skip("needs namespaces of its own")


@pytest.mark.parametrize("owner", [OWNER, 0])
def test_the_first_process_is_tini_as_the_same_user(place: Path, owner: int) -> None:
    needs_processes_of_its_own()
    result = enter(place, make(place / "workspace", owner), "run", "a b", before=APART).check()
    assert result.out == f"{owner}:{owner}:{owner} tini:{owner} run a b\n"
    assert result.err.count("running as root") == (owner == 0)


@pytest.mark.parametrize("owner", [OWNER, 0])
def test_a_stop_reaches_the_program_and_its_exit_code_comes_back(place: Path, owner: int) -> None:
    needs_processes_of_its_own()
    script = "trap 'exit 75' TERM; echo started; while :; do sleep 0.05; done"
    with start(place, make(place / "workspace", owner), "sh", "-c", script, before=APART) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            (first,) = psutil.Process(process.pid).children()
            assert (first.name(), first.uids().real) == ("tini", owner)
            first.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
        finally:
            end(process)
    assert process.returncode == 75
