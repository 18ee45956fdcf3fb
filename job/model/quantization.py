"""How a model's files are quantised, and what its tensors are once that is undone.

Nothing is looked at but config.json and the headers of the files, so that what cannot be undone is refused
before any weight is downloaded (docs/decisions/0019-quantised-sources.md). Where the two disagree, the headers win:
config.json may come from a copy that was quantised.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from job.errors import QuantisedSourceError
from job.model.config_file import CONFIG, model_config
from job.model.weight_files import Headers, stored_tensors

Method = Literal["fp8", "mxfp4"]
METHODS: tuple[Method, ...] = ("fp8", "mxfp4")
# The type that dequantised tensors are written in, and such models loaded in by themselves.
DTYPE = "bfloat16"
_HEADER_DTYPE = "BF16"
_KEYS = ("quantization_config", "compression_config")
# Types of tensors in plain files. Quantised ones have others: packed values, their states, 8-bit numbers.
_PLAIN = frozenset({"F64", "F32", "F16", "BF16", "I64", "BOOL"})
# Ways of quantising that may keep plain weights and round them whenever they are used.
_ROUNDED_IN_USE = frozenset({"bitnet", "fouroversix", "fp_quant"})
_EIGHT_BITS = frozenset({"F8_E4M3", "F8_E5M2"})
_SCALES = frozenset({"F32", "BF16", "F16", "F8_E8M0", "U8"})
_SCALE, _ACTIVATION = "_scale_inv", ".activation_scale"
_BLOCKS, _EXPONENTS = "_blocks", "_scales"
# Weights of an MXFP4 block, which shares an exponent; two are in a byte.
_MXFP4_BLOCK = 32


@dataclass(frozen=True)
class Quantisation:
    """A supported quantisation.

    Attributes:
        method: "fp8": 8-bit floats with a scale per block; "mxfp4": 4-bit floats with an exponent per 32.
        block: Rows and columns of an fp8 block, None if config.json omits it.
    """

    method: Method
    block: tuple[int, int] | None = None


@dataclass(frozen=True)
class PlainTensor:
    """A dequantised tensor; `parts` are its stored tensors: itself, or quantised values and scales."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]


def quantisation_of(config: Mapping[str, Any], stored: Headers) -> Quantisation | None:
    """Return how a model's files are quantised according to config.json, or None.

    `stored` are the tensors in the files; if none are known, config.json is believed. Raises QuantisedSourceError if
    they cannot be dequantised.
    """
    method = method_of(config, stored)
    if method is None:
        return None
    _, described = _quantization_entry(config)
    if method == "fp8":
        if described.get("expert_dtype", "fp8") != "fp8":
            raise QuantisedSourceError(method, f"its experts are stored as {described['expert_dtype']}")
        block = described.get("weight_block_size")
        return Quantisation("fp8", (int(block[0]), int(block[1])) if block else None)
    if method == "mxfp4":
        family = (config.get("text_config") or config).get("model_type")
        if family != "gpt_oss":
            raise QuantisedSourceError(method, f"MXFP4 is supported for gpt_oss only, not for {family}")
        return Quantisation("mxfp4")
    raise QuantisedSourceError(method)


def quantisation_in(folder: Path, stored: Headers | None = None) -> Quantisation | None:
    """Return how the files of a model folder are quantised, or None (`quantisation_of`).

    `stored` None: the tensors in the folder. Raises ImpossibleJobError if they cannot be dequantised, or config.json is
    damaged.
    """
    config = model_config(folder) if (folder / CONFIG).is_file() else {}
    if not is_called_quantised(config):
        return None
    return quantisation_of(config, stored_tensors(folder) if stored is None else stored)


def is_called_quantised(config: Mapping[str, Any]) -> bool:
    """Return whether config.json says that the files are quantised."""
    return bool(_quantization_entry(config)[1])


def method_of(config: Mapping[str, Any], stored: Headers) -> str | None:
    """Return the name of the way in which the files are quantised, None if they are not (`quantisation_of`)."""
    described = _quantization_entry(config)[1]
    return _method(described) if described and stale_key(config, stored) is None else None


def stale_key(config: Mapping[str, Any], stored: Headers) -> str | None:
    """Return the key of config.json that calls plain files quantised, None where there is none."""
    key, described = _quantization_entry(config)
    plain = bool(stored) and all(dtype in _PLAIN for dtype, _ in stored.values())
    return key if described and plain and _method(described) not in _ROUNDED_IN_USE else None


