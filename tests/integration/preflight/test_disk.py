"""Disk checks on real file systems: small ones are mounted where permitted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from job.preflight import disk
from job.preflight.checks import GIB, KIB, MIB, Check, exit_code, size
from job.preflight.disk import DiskNeed, DiskSpeed
from job.preflight.mounts import Mount, kind_of, mount_of, parse_mountinfo, read_mounts
from tests.helpers import UNMEASURED

Mounter = Callable[..., Path]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Mounter]:
    """Return a function that mounts a separate file system for the test."""
    points: list[Path] = []

    def mount(*arguments: str) -> Path:
        point = tmp_path / f"mount-{len(points)}"
        point.mkdir()
        done = subprocess.run(["mount", *arguments, str(point)], capture_output=True, text=True)
        if done.returncode:  # needs root, that capability and kernel support
            pytest.skip(f"cannot mount here: {done.stderr.strip()}")
        points.append(point)
        return point

    yield mount
    for point in reversed(points):
        subprocess.run(["umount", "-l", str(point)], check=True)


def only(checks: list[Check], name: str) -> Check:
    (check,) = [check for check in checks if check.name == name]
    return check


def test_healthy_disk_passes_and_nothing_is_left(tmp_path: Path) -> None:
    needs = [
        DiskNeed(path=tmp_path / "runs" / "a", bytes=MIB, what="run folder", database=True, keep=True),
        DiskNeed(path=tmp_path / "cache", bytes=MIB, what="model files"),
    ]
    checks = disk.disk_checks(needs)
    assert {check.name for check in checks} == {
        "disk.writable",
        "disk.space",
        "disk.inodes",
        "disk.storage",
        "disk.locks",
        "disk.speed",
    }
    kind = kind_of(mount_of(tmp_path, read_mounts()))
    # In a container the warning that its disk does not last is right.
    bad = [check for check in checks if check.status != "ok" and not (check.name == "disk.storage" and kind != "local")]
    # The disk's speed depends on its other users.
    assert [check for check in bad if check.name != "disk.speed"] == []
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_names_what_it_is_for(mounted: Mounter) -> None:
    point = mounted("-t", "tmpfs", "-o", "size=300m", "none")
    fine = [DiskNeed(path=point / "runs", bytes=MIB, what="export")]
    assert only(disk.disk_checks(fine), "disk.space").status == "ok"
    checks = disk.disk_checks([*fine, DiskNeed(path=point / "cache", bytes=60 * MIB, what="model files")])
    check = only(checks, "disk.space")
    assert check.status == "fail"
    assert "model files 60.0 MiB" in check.needed
    assert str(point) in check.measured
    assert exit_code(checks) == 76
    assert exit_code(checks, ["disk.space"]) == 0


def test_a_full_disk_cannot_be_written(mounted: Mounter) -> None:
    point = mounted("-t", "tmpfs", "-o", "size=1m", "none")
    with (point / "fill").open("wb", buffering=0) as file:
        assert file.write(b"x" * 2 * MIB) < 2 * MIB
    check = disk.writability(point)
    assert check.status == "fail"
    assert "No space left" in check.measured
    assert [path.name for path in point.iterdir()] == ["fill"]
    mount = mount_of(point, read_mounts())
    assert disk.throughput(point, mount).status == "fail"


def test_a_disk_out_of_inodes(mounted: Mounter) -> None:
    point = mounted("-t", "tmpfs", "-o", "size=400m,nr_inodes=50", "none")
    check = only(disk.disk_checks([DiskNeed(path=point, bytes=1, what="x")]), "disk.inodes")
    assert check.status == "fail"
    assert "inodes free" in check.measured


def test_a_read_only_disk(mounted: Mounter) -> None:
    point = mounted("-t", "tmpfs", "-o", "ro", "none")
    check = disk.writability(point / "below")
    assert check.status == "fail"
    assert "Read-only" in check.measured


def test_memory_is_no_disk(mounted: Mounter) -> None:
    point = mounted("-t", "tmpfs", "-o", "size=1g", "none")
    checks = disk.disk_checks([DiskNeed(path=point, bytes=1, what="x")])
    assert only(checks, "disk.storage").status == "warn"
    assert not [check for check in checks if check.name == "disk.speed"]


def test_two_mounts_of_one_file_system_share_its_room(mounted: Mounter, tmp_path: Path) -> None:
    first = mounted("-t", "tmpfs", "-o", "size=300m", "none")
    second = mounted("--bind", str(first))
    needs = [DiskNeed(path=first, bytes=30 * MIB, what="cache"), DiskNeed(path=second, bytes=30 * MIB, what="export")]
    ((mount, grouped),) = disk.by_mount(needs)
    assert grouped == needs
    assert disk.space(mount, grouped).status == "fail"
    assert disk.space(mount, grouped[:1]).status == "ok"


def test_an_overlay_is_the_containers_own_disk(mounted: Mounter) -> None:
    base = mounted("-t", "tmpfs", "-o", "size=300m", "none")
    for name in ("lower", "upper", "work"):
        (base / name).mkdir()
    options = f"lowerdir={base / 'lower'},upperdir={base / 'upper'},workdir={base / 'work'}"
    point = mounted("-t", "overlay", "-o", options, "overlay")
    mount = mount_of(point, read_mounts())
    assert mount.kind == "overlay"
    kept = DiskNeed(path=point, bytes=1, what="run folder", keep=True)
    assert disk.storage(mount, [kept]).status == "warn"
    assert "run folder would be lost" in disk.storage(mount, [kept]).remedy
    assert disk.storage(mount, [kept.model_copy(update={"keep": False})]).status == "ok"


def test_a_file_system_of_its_own_on_a_loop_device(mounted: Mounter, tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(32 * MIB)
    if subprocess.run(["mkfs.ext4", "-q", "-N", "64", str(image)], capture_output=True).returncode:
        pytest.skip("cannot make a file system here")  # without e2fsprogs no disk can run out of inodes
    point = mounted("-o", "loop", str(image))
    checks = disk.disk_checks([DiskNeed(path=point / "runs", bytes=MIB, what="runs")])
    assert only(checks, "disk.space").status == "fail"
    assert only(checks, "disk.inodes").status == "fail"
    assert "(ext4)" in only(checks, "disk.space").measured


@pytest.mark.parametrize(
    ("kind", "source", "expected", "locks"),
    [
        ("nfs4", "server:/export", "network", "warn"),
        ("cifs", "//server/share", "network", "warn"),
        ("9p", "host", "network", "warn"),
        ("lustre", "mgs@tcp:/fs", "network", "warn"),
        ("fuse.mfs", "mfs#eu:9421", "network", "warn"),
        ("fuse.s3fs", "s3fs", "object-store", "fail"),
        ("fuse.rclone", "remote:bucket", "object-store", "fail"),
        ("fuse", "gcsfuse", "object-store", "fail"),
        ("fuseblk", "/dev/sdb1", "local", "ok"),
        ("ext4", "/dev/sda1", "local", "ok"),
    ],
)
def test_storage_over_a_network_is_recognised(
    tmp_path: Path, kind: str, source: str, expected: str, locks: str
) -> None:
    """Only the file system's type is faked, as no such server is here; the locks are real."""
    mount = Mount(point=str(tmp_path), kind=kind, source=source, device="0:99")
    assert kind_of(mount) == expected
    assert disk.locking(tmp_path / "study.db", mount).status == locks


