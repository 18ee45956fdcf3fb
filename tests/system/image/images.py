"""Build the real Dockerfile on a minimal Debian, and run the image with its own PID 1."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil
from filelock import FileLock

from tests.helpers import Result

ROOT = Path(__file__).parents[3]
TOOLS = ("buildah", "debootstrap", "unshare", "chroot")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
TAG = "localhost/abliteration-job"
# In the build's environment; it must not appear in the image.
SECRET = "hf_LiesInTheEnvironmentOfTheBuild01"
# As in a container engine: separate mounts and processes, the root read-only on request, the volume mounted.
STAGE = """
set -e
mount --make-rprivate /
mount --bind "$ROOT" "$ROOT"
mount --bind "$VOLUME" "$ROOT/workspace"
mount --rbind /dev "$ROOT/dev"
mount -t proc proc "$ROOT/proc"
mount -t tmpfs -o mode=1777 tmpfs "$ROOT/tmp"
[ "$WRITABLE" = yes ] || mount -o remount,bind,ro "$ROOT"
exec "$@"
"""


def missing() -> str | None:
    """Return why no image can be built here, None if one can."""
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return f"needs {', '.join(absent)} (apt-get install buildah debootstrap)"
    if os.geteuid() != 0:
        return "needs root"
    allowed = subprocess.run(["unshare", "--pid", "--fork", "--mount", "true"], capture_output=True)
    return "needs namespaces of its own" if allowed.returncode else None


def run(*command: Any, seconds: float = 600, **env: str) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, **env}, timeout=seconds
    )
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def pip_settings() -> tuple[str, list[str]]:
    """Return this machine's pip settings as a file for the build, and the folders that they name."""
    listed = run(sys.executable, "-m", "pip", "config", "list")
    found = dict(re.findall(r"^(?:global|:env:)\.([a-z-]+)='(.*)'$", listed, re.MULTILINE))
    kept = {key: value for key, value in found.items() if key in ("index-url", "find-links")}
    lines = ["[global]", *(f"{key} = {value}" for key, value in kept.items())]
    folders = [word.removeprefix("file://") for word in kept.get("find-links", "").split()]
    return "\n".join(lines) + "\n", [folder for folder in folders if Path(folder).is_dir()]


@dataclass(frozen=True)
class Pin:
    """A package's entry in a list of infra/image."""

    version: str
    hashes: tuple[str, ...]


def pins(path: Path) -> dict[str, Pin]:
    """Return the packages of a list by name; raises on lines that pip would parse differently."""
    text = re.sub(r"\s*\\\n\s*", " ", re.sub(r"(?m)^#.*\n", "", path.read_text()))
    found = {}
    for line in text.splitlines():
        matched = re.fullmatch(r"([a-z0-9-]+)==(\S+)((?: --hash=sha256:[0-9a-f]{64})*)", line)
        assert matched, f"{path.name}: {line}"
        assert matched[1] not in found, f"{path.name}: {matched[1]} twice"
        found[matched[1]] = Pin(matched[2], tuple(matched[3].replace("--hash=sha256:", "").split()))
    return found


def write_pins(path: Path, packages: dict[str, Pin]) -> None:
    """Write a list for `pip install --require-hashes`."""
    lines = [
        f"{name}=={pin.version} {' '.join(f'--hash=sha256:{one}' for one in pin.hashes)}\n"
        for name, pin in packages.items()
    ]
    path.write_text("".join(lines))


