"""Checks of a model before its weights are downloaded: files, architecture, tokenizer, licence."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.model.config_file import model_config
from job.model.files import (
    ModelListing,
    ModelSource,
    fetch_model,
    line_speed,
    list_model,
    parse_model,
    tensor_shapes,
)
from job.model.quantization import METHODS
from job.model.weight_files import left_aside, require_complete
from job.preflight.checks import Check, attempt, guarded, size
from job.preflight.data_checks import DataFindings
from job.preflight.inputs import PreflightInputs
from job.preflight.model_facts import ModelFacts, Tensors, model_facts, undone
from job.preflight.planning import LINE
from job.preflight.template_checks import template_checks
from job.records import ExportFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from job.architectures.spec import Architecture
    from job.numerics.ablation import RowNormalization  # which loads torch


@dataclass(frozen=True)
class ModelFiles:
    """A model's source, listing, and folder of descriptive files."""

    source: ModelSource
    listing: ModelListing
    folder: Path


@dataclass(frozen=True)
class ModelFindings:
    """Findings on the model.

    Attributes:
        line: Download rate, bytes per second.
    """

    checks: tuple[Check, ...]
    files: ModelFiles | None = None
    facts: ModelFacts | None = None
    line: float = LINE


def examine_model(inputs: PreflightInputs, cache: Path | None, data: Callable[[], DataFindings]) -> ModelFindings:
    """Download descriptive files, and check them; `data` waits for the findings on the prompts."""
    fetched = attempt("model", lambda: _fetch(inputs, cache))
    if isinstance(fetched, Check):
        return ModelFindings((fetched,))
    model, line = fetched
    known, architecture_check = _examine_architecture(inputs, model.folder)
    facts, weights_check = _examine_weights(inputs, model, known)
    checks = (
        files(model.source, model.listing),
        architecture_check,
        weights_check,
        licence(model.listing, inputs.settings.upload),
        # Last: it waits for the prompts.
        *guarded("model.tokenizer", lambda: _tokenizer_checks(inputs, model.folder, data)),
    )
    return ModelFindings(checks, model, facts, line)


def _fetch(inputs: PreflightInputs, cache: Path | None) -> tuple[ModelFiles, float]:
    """Download descriptive files; return them with the download rate in bytes per second."""
    source = parse_model(inputs.settings.model)
    listing = list_model(source, inputs.earlier.commit, inputs.report)
    folder = fetch_model(source, listing, inputs.report, weights=False, cache=cache)
    line = line_speed(source, listing, inputs.settings.probe_seconds) if inputs.on is None else None
    return ModelFiles(source, listing, folder), line or LINE


def _examine_architecture(inputs: PreflightInputs, folder: Path) -> tuple[Architecture | None, Check]:
    from job.proof.truth_test import inspect_model

    settings = inputs.settings
    found = attempt("model.architecture", lambda: inspect_model(folder, settings.loading.trust_remote_code))
    if isinstance(found, Check):
        return None, found
    mode, form = settings.ablation.row_normalization, settings.export_format
    return found, attempt("model.architecture", lambda: architecture(found, mode, form))


def _examine_weights(
    inputs: PreflightInputs, model: ModelFiles, found: Architecture | None
) -> tuple[ModelFacts | None, Check]:
    """Read the weights' headers; facts are known even if residual writers are missing."""
    read = attempt("model.weights", lambda: _read_headers(inputs, model))
    if isinstance(read, Check):
        return None, read
    config, shapes, facts = read

    def check() -> Check:
        if found is not None:
            require_writers(found, model.folder, inputs.settings.loading.trust_remote_code, undone(config, shapes))
        return weights(facts, model.listing, len(shapes))

    return facts, attempt("model.weights", check)


def _read_headers(inputs: PreflightInputs, model: ModelFiles) -> tuple[dict[str, Any], Tensors, ModelFacts]:
    """Return the configuration, the stored tensors, and the model's facts."""
    shapes = tensor_shapes(model.source, model.listing, inputs.report)
    require_complete(model.folder, {file.name for file in model.listing.files}, shapes)
    config = model_config(model.folder)
    return config, shapes, model_facts(config, shapes)


