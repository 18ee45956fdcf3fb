"""The image as a renter sees it: its contents, its user, stopping and resuming."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.image.images import ROOT, SECRET, Container, Image, Pin, inside, missing, pins, run, stop, write_pins

pytestmark = [
    pytest.mark.container,
    pytest.mark.full("image"),
    pytest.mark.slow,
    pytest.mark.xdist_group("container"),
    pytest.mark.timeout(1800),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

MEGABYTE = 10**6
OWNER = 4321  # a user unknown to the image
TRIALS = 16


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Image]:
    assert pytestconfig.cache is not None
    with Image(tmp_path_factory.mktemp("image")) as image:
        image.build(pytestconfig.cache.mkdir("container"))
        yield image


@pytest.fixture(scope="module")
def container(image: Image) -> Iterator[Container]:
    with image.container() as container:
        yield container


def volume(folder: Path, owner: int) -> Path:
    folder.mkdir()
    os.chown(folder, owner, owner)
    return folder


def hashes(workspace: Path) -> str:
    (export,) = workspace.glob("*/export")
    return (export / "SHA256SUMS").read_text()


@pytest.fixture(scope="module")
def demonstrated(container: Container, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace of an uninterrupted demo, run on a read-only root as its owner."""
    workspace = volume(tmp_path_factory.mktemp("demo") / "workspace", OWNER)
    process = container.start("demo", "--trials", TRIALS, volume=workspace, OMP_NUM_THREADS="1")
    while not list(workspace.glob("*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    first = inside(process)
    assert first.name() == "tini"
    everything = (first, *first.children(recursive=True))
    assert len(everything) >= 2
    for one in everything:
        status = Path(f"/proc/{one.pid}/status").read_text()
        assert re.search(rf"^Uid:\t{OWNER}\t{OWNER}\t{OWNER}\t{OWNER}$", status, re.MULTILINE), status
        assert re.search(r"^NoNewPrivs:\t1$", status, re.MULTILINE)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "refusals 100/100" in out + err
    return workspace


def test_what_it_says_of_itself(image: Image) -> None:
    config = image.config
    assert config["Entrypoint"] == ["/entrypoint.sh"]
    assert config["StopSignal"] in ("SIGTERM", "15")
    assert list(config["Volumes"]) == ["/workspace"]
    labels = {name.rpartition(".")[2]: value for name, value in config["Labels"].items() if "opencontainers" in name}
    assert (labels["version"], labels["revision"], labels["licenses"]) == ("1.2.3", "abc123", "Apache-2.0")
    env = dict(pair.split("=", 1) for pair in config["Env"])
    assert env["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert env["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert env["HF_HOME"].startswith("/workspace/")
    assert env["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def test_nothing_is_in_it_that_does_not_belong_there(image: Image, container: Container) -> None:
    root = container.root
    assert not any((root / "root").glob(".cache"))
    assert list((root / "var/lib/apt/lists").iterdir()) == []
    assert not (root / "src").exists()
    site = next((root / "opt/abliterate/lib").glob("python3*/site-packages"))
    assert [path for path in site.rglob("tests") if path.is_dir()] == []
    assert not (site / "torch" / "test").exists()
    assert sorted(path.name for path in (site / "job").glob("test*")) == []
    # The builder's secret is in no layer, no history and no label.
    assert SECRET not in json.dumps(image.inspected)
    for folder in ("etc", "opt/abliterate/bin", "root", "home", "tmp", "workspace"):
        for path in (root / folder).rglob("*"):
            if path.is_file() and not path.is_symlink():
                assert SECRET.encode() not in path.read_bytes(), path
    assert not [pair for pair in image.config["Env"] if re.search(r"TOKEN|KEY|SECRET|PASSWORD", pair)]
    # Only root may change the code, and all of it has bytecode: a start compiles nothing.
    for path in (*site.rglob("*.py"), *(root / "opt/abliterate/bin").iterdir(), root / "entrypoint.sh"):
        status = path.stat()
        assert (status.st_uid, status.st_mode & 0o022) == (0, 0), path
    for path in (site / "job").rglob("*.py"):
        assert list(path.parent.glob(f"__pycache__/{path.stem}.cpython-*.pyc")), path


def test_nothing_is_installed_but_what_the_lists_name(image: Image, container: Container) -> None:
    """In the listed versions; pip comes with the base, and our own code from the previous stage."""
    lists = image.context / "infra" / "image"
    named = {name: pin.version for part in ("torch", "packages") for name, pin in pins(lists / f"{part}.txt").items()}
    site = next((container.root / "opt/abliterate/lib").glob("python3*/site-packages"))
    found = {}
    for path in site.glob("*.dist-info"):
        name, _, version = path.name.removesuffix(".dist-info").partition("-")
        found[re.sub(r"[-_.]+", "-", name).lower()] = version.partition("+")[0]
    del found["pip"], found["abliteration-job"]
    assert found == named


def test_a_file_with_another_hash_is_not_installed(image: Image, tmp_path: Path) -> None:
    context = tmp_path / "context"
    run("cp", "-a", image.context, context)
    build = pins(context / "infra/image/build.txt")
    changed = Pin(build["pluggy"].version, ("0" * 64,))
    write_pins(context / "infra/image/build.txt", {**build, "pluggy": changed})
    with pytest.raises(AssertionError, match="DO NOT MATCH THE HASHES"):
        image.build_from(context, "--target", "wheel")


def test_a_change_of_the_code_costs_a_small_layer_and_the_whole_is_bounded(image: Image) -> None:
    system, torch, packages, code, entrypoint = image.layer_bytes
    print(
        f"built in {image.build_seconds:.0f} s; layers, MB: {[round(one / MEGABYTE, 1) for one in image.layer_bytes]}"
    )
    assert code < 8 * MEGABYTE
    assert entrypoint < MEGABYTE
    assert system < 30 * MEGABYTE
    assert packages < 1150 * MEGABYTE
    # Without CUDA here; docs/decisions/0006-image-base.md has the figure with it.
    assert torch < 1200 * MEGABYTE


def test_no_arguments_are_a_call_for_help(container: Container, tmp_path: Path) -> None:
    workspace = volume(tmp_path / "workspace", OWNER)
    silent = container.run(volume=workspace).check()
    assert "Usage: abliterate" in silent.out
    assert silent.out == container.run("abliterate", "--help", volume=workspace).check().out
    container.run("run", volume=workspace).fails(2, "MODEL")
    assert list(workspace.iterdir()) == []


def test_a_shell_finds_what_the_job_finds(container: Container, tmp_path: Path) -> None:
    show = 'id -u; echo "$HOME $HF_HOME $XDG_CACHE_HOME $OMP_NUM_THREADS $(umask)"; touch "$HOME/probe"'
    workspace = volume(tmp_path / "workspace", OWNER)
    told = container.run("bash", "-c", show, volume=workspace).check().out.split()
    assert told == [str(OWNER), "/tmp", "/workspace/.cache/huggingface", "/workspace/.cache", *told[4:]]
    assert 1 <= int(told[4]) <= 32
    assert told[5] == "0022"
    # A given limit is kept; 400 visible cores do not become 400 threads.
    capped = container.run("bash", "-c", "echo $OMP_NUM_THREADS", volume=workspace, OMP_NUM_THREADS="3")
    assert capped.out.strip() == "3"
    many = container.run("bash", "-c", "echo $OMP_NUM_THREADS", volume=workspace, ABLITERATION_THREADS="400")
    assert many.out.strip() == "32"


def test_root_where_the_workspace_is_roots_or_no_change_of_user_is_allowed(
    container: Container, tmp_path: Path
) -> None:
    rented = volume(tmp_path / "rented", 0)
    result = container.run("bash", "-c", "id -u", volume=rented).check()
    assert result.out.strip() == "0"
    assert result.err.count("running as root") == 1
    assert "/workspace belongs to root" in result.err
    bound = ("setpriv", "--bounding-set=-setuid,-setgid", "--inh-caps=-setuid,-setgid", "/entrypoint.sh")
    mine = volume(tmp_path / "mine", OWNER)
    result = container.run("bash", "-c", "id -u", volume=mine, entrypoint=bound).check()
    assert result.out.strip() == "0"
    assert result.err.count("running as root") == 1
    assert "no change of user is allowed" in result.err
    # If already started as another user (`--user`, a pod's runAsUser), it stays so.
    result = container.run("bash", "-c", "id -un", volume=mine, user=1000).check()
    assert (result.out.strip(), result.err) == ("abliterate", "")


def test_the_demo_passes_as_the_owner_of_the_workspace_and_leaves_all_to_them(demonstrated: Path) -> None:
    (export,) = demonstrated.glob("*/export")
    assert (export / "model.safetensors").exists()
    for path in (demonstrated, *demonstrated.rglob("*")):
        assert path.lstat().st_uid == OWNER, path


def test_sigterm_in_the_search_is_75_within_ten_seconds_and_the_next_start_ends_with_the_same_bytes(
    demonstrated: Path, image: Image, tmp_path: Path
) -> None:
    workspace = volume(tmp_path / "workspace", OWNER)
    run("cp", "-a", demonstrated / "organism", workspace)  # the same model; training it again tests nothing new
    with image.container() as container:
        process = container.start("demo", "--trials", TRIALS, volume=workspace, writable=True, OMP_NUM_THREADS="1")
        while not any('"event": "trial"' in path.read_text() for path in workspace.glob("*/events.jsonl")):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        seconds = stop(process)
        assert process.returncode == 75
        assert seconds < 10
        assert "stopped by SIGTERM" in process.communicate()[1]
        assert not list(workspace.glob("*/export"))
        # The platform starts the same container folder again.
        container.run(
            "demo", "--trials", TRIALS, volume=workspace, seconds=600, writable=True, OMP_NUM_THREADS="1"
        ).check()
        assert hashes(workspace) == hashes(demonstrated)
        # And again, as in a restart loop: nothing happens.
        before = {path: path.stat().st_mtime_ns for path in workspace.glob("*/export/*")}
        began = time.monotonic()
        container.run("demo", "--trials", TRIALS, volume=workspace, writable=True, OMP_NUM_THREADS="1").check()
        assert time.monotonic() - began < 30  # the demo queries the model again, which loads torch
        assert before == {path: path.stat().st_mtime_ns for path in workspace.glob("*/export/*")}


def test_a_platform_that_replaces_the_entrypoint_starts_the_job_by_the_script(
    container: Container, tmp_path: Path
) -> None:
    workspace = volume(tmp_path / "workspace", 0)
    (workspace / "onstart.sh").write_bytes((ROOT / "infra/vast/onstart.sh").read_bytes())
    waits = "bash /workspace/onstart.sh; exec 8>>/workspace/.onstart.lock; flock 8"
    command = "config show --set seed=77"
    result = container.run(
        "-c", waits, volume=workspace, entrypoint=("/bin/bash",), PATH="/usr/bin:/bin", ABLITERATION_COMMAND=command
    ).check()
    assert "onstart: started" in result.err
    log = (workspace / "abliterate.log").read_text()
    assert re.search(r"^seed = 77", log, re.MULTILINE), log