def write_context(folder: Path, wheels: list[str]) -> None:
    """Copy the build's inputs; a local torch wheel replaces the listed one."""
    for name in ("Dockerfile", ".dockerignore", "pyproject.toml", "README.md", "LICENSE", "entrypoint.sh"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
        (folder / name).chmod((ROOT / name).stat().st_mode)
    for name in ("job", "infra/image"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    listed = folder / "infra/image/torch.txt"
    packages = pins(listed)
    version = packages["torch"].version
    own = [wheel for place in wheels for wheel in Path(place).glob(f"torch-{version}[+-]*cp311-*linux*_x86_64.whl")]
    if not own:
        return
    digests = tuple(hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in own)
    # A CPU build depends on no CUDA libraries; everything else keeps the committed hashes.
    kept = {name: pin for name, pin in packages.items() if not re.match("nvidia-|cuda-|triton$", name)}
    write_pins(listed, {**kept, "torch": Pin(version, digests)})


def debian_mirror() -> list[str]:
    """Return this machine's package mirror, empty for debootstrap's default."""
    text = "".join(path.read_text() for path in Path("/etc/apt").glob("sources.list*/*") if path.is_file())
    text += Path("/etc/apt/sources.list").read_text() if Path("/etc/apt/sources.list").exists() else ""
    found = re.search(r"https?://\S+/debian/?(?=\s)", text)
    return [found[0]] if found else []


class Image:
    """The image in its own storage; everything is removed at the end of a `with` block.

    Attributes:
        inspected: The output of `buildah inspect`.
        build_seconds: Duration of the build.
        context: Its build context.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._storage = ("--root", folder / "storage", "--runroot", folder / "run", "--storage-driver", "overlay")
        self._containers: list[str] = []
        self.build_seconds = 0.0
        self.context = folder / "context"
        self.volumes: list[str] = []
        self.inspected: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for container in self._containers:
            self.buildah("umount", container)
        self.buildah("rm", "--all")
        self.buildah("rmi", "--all", "--force")

    def build(self, kept: Path) -> None:
        """Build it, and cache the base system in a folder."""
        base = kept / "bookworm.tar"
        with FileLock(kept / "bookworm.lock"):
            if not base.exists():
                self._bootstrap(base)
        container = self.buildah("from", "scratch")
        run("tar", "-xf", base, "-C", self.buildah("mount", container))
        self.buildah("umount", container)
        self.buildah("commit", "-q", "--rm", container, "localhost/base")
        settings, folders = pip_settings()
        (self.folder / "pip.conf").write_text(settings)
        self.volumes = [f"{self.folder / 'pip.conf'}:/etc/pip.conf:ro", f"{CERTIFICATES}:{CERTIFICATES}:ro"]
        self.volumes += [f"{path}:{path}:ro" for path in folders]
        self.context.mkdir()
        write_context(self.context, folders)
        began = time.monotonic()
        self.build_from(self.context, "-t", TAG)
        self.build_seconds = time.monotonic() - began
        self.inspected = json.loads(self.buildah("inspect", "--type", "image", TAG))

    def build_from(self, context: Path, *options: str) -> None:
        words = ["--isolation", "chroot", "--network", "host", "--layers", *options]
        for argument in ("BASE_IMAGE=localhost/base", "VERSION=1.2.3", "REVISION=abc123"):
            words += ["--build-arg", argument]
        for volume in self.volumes:
            words += ["-v", volume]
        self.buildah("bud", *words, context, seconds=1500)

    def _bootstrap(self, base: Path) -> None:
        debian = self.folder / "debian"
        packages = "ca-certificates,python3,python3-venv"
        run("debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", debian, *debian_mirror())
        run("tar", "-cf", base.with_suffix(".making"), "-C", debian, ".")
        base.with_suffix(".making").rename(base)
        shutil.rmtree(debian)

    def buildah(self, *arguments: Any, seconds: float = 600) -> str:
        return run("buildah", *self._storage, *arguments, seconds=seconds, HF_TOKEN=SECRET).strip()

    @property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = self.inspected["OCIv1"]["config"]
        return found

    @property
    def layer_bytes(self) -> list[int]:
        """Return the uncompressed size of every layer above the base, in order."""
        listed = json.loads((self.folder / "storage" / "overlay-layers" / "layers.json").read_text())
        sizes = {layer["diff-digest"]: layer["diff-size"] for layer in listed if "diff-digest" in layer}
        return [sizes[digest] for digest in self.inspected["OCIv1"]["rootfs"]["diff_ids"]][1:]

    def container(self) -> Container:
        name = self.buildah("from", TAG)
        self._containers.append(name)
        return Container(self, Path(self.buildah("mount", name)))


@dataclass
class Container:
    """A container's folder, and the command in it."""

    image: Image
    root: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                # Kill PID 1 directly: the kernel drops unshare's --kill-child when PID 1 changes its user.
                for one in psutil.Process(process.pid).children():
                    one.kill()
            process.kill()
            process.communicate()

    def start(
        self,
        *arguments: Any,
        volume: Path,
        entrypoint: tuple[str, ...] | None = None,
        writable: bool = False,
        user: int = 0,
        **env: str,
    ) -> subprocess.Popen[str]:
        """Start its ENTRYPOINT, or another, as PID 1.

        Args:
            arguments: Its arguments.
            volume: Folder mounted at /workspace.
            entrypoint: Instead of the image's own.
            writable: Whether the root file system is writable.
            user: Its user, as with `docker run --user`.
            env: Added to the image's own environment.
        """
        own = dict(pair.split("=", 1) for pair in self.image.config["Env"])
        changed = (f"--userspec={user}:{user}",) if user else ()
        own_entrypoint = entrypoint or self.image.config["Entrypoint"]
        command = [shutil.which("chroot"), *changed, self.root, *own_entrypoint, *arguments]
        stage = {"ROOT": str(self.root), "VOLUME": str(volume), "WRITABLE": "yes" if writable else "no"}
        process = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--mount", "--kill-child", "sh", "-c", STAGE, "stage", *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**own, "HOME": "/root", **stage, **env},
        )
        self.processes.append(process)
        return process

    def run(self, *arguments: Any, volume: Path, seconds: float = 200, **options: Any) -> Result:
        process = self.start(*arguments, volume=volume, **options)
        out, err = process.communicate(timeout=seconds)
        return Result(process.returncode, out, err)


def inside(process: subprocess.Popen[str]) -> psutil.Process:
    """Wait for the container's PID 1 and return its process as seen from the host."""
    while not (found := psutil.Process(process.pid).children()):
        assert process.poll() is None
        time.sleep(0.01)
    return found[0]


def stop(process: subprocess.Popen[str]) -> float:
    """Send SIGTERM to PID 1, as `docker stop` does, and return the seconds until it has ended."""
    inside(process).send_signal(signal.SIGTERM)
    began = time.monotonic()
    process.wait(60)
    return time.monotonic() - began