def _tokenizer_checks(inputs: PreflightInputs, folder: Path, data: Callable[[], DataFindings]) -> list[Check]:
    from job.model.loading import load_tokenizer
    from job.model.rendering import Rendering

    settings = inputs.settings
    trusted, longest = settings.loading.trust_remote_code, settings.scoring.answer_tokens
    loaded = load_tokenizer(folder, trusted)
    prompts, rendering = data().prompts, Rendering(inputs.earlier.date)
    checks = functools.partial(template_checks, folder, trusted, loaded, prompts, rendering, longest)
    return [tokenizer(loaded), *guarded("model.template", checks)]


def files(source: ModelSource, listing: ModelListing) -> Check:
    """Report a model's files."""
    commit = f", commit {listing.commit[:12]}" if listing.commit else ""
    there = [path.name for path in Path(source.name).iterdir()] if source.kind == "folder" else []
    aside = left_aside(there, [file.name for file in listing.weights])
    unread = f"; not loaded: {', '.join(aside)}" if aside else ""
    return Check(
        name="model.files",
        status="warn" if aside else "ok",
        measured=f"{source.describe()}{commit}: {len(listing.files)} files, {size(listing.size)}{unread}",
        needed="safetensors weights, configuration and tokenizer",
        remedy="see that those are not the weights that you mean" if aside else "",
    )


def weights(facts: ModelFacts, listing: ModelListing, tensors: int) -> Check:
    """Report the weights' size, and that of dequantised ones."""
    packed = sum(file.size for file in listing.weights)
    grown = f" in bfloat16, made of {size(packed)} in {facts.quantisation}" if facts.quantisation in METHODS else ""
    return Check(
        name="model.weights",
        status="ok",
        measured=f"{tensors} tensors, {facts.parameters / 1e9:.3g} billion weights, {size(facts.stored_bytes)}{grown}",
        needed="safetensors",
    )


def architecture(found: Architecture, mode: RowNormalization, form: ExportFormat) -> Check:
    """Report the proven architecture, and whether the settings' edit is possible."""
    from job.architectures.spec import require_modes

    require_modes(found, mode, form)
    return Check(
        name="model.architecture",
        status="ok",
        measured=f"{found.model_type}, {found.layer_count} layers, {len(found.writers)} residual writers",
        needed="a family whose residual writers are all found",
    )


def require_writers(found: Architecture, folder: Path, trusted: bool, tensors: Tensors) -> None:
    """Raise ImpossibleJobError unless the files hold all residual writers in the configured sizes."""
    from job.architectures.tiny_model import empty_model
    from job.model.safetensors_files import require_sizes
    from job.proof.truth_test import read_config

    shapes = {name: shape for name, (_, shape) in tensors.items()}
    require_sizes(shapes, found, empty_model(read_config(folder, trusted)))


def tokenizer(loaded: PreTrainedTokenizerBase) -> Check:
    """Report the tokenizer."""
    return Check(
        name="model.tokenizer",
        status="ok",
        measured=f"{len(loaded)} tokens, and a chat template",
        needed="a tokenizer with a chat template",
    )


# What a derived model's name has to begin with, by how the names of licences begin.
_NAMING = {"llama3": "Llama", "llama4": "Llama"}
_DUTIES = {"gemma": "its terms ask that its use restrictions go with every derived model"}


def licence(listing: ModelListing, targets: Sequence[str]) -> Check:
    """Report the licence, and known requirements on a derived model and its name."""
    files = [
        file.name
        for file in listing.others
        if file.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE", "USE_POLICY"))
    ]
    named = listing.license or (f"see {files[0]}" if files else "not stated")
    key = (listing.license or "").lower()
    duty = next((text for start, text in _DUTIES.items() if key.startswith(start)), "")
    wanted = next((name for start, name in _NAMING.items() if key.startswith(start)), "")
    repositories = [target.partition("@")[0].rpartition("/")[2] for target in targets if target.startswith("hf://")]
    if wanted and not (repositories and all(name.lower().startswith(wanted.lower()) for name in repositories)):
        duty = f'its licence asks for "{wanted}" at the beginning of a derived model\'s name'
    return Check(
        name="model.licence",
        status="warn" if duty else "ok",
        measured=f"licence: {named}",
        needed="a licence that allows what is planned",
        remedy=duty,
    )