def test_a_slow_disk_is_a_warning(tmp_path: Path) -> None:
    mount = mount_of(tmp_path, read_mounts())
    assert disk.throughput(tmp_path, mount, DiskSpeed(write=1, read=1)).status == "ok"
    slow = disk.throughput(tmp_path, mount, DiskSpeed(write=1e15, read=1))
    assert slow.status == "warn"
    assert "MB/s" in slow.measured


def test_the_speed_probe_is_bounded_and_leaves_nothing(tmp_path: Path) -> None:
    started = time.monotonic()
    found = disk.measure_speed(tmp_path, most=8 * MIB, seconds=0.5)
    assert time.monotonic() - started < 5
    assert found.write > 0
    assert found.read > 0
    assert list(tmp_path.iterdir()) == []


def test_a_killed_speed_probe_leaves_nothing(tmp_path: Path) -> None:
    code = f"from job.preflight.disk import measure_speed; from pathlib import Path; print(flush=True)\n\
while True: measure_speed(Path({str(tmp_path)!r}), most=4 << 20)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_permission(tmp_path: Path) -> None:
    """Root may write anywhere, so a child without root privileges checks."""
    (tmp_path / "closed").mkdir(mode=0)
    tmp_path.chmod(0o500)
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom job.preflight.disk import DiskNeed, disk_checks\n"
        "os.chdir(sys.argv[1])\nif not os.geteuid(): os.setuid(65534)\n"
        "for path in ('.', 'closed/below'):\n"
        "    for check in disk_checks([DiskNeed(path=Path(path), bytes=1, what='x')]):\n"
        "        if check.status == 'fail': print(check.name, check.measured)"
    )
    # Coverage could not write its data as that user.
    unmeasured = {**os.environ, **UNMEASURED}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=unmeasured)
    tmp_path.chmod(0o700)
    (tmp_path / "closed").chmod(0o700)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["disk.writable", "disk.writable"]
    assert all("Permission denied" in line for line in lines)


def test_mountinfo_of_odd_names_and_torn_lines() -> None:
    text = (
        "36 35 98:0 /mnt1 /mnt/with\\040blank rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n"
        "37 35 0:40 / /mnt/b rw - fuse.sshfs user@host: rw\n"
        "torn line\n"
    )
    first, second = parse_mountinfo(text)
    assert (first.point, first.kind, first.device, first.root) == ("/mnt/with blank", "ext3", "98:0", "/mnt1")
    assert "errors=continue" in first.options
    assert kind_of(second) == "network"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1000, "1000 B"), (KIB, "1.0 KiB"), (1023.9 * MIB, "1.0 GiB"), (61 * GIB, "61.0 GiB")],
)
def test_sizes_for_people(count: float, text: str) -> None:
    assert size(count) == text
