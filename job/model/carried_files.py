"""Files of a model folder that an export carries: an allow-list of what loading needs.

A model folder may hold anything: training state, pickled objects, secrets in `.env`. Only known necessary files reach
the recipients of the export.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from job.model.weight_files import INDEX, SINGLE

TEMPLATES = ("chat_template.jinja", "chat_template.json")
# Configuration and templates.
_DESCRIBING = frozenset(
    {
        "config.json",
        "generation_config.json",
        *TEMPLATES,
        "preprocessor_config.json",
        "processor_config.json",
        "image_processor_config.json",
        "video_preprocessor_config.json",
        "audio_tokenizer_config.json",
        INDEX,
    }
)
# The tokenizer, by the names that transformers has for its files.
TOKENIZER_FILES = frozenset(
    {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "tokenizer.model",
        "tokenizer.model.v3",
        "tekken.json",
        "vocab.json",
        "vocab.txt",
        "vocab.bpe",
        "encoder.json",
        "merges.txt",
        "bpe.codes",
        "dict.txt",
        "emoji.json",
        "normalizer.json",
        "byte_maps.json",
        "entity_vocab.json",
        "spiece.model",
        "spm.model",
        "spm_char.model",
        "sentencepiece.model",
        "sentencepiece.bpe.model",
        "source.spm",
        "target.spm",
        "vocab-src.json",
        "vocab-tgt.json",
        "target_vocab.json",
        "word_shape.json",
        "word_pronunciation.json",
        "prophetnet.tokenizer",
    }
)
_LICENCES = re.compile(r"(LICEN[SC]E|NOTICE|USE_POLICY|COPYING)([._-][\w.-]+)?", re.IGNORECASE)
_LICENCE_SUFFIXES = frozenset({"", ".txt", ".md", ".rst", ".pdf", ".html"})
# Vocabularies that a model's own code names.
_VOCABULARIES = frozenset({".json", ".txt", ".model", ".tiktoken", ".spm", ".vocab"})
_MODULE = re.compile(r"[A-Za-z_]\w*")
_IMPORT = re.compile(
    r"^\s*from\s+\.(\w+)\s+import|^\s*from\s+\.\s+import\s+([\w, ]+)|^\s*import\s+\.(\w+)", re.MULTILINE
)


def carried_files(folder: Path, *, code: bool) -> list[Path]:
    """Return the files beside the weights that an export carries; `code` includes the model's own modules."""
    present = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and path.name[0] != "."}
    if SINGLE in present:
        present.pop(INDEX, None)  # it is of other files, which are not loaded
    modules = _own_code(present) if code else set()
    names = {name for name in present if name in _DESCRIBING | TOKENIZER_FILES or is_licence(name)} | modules
    if modules:
        text = "\n".join(present[name].read_text(errors="replace") for name in sorted(modules))
        names |= {name for name in present if Path(name).suffix in _VOCABULARIES and _is_quoted(name, text)}
    return [present[name] for name in sorted(names)]


def licence_files(folder: Path) -> list[str]:
    """Return the names of the files of a model folder that state its terms."""
    return sorted(path.name for path in folder.iterdir() if path.is_file() and is_licence(path.name))


def is_licence(name: str) -> bool:
    """Return whether a file name is that of a licence."""
    return _LICENCES.fullmatch(name) is not None and Path(name).suffix.lower() in _LICENCE_SUFFIXES


def _is_quoted(name: str, text: str) -> bool:
    return f'"{name}"' in text or f"'{name}'" in text


def _own_code(present: dict[str, Path]) -> set[str]:
    """Return the modules named in the configuration, and those that they import from the folder."""
    left = [
        f"{module}.py" for name in ("config.json", "tokenizer_config.json") for module in _mapped(present.get(name))
    ]
    found: set[str] = set()
    while left:
        name = left.pop()
        if name in found or name not in present:
            continue
        found.add(name)
        for groups in _IMPORT.findall(present[name].read_text(errors="replace")):
            left += [f"{module}.py" for module in _MODULE.findall(" ".join(groups))]
    return found


def _mapped(file: Path | None) -> set[str]:
    if file is None:
        return set()
    try:
        described = json.loads(file.read_text())
    except (ValueError, OSError):
        return set()
    mapped = described.get("auto_map") if isinstance(described, dict) else None
    classes: list[object] = []
    for value in mapped.values() if isinstance(mapped, dict) else ():
        classes += value if isinstance(value, list) else [value]
    named = {text.rpartition(".")[0] for text in classes if isinstance(text, str)}
    return {name for name in named if _MODULE.fullmatch(name)}
