"""GGUF files by transformers' reader, which dequantises their weights."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from job.errors import ImpossibleJobError, JobError, first_line
from job.system.extras import require_extra

GGUF = ".gguf"
_REMEDY = "obtain an undamaged copy, of a family whose GGUF files transformers reads"


@contextlib.contextmanager
def reading_gguf(file: Path, remedy: str = _REMEDY) -> Iterator[dict[str, Any]]:
    """Yield the arguments with which `from_pretrained` reads a file in its folder. Raises ImpossibleJobError."""
    require_extra("gguf", "reading a GGUF file")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # transformers draws a bar that cannot be disabled
            yield {"gguf_file": file.name, "local_files_only": True}
    except JobError:
        raise
    except Exception as error:  # a damaged file may raise anything in the reader
        raise ImpossibleJobError(f"{file} cannot be read: {first_line(error)}", remedy=remedy) from error


def gguf_tokenizer(file: Path, remedy: str = _REMEDY) -> Any:
    """Return a file's tokenizer. Raises ImpossibleJobError if it is damaged or has no chat template."""
    from transformers import AutoTokenizer

    with reading_gguf(file, remedy) as source:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
    if not tokenizer.chat_template:
        raise ImpossibleJobError(f"{file} has no chat template", remedy="use the GGUF file of a chat model")
    return tokenizer


def gguf_types(file: Path) -> dict[str, int]:
    """Return the number of tensors of each type in a file, most frequent first. Raises ImpossibleJobError."""
    with reading_gguf(file):
        from gguf import GGUFReader

        return dict(Counter(tensor.tensor_type.name for tensor in GGUFReader(file).tensors).most_common())
