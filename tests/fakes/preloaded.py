"""Libraries that stand between a process and the kernel, compiled from the C files beside this one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def preloaded(name: str, folder: Path) -> Path:
    """Compile a library for LD_PRELOAD into a folder; skip the test without a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:  # only C code can stand in for the C library's calls
        pytest.skip("no C compiler here")
    source, library = Path(__file__).with_name(f"{name}.c"), folder / f"{name}.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library
