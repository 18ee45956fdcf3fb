"""The image's inputs are pinned: its base by digest, all pip packages by hashes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.system.image.images import Pin, pins

ROOT = Path(__file__).parents[2]
LISTS = ("build", "torch", "packages")
DOCKERFILE = (ROOT / "Dockerfile").read_text()
RENEW = ROOT / "infra/image/renew.sh"
# As seen by the image's Python, whichever Python runs the tests.
IMAGE = {"python_version": "3.11", "sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
INDEX = '{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []}'
ONE_PLATFORM = '{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json"}\n'


def listed(name: str) -> dict[str, Pin]:
    return pins(ROOT / "infra/image" / f"{name}.txt")


def installed() -> dict[str, Pin]:
    """Return the packages of the final image."""
    return {**listed("torch"), **listed("packages")}


def project() -> list[Requirement]:
    """Return the image's requirements: the project's, and those of the extras that renew.sh names."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"--extra (\S+)", RENEW.read_text())
    assert extras == ["bnb", "ray", "kuberay"]
    lines = [*table["dependencies"], *(line for extra in extras for line in table["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found is not None  # a development dependency
    return found


@pytest.mark.parametrize("name", LISTS)
def test_every_package_has_hashes_and_the_version_of_the_constraints(name: str) -> None:
    constraints = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    packages = listed(name)
    assert packages
    for package, pin in packages.items():
        assert pin.hashes, package
        assert pin.version == constraints[package], package


@pytest.mark.parametrize("name", LISTS)
def test_the_lists_name_no_address(name: str) -> None:
    text = (ROOT / "infra/image" / f"{name}.txt").read_text()
    assert "://" not in text
    assert not re.search(r"^\s*-(?!-hash=)", text, re.MULTILINE)


def test_no_package_is_listed_for_two_steps() -> None:
    assert not set(listed("torch")) & set(listed("packages"))


def test_everything_that_the_project_asks_for_is_listed() -> None:
    packages = installed()
    for asked in project():
        assert packages[canonicalize_name(asked.name)].version in asked.specifier, asked
    assert "hatchling" in listed("build")
    # torch from the index depends on CUDA's libraries, unlike its CPU build.
    assert {"triton", "nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-nccl-cu13", "cuda-toolkit"} <= set(listed("torch"))


def test_everything_that_the_listed_packages_ask_for_is_listed_too() -> None:
    """By the metadata of packages installed here in the same version."""
    packages = installed()
    extras = {name: {""} for name in packages}
    for asked in project():
        extras[canonicalize_name(asked.name)] |= asked.extras
    checked = 0
    for name, pin in packages.items():
        try:
            here = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # another platform's: CUDA
        if here.version.partition("+")[0] != pin.version:
            continue
        checked += 1
        for line in here.requires or ():
            asked = Requirement(line)
            if any(asked.marker is None or asked.marker.evaluate({**IMAGE, "extra": one}) for one in extras[name]):
                assert packages[canonicalize_name(asked.name)].version in asked.specifier, f"{name} needs {line}"
    assert checked > len(packages) / 2


def test_every_stage_is_from_the_base_with_a_digest() -> None:
    (base,) = re.findall(r"^ARG BASE_IMAGE=(.*)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"python:3\.11-slim-bookworm@sha256:[0-9a-f]{64}", base)
    stages = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert stages == ["${BASE_IMAGE}"] * 2
    assert not re.search(r"^COPY --from=(?!wheel\b)", DOCKERFILE, re.MULTILINE)


def test_pip_gets_nothing_without_a_hash() -> None:
    joined = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    commands = re.findall(r"\bpip3? (?:install|wheel|download)\b[^&|;\n]*", joined)
    assert len(commands) == 5
    for command in commands:
        by_hash = {"--require-hashes", "--only-binary", ":all:", "-r"} <= set(command.split())
        from_here = {"--no-index", "--no-deps"} <= set(command.split())
        assert by_hash != from_here, command
    # And pip runs in no other way.
    assert len(re.findall(r"\bpip3?\b(?! check)", joined)) == len(commands)
    assert not re.search(r"\b(curl|wget|git|uv|conda)\b|^ADD\b", joined, re.MULTILINE)


def test_the_dockerfile_is_clean() -> None:
    subprocess.run([tool("hadolint"), ROOT / "Dockerfile"], check=True)


def test_the_renewal_is_clean_and_one_command() -> None:
    subprocess.run([tool("shellcheck"), RENEW], check=True)
    assert re.search(r"^renew-image:.*\n\tinfra/image/renew\.sh$", (ROOT / "Makefile").read_text(), re.MULTILINE)


def checkout(folder: Path) -> Path:
    """Return a copy of the renewal's inputs and outputs."""
    (folder / "infra/image").mkdir(parents=True)
    for name in ("Dockerfile", "constraints.txt", "pyproject.toml", "infra/image/renew.sh"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def renew_base(folder: Path, **commands: str) -> subprocess.CompletedProcess[str]:
    """Renew the base image with stand-ins for the commands that query a registry."""
    tools = folder / "bin"
    tools.mkdir()
    for name in ("sh", "sed", "grep", "cut", "cp", "rm", "cat", "mktemp", "dirname", "sha256sum"):
        (tools / name).symlink_to(str(shutil.which(name)))
    for name, script in commands.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    command = [folder / "infra/image/renew.sh", "base"]
    return subprocess.run(command, env={"PATH": str(tools)}, capture_output=True, text=True, timeout=60)


TAG = "python:3.11-slim-bookworm"
ASKS = {
    "docker": f'[ "$*" = "buildx version" ] || [ "$*" = "buildx imagetools inspect --raw {TAG}" ] || exit 9',
    "crane": f'[ "$*" = "manifest {TAG}" ] || exit 9',
    "skopeo": f'[ "$*" = "inspect --raw docker://{TAG}" ] || exit 9',
}


@pytest.mark.parametrize("name", ASKS)
def test_the_digest_is_that_of_the_index_whichever_tool_reads_it(tmp_path: Path, name: str) -> None:
    folder = checkout(tmp_path / "checkout")
    done = renew_base(folder, **{name: f"{ASKS[name]}\nprintf '%s' '{INDEX}'"})
    assert done.returncode == 0, done.stderr
    before, after = DOCKERFILE.splitlines(), (folder / "Dockerfile").read_text().splitlines()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    digest = hashlib.sha256(INDEX.encode()).hexdigest()
    assert [new for _, new in changed] == [f"ARG BASE_IMAGE={TAG}@sha256:{digest}"]


def test_the_allocator_takes_the_setting_of_the_image() -> None:
    (value,) = re.findall(r"PYTORCH_ALLOC_CONF=(\S+)", DOCKERFILE)
    take = "import sys, torch; torch._C._accelerator_setAllocatorSettings(sys.argv[1])"
    assert value == "expandable_segments:True"
    assert subprocess.run([sys.executable, "-c", take, value], capture_output=True).returncode == 0
    assert subprocess.run([sys.executable, "-c", take, f"{value}ly"], capture_output=True).returncode != 0


@pytest.mark.parametrize(
    ("commands", "said"),
    [
        ({}, "needs docker buildx, crane or skopeo"),
        ({"docker": "exit 1", "skopeo": "echo no such host >&2; exit 1"}, "cannot read"),
        ({"crane": f"printf '%s' '{ONE_PLATFORM}'"}, "one platform only"),
    ],
    ids=["no tool", "no network", "one platform"],
)
def test_a_digest_that_cannot_be_had_changes_nothing(tmp_path: Path, commands: dict[str, str], said: str) -> None:
    folder = checkout(tmp_path / "checkout")
    done = renew_base(folder, **commands)
    assert done.returncode == 1
    assert said in done.stderr
    assert (folder / "Dockerfile").read_text() == DOCKERFILE
