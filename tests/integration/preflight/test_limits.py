"""Real limits by cgroups and rlimits around a child process, where permitted."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from job.preflight import limit_checks
from job.preflight.checks import GIB, MIB
from job.preflight.limits import (
    Cpus,
    Limits,
    Memory,
    cgroup_folders,
    effective_cpus,
    read_cpus,
    read_limits,
    read_memory,
    recommended_threads,
)
from tests.helpers import UNMEASURED

LOOK = """
import json
from job.preflight import limits
print(json.dumps({name: getattr(limits, "read_" + name)().model_dump() for name in ("memory", "cpus", "limits")}))
"""


def look(enter: Callable[[], None]) -> dict[str, Any]:
    """Return a child's readings after it has entered a limit."""
    done = subprocess.run([sys.executable, "-c", LOOK], preexec_fn=enter, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def cgroup() -> Iterator[Callable[[str, dict[str, str]], Path]]:
    """Return a function that makes a cgroup below our own, unless another process manages that one."""
    made: list[Path] = []

    def make(controller: str, limits: dict[str, str]) -> Path:
        folders = cgroup_folders(controller)
        if not folders or folders[0] not in (folders[-1], Path("/sys/fs/cgroup", controller)):
            # Its manager may move or remove what is made there.
            pytest.skip(f"the {controller} cgroup belongs to somebody else")
        folder = folders[0] / f"preflight-test-{os.getpid()}"
        try:
            folder.mkdir()
            made.append(folder)
            present = [name for name in limits if (folder / name).exists()]
            if not present:  # the parent has processes of its own, ours: cgroup v2 then passes no controller on
                pytest.skip(f"no {controller} controller can be handed on here")
            for name in present:
                (folder / name).write_text(limits[name])
        except OSError as error:  # not root, or mounted read-only as in most containers
            pytest.skip(f"cannot make a cgroup here: {error}")
        return folder

    yield make
    for folder in made:
        folder.rmdir()


def entering(folder: Path) -> Callable[[], None]:
    return lambda: (folder / "cgroup.procs").write_text(str(os.getpid())) and None


def test_a_healthy_machine_passes() -> None:
    memory, cpus, limits = read_memory(), read_cpus(), read_limits()
    assert 0 < memory.available <= memory.total
    checks = [
        limit_checks.ram(memory, 256 * MIB),
        limit_checks.shared_memory(memory),
        limit_checks.threads(cpus, {}),
        limit_checks.cpu_quota(cpus, {}),
        limit_checks.open_files(limits),
        limit_checks.file_size(limits, 5 * GIB),
        limit_checks.address_space(limits, 8 * GIB, cuda=True),
    ]
    assert [check for check in checks if check.status != "ok"] == []


def test_a_limit_on_processes_caps_the_thread_pools(cgroup: Callable[[str, dict[str, str]], Path]) -> None:
    folder = cgroup("pids", {"pids.max": "90"})
    cpus = Cpus.model_validate(look(entering(folder))["cpus"])
    assert cpus.threads_left is not None
    assert 80 <= cpus.threads_left <= 89
    many = cpus.model_copy(update={"visible": 384})
    check = limit_checks.threads(many, {})
    assert check.status == "warn"
    assert f"OMP_NUM_THREADS={recommended_threads(many)}" in check.remedy
    assert limit_checks.threads(many, {"OMP_NUM_THREADS": str(recommended_threads(many))}).status == "ok"


def test_no_room_for_threads_at_all(cgroup: Callable[[str, dict[str, str]], Path]) -> None:
    folder = cgroup("pids", {"pids.max": "20"})
    cpus = Cpus.model_validate(look(entering(folder))["cpus"])
    check = limit_checks.threads(cpus, {})
    assert check.status == "fail"
    assert "--pids-limit" in check.remedy


def test_a_quota_on_cpu_time(cgroup: Callable[[str, dict[str, str]], Path]) -> None:
    folder = cgroup("cpu", {"cpu.cfs_quota_us": "150000", "cpu.max": "150000 100000"})
    cpus = Cpus.model_validate(look(entering(folder))["cpus"])
    assert cpus.quota == pytest.approx(1.5)
    many = cpus.model_copy(update={"visible": 64})
    assert effective_cpus(many) == 2
    check = limit_checks.cpu_quota(many, {})
    assert check.status == "warn"
    assert "OMP_NUM_THREADS=2" in check.remedy
    assert limit_checks.cpu_quota(many, {"OMP_NUM_THREADS": "2,1"}).status == "ok"


def test_a_limit_on_memory(cgroup: Callable[[str, dict[str, str]], Path]) -> None:
    folder = cgroup("memory", {"memory.limit_in_bytes": str(256 * MIB), "memory.max": str(256 * MIB)})
    memory = Memory.model_validate(look(entering(folder))["memory"])
    assert memory.limit == memory.total == 256 * MIB
    assert memory.available < 256 * MIB
    check = limit_checks.ram(memory, GIB)
    assert check.status == "fail"
    assert "limited to 256.0 MiB by the container" in check.measured


def test_resource_limits_are_read_and_judged() -> None:
    def enter() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
        resource.setrlimit(resource.RLIMIT_FSIZE, (GIB, GIB))
        resource.setrlimit(resource.RLIMIT_AS, (2 * GIB, 2 * GIB))

    limits = Limits.model_validate(look(enter)["limits"])
    assert limits == Limits(open_files=200, file_size=GIB, address_space=2 * GIB)
    assert limit_checks.open_files(limits).status == "fail"
    assert limit_checks.open_files(limits.model_copy(update={"open_files": 512})).status == "warn"
    assert limit_checks.file_size(limits, 5 * GIB).status == "fail"
    assert limit_checks.file_size(limits, MIB).status == "ok"
    assert limit_checks.address_space(limits, GIB, cuda=False).status == "ok"
    assert limit_checks.address_space(limits, GIB, cuda=True).status == "fail"


def test_a_users_limit_on_processes() -> None:
    if os.geteuid():  # the limit is per user, so reaching it takes a user without other processes
        pytest.skip("only root can become another user")

    # The interpreter may lie where only root reaches it, so the child changes after its imports.
    enter = (
        "import os, resource, json\nfrom job.preflight import limits\n"
        "resource.setrlimit(resource.RLIMIT_NPROC, (100, 100))\nos.setuid(65534)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", enter + "print(limits.read_cpus().threads_left)"],
        capture_output=True,
        text=True,
        env={**os.environ, **UNMEASURED},
    )
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < 100