def _quantization_entry(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return how config.json describes the quantisation of the files and under which key; empty for not at all."""
    for part in (config, config.get("text_config") or {}):
        for key in _KEYS:
            if part.get(key):
                return key, part[key]
    return "", {}


def _method(described: Mapping[str, Any]) -> str:
    # Old files of bitsandbytes do not name it.
    old = any(described.get(key) for key in ("load_in_4bit", "load_in_8bit"))
    return str(described.get("quant_method") or ("bitsandbytes" if old else "unknown"))


def plain_tensors(quantisation: Quantisation, headers: Headers) -> Iterator[PlainTensor]:
    """Yield a model's dequantised tensors from stored types and shapes. Raises QuantisedSourceError."""
    undone = _eight_bits if quantisation.method == "fp8" else _four_bits
    for name, (dtype, shape) in headers.items():
        if not _belongs_to_another(name, headers):
            yield undone(quantisation, name, headers) or PlainTensor(name, dtype, shape, (name,))


def _belongs_to_another(name: str, headers: Headers) -> bool:
    """Return whether a tensor holds the scales of another."""
    return (
        (name.endswith(_SCALE) and name.removesuffix(_SCALE) in headers)
        or (name.endswith(_ACTIVATION) and f"{name.removesuffix(_ACTIVATION)}.weight" in headers)
        or (name.endswith(_EXPONENTS) and name.removesuffix(_EXPONENTS) + _BLOCKS in headers)
    )


def _eight_bits(quantisation: Quantisation, name: str, headers: Headers) -> PlainTensor | None:
    dtype, shape = headers[name]
    scale = name + _SCALE
    if dtype not in _EIGHT_BITS and scale not in headers:
        return None
    if dtype not in _EIGHT_BITS or len(shape) != 2 or not name.endswith(".weight"):
        raise QuantisedSourceError("fp8", f"{name} is stored as {dtype} with {len(shape)} axes")
    if scale not in headers or headers[scale][0] not in _SCALES:
        raise QuantisedSourceError("fp8", f"the scales of {name} are missing or of an unknown type")
    block_of(shape, headers[scale][1], quantisation.block)
    return PlainTensor(name, _HEADER_DTYPE, shape, (name, scale))


def _four_bits(_quantisation: Quantisation, name: str, headers: Headers) -> PlainTensor | None:
    dtype, shape = headers[name]
    if not name.endswith(_BLOCKS):
        return None
    base = name.removesuffix(_BLOCKS)
    scales = headers.get(base + _EXPONENTS)
    if len(shape) != 4 or 2 * shape[-1] != _MXFP4_BLOCK or dtype != "U8" or scales != ("U8", shape[:-1]):
        raise QuantisedSourceError("mxfp4", f"{name} and its scales do not have the layout of gpt-oss")
    experts, rows, blocks, _ = shape
    return PlainTensor(base, _HEADER_DTYPE, (experts, blocks * _MXFP4_BLOCK, rows), (name, base + _EXPONENTS))


def block_of(shape: Sequence[int], grid: Sequence[int], named: tuple[int, int] | None) -> tuple[int, int]:
    """Return a matrix's rows and columns per scale; last blocks may be smaller. Raises QuantisedSourceError."""
    rows, columns = shape
    if len(grid) < 2 and all(size == 1 for size in grid):
        return rows, columns
    if len(grid) == 2:
        if named is not None and tuple(grid) == (-(-rows // named[0]), -(-columns // named[1])):
            return named
        if rows % grid[0] == columns % grid[1] == 0:
            return rows // grid[0], columns // grid[1]
    raise QuantisedSourceError("fp8", f"{rows} × {columns} weights do not match scales of the shape {list(grid)}")


def plain_config(data: bytes, *, dequantised: bool) -> bytes:
    """Turn a base model's config.json into one for plain weights; `dequantised` ones are bfloat16."""
    config = json.loads(data)
    if not is_called_quantised(config):
        return data
    for part in (config, config.get("text_config")):
        if not part:
            continue
        for key in _KEYS:
            part.pop(key, None)
        named = {"dtype", "torch_dtype"} & part.keys() if dequantised else set()
        for key in named:
            del part[key]
        if named or (dequantised and part is config):
            part["dtype"] = DTYPE
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
