"""A release: both distributions, one version everywhere, and workflows that do not change by themselves."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import job
from job.cloud import image
from job.errors import UsageError

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
# What the launcher does: everything of `cloud`, settings, and finding a job at a checkpoint on the Hub.
LAUNCHED = (
    "job.cli.main",
    "job.cli.cloud",
    "job.cli.cloud_requirements",
    "job.config.describe",
    "job.lifecycle.locate",
)
LAUNCHED += ("job.mirror.mirror", "job.mirror.hub_store", "job.system.hub_client", "job.transfer.hub_repo")
READ = ("job.cli.watch", "job.report.status", "job.report.front", "job.report.markdown", "job.report.charts")


def project(file: str) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / file).read_text())["project"]
    return found


TOOL, LAUNCHER = project("pyproject.toml"), project("infra/launcher/pyproject.toml")


def steps(workflow: Path) -> list[dict[str, Any]]:
    return [step for one in yaml.safe_load(workflow.read_text())["jobs"].values() for step in one["steps"]]


def test_the_launcher_asks_for_what_the_tool_asks_for_and_never_for_torch() -> None:
    asked = {*LAUNCHER["dependencies"], *(one for extra in LAUNCHER["optional-dependencies"].values() for one in extra)}
    assert asked <= set(TOOL["dependencies"])
    assert not any(line.startswith(("torch", "transformers", "accelerate", "peft")) for line in asked)


def loaded(modules: tuple[str, ...]) -> set[str]:
    """Return the distributions that own what a fresh process has imported with our modules, under their plain names."""
    owners = importlib.metadata.packages_distributions()
    code = f"import sys\nimport {', '.join(('job', *modules))}\nfrom job.cloud import *\n"
    code += "import job.cloud.vast, job.cloud.runpod, job.cloud.watching, job.cloud.destroying, job.cloud.launching\n"
    code += "import huggingface_hub, httpx2, rich\nprint(*{name.partition('.')[0] for name in sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {canonicalize_name(owner) for name in out.split() for owner in owners.get(name, ())} - {TOOL["name"]}


def closure(requirements: list[str]) -> set[str]:
    """Return the distributions that requirements install, by the metadata of those that are installed here."""
    found: set[str] = set()
    left = [Requirement(line) for line in requirements]
    while left:
        asked = left.pop()
        name = canonicalize_name(asked.name)
        if name in found:
            continue
        found.add(name)
        try:
            lines = importlib.metadata.distribution(asked.name).requires or []
        except importlib.metadata.PackageNotFoundError:
            continue  # not for this platform or Python
        parsed = map(Requirement, lines)
        left += [one for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


# Libraries that others use if they are there.
BYSTANDERS = {"setuptools", "pip", "certifi", "distutils-precedence", "colorama", "coverage", "pytest-cov"}


def test_the_launcher_runs_on_its_own_dependencies() -> None:
    used = loaded(LAUNCHED) - BYSTANDERS
    assert {"typer", "pydantic", "psutil"} <= used
    assert used - closure(LAUNCHER["dependencies"]) == set()


def test_reading_a_job_needs_the_extra_report_alone() -> None:
    extra = LAUNCHER["optional-dependencies"]["report"]
    used = loaded((*LAUNCHED, *READ)) - BYSTANDERS
    assert "optuna" in used
    assert used - closure([*LAUNCHER["dependencies"], *extra]) == set()


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_commit(workflow: Path) -> None:
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert used
    assert [name for name in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", name)] == []


def test_ci_runs_on_every_python_that_the_package_names() -> None:
    matrix = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
    named = re.findall(r":: (3\.\d+)", "\n".join(TOOL["classifiers"]))
    assert matrix["python"] == named
    assert TOOL["requires-python"] == f">={named[0]}" == LAUNCHER["requires-python"]


def test_what_the_workflows_run_of_ours_exists() -> None:
    targets = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [step["run"] for workflow in WORKFLOWS for step in steps(workflow) if "run" in step]
    scripts = re.findall(r"infra/release/[\w-]+\.sh", "\n".join(lines))
    assert len(set(scripts)) == 4
    for script in scripts:
        assert (ROOT / script).stat().st_mode & 0o111, script
    assert set(re.findall(r"\bmake ([\w-]+)", "\n".join(lines))) <= targets


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("job/__init__.py", "job/cloud/image.py", "Dockerfile", "CHANGELOG.md", "CITATION.cff"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "infra/release", tmp_path / "infra/release")
    return tmp_path


def script(checkout: Path, name: str, argument: str) -> subprocess.CompletedProcess[str]:
    command = [checkout / "infra/release" / f"{name}.sh", argument]
    return subprocess.run(command, capture_output=True, text=True, cwd="/")


@pytest.mark.parametrize(
    ("file", "before"),
    [
        ("job/__init__.py", '__version__ = "'),
        ("Dockerfile", "ARG VERSION="),
        ("CITATION.cff", "version: "),
        ("CHANGELOG.md", "## "),
    ],
)
def test_a_release_has_one_version(checkout: Path, file: str, before: str) -> None:
    tag = f"v{job.__version__}"
    assert script(checkout, "require-version", tag).returncode == 0
    text = (checkout / file).read_text()
    assert before + job.__version__ in text
    (checkout / file).write_text(text.replace(before + job.__version__, f"{before}9.9.9"))
    ended = script(checkout, "require-version", tag)
    assert ended.returncode == 1
    assert file in ended.stderr


def test_the_notes_of_a_release_are_its_part_of_the_changelog(checkout: Path) -> None:
    (checkout / "CHANGELOG.md").write_text(
        "# Changelog\n\n## 2.0.0, 2030-01-01\n\nnew\n\n## 1.0.0, 2029-01-01\n\nold\n"
    )
    assert script(checkout, "notes", "2.0.0").stdout == "\nnew\n"
    assert script(checkout, "notes", "1.0.0").stdout.strip() == "old"
    assert script(checkout, "notes", "3.0.0").returncode == 1


def test_a_release_names_its_owners_image_and_a_clone_names_none(checkout: Path) -> None:
    assert image.image_of_release() == ""
    with pytest.raises(UsageError, match="no image to run"):
        image.chosen_image("")
    assert image.chosen_image("mine:1") == "mine:1"
    assert script(checkout, "name-image", "Somebody").returncode == 0
    namespace: dict[str, Any] = {}
    exec((checkout / "job/cloud/image.py").read_text(), namespace)
    assert namespace["chosen_image"]("") == f"ghcr.io/somebody/abliteration-job:{job.__version__}"


def test_the_package_is_typed() -> None:
    assert (ROOT / "job/py.typed").exists()


def test_both_commands_are_one() -> None:
    assert TOOL["scripts"] == {"abliterate": "job.__main__:main", TOOL["name"]: "job.__main__:main"}
    assert LAUNCHER["scripts"] == {"abliterate": "job.__main__:main", LAUNCHER["name"]: "job.__main__:main"}


def test_the_launchers_wheel_holds_the_whole_package_and_its_licence(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        tmp_path,
        ROOT / "infra/launcher",
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("abliteration_launcher-*.whl")
    assert wheel.name.startswith(f"abliteration_launcher-{job.__version__}-")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "job").rglob("*") if path.is_file()}
    assert {file for file in files if "__pycache__" not in file} | {"job/LICENSE"} <= names
    assert not any("__pycache__" in name for name in names)