def test_too_little_memory_and_swap_to_make_up_for_it() -> None:
    memory = read_memory()
    needed = memory.total + memory.swap_free + GIB
    check = limit_checks.ram(memory, needed)
    assert check.status == "fail"
    assert "more RAM" in check.remedy
    swapping = memory.model_copy(update={"swap_free": needed})
    assert limit_checks.ram(swapping, needed).status == "warn"


def test_little_shared_memory() -> None:
    memory = read_memory()
    assert limit_checks.shared_memory(memory.model_copy(update={"shared": None})).status == "warn"
    check = limit_checks.shared_memory(memory, needed=1 << 60)
    assert check.status == "warn"
    assert "--shm-size" in check.remedy


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal:       131072000 kB\nMemAvailable:   120000000 kB\nSwapFree:              0 kB\n"


def test_a_container_with_version_2_of_cgroups(tmp_path: Path) -> None:
    """As seen by a container without a cgroup namespace: the mount shows only its own part of the tree."""
    root = write_tree(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/mountinfo": "30 25 0:26 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup rw\n",
            "proc/self/cgroup": "0::/docker/abc/inner\n",
            "sys/fs/cgroup/memory.max": str(64 * GIB),
            "sys/fs/cgroup/memory.high": "max",
            "sys/fs/cgroup/memory.current": str(20 * GIB),
            "sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {6 * GIB}\nactive_file {4 * GIB}\n",
            "sys/fs/cgroup/inner/memory.max": "max",
            "sys/fs/cgroup/inner/memory.high": str(32 * GIB),
            "sys/fs/cgroup/inner/memory.current": str(GIB),
            "sys/fs/cgroup/inner/cpu.max": "max 100000",
            "sys/fs/cgroup/cpu.max": "800000 100000",
            "sys/fs/cgroup/inner/pids.max": "max",
            "sys/fs/cgroup/pids.max": "1024",
            "sys/fs/cgroup/pids.current": "24",
        },
    )
    memory, cpus = read_memory(root), read_cpus(root)
    # The inner group is limited to 32 GiB and uses 1; the outer one leaves 64 − (20 − 10 of cache).
    assert (memory.limit, memory.available) == (32 * GIB, 31 * GIB)
    assert (cpus.quota, cpus.threads_left) == (8.0, 1000)
    # 384 visible cores, 1024 processes allowed.
    seen = cpus.model_copy(update={"visible": 384})
    assert recommended_threads(seen) == 8
    assert limit_checks.threads(seen, {}).status == "warn"


def test_a_container_with_version_1_of_cgroups(tmp_path: Path) -> None:
    root = write_tree(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/mountinfo": "30 25 0:26 / /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
            "31 25 0:27 / /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n",
            # The path as the host names it; the mount shows the container's own group as the top.
            "proc/self/cgroup": "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(16 * GIB),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(8 * GIB),
            "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GIB}\ntotal_active_file {GIB}\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
    )
    memory = read_memory(root)
    assert (memory.limit, memory.available) == (16 * GIB, 10 * GIB)
    assert read_cpus(root).quota is None
    (root / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_text("9223372036854771712")
    assert read_memory(root).limit is None


@pytest.mark.parametrize(
    ("cpus", "threads"),
    [
        (Cpus(visible=2), 2),
        (Cpus(visible=384), 32),
        (Cpus(visible=384, quota=0.5), 1),
        (Cpus(visible=384, threads_left=100), 9),
        (Cpus(visible=384, threads_left=10), 1),
    ],
)
def test_recommended_threads(cpus: Cpus, threads: int) -> None:
    assert recommended_threads(cpus) == threads
