"""Checks of a model before its weights are downloaded: files, architecture, tokenizer, licence."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.model.base_card import read_base_card
from job.model.carried_files import licence_files
from job.model.config_file import CONFIG, model_config
from job.model.files import (
    ModelListing,
    ModelSource,
    fetch_model,
    line_speed,
    list_model,
    parse_model,
    tensor_shapes,
)
from job.model.quantization import METHODS, stale_key
from job.model.user_files import reading
from job.model.weight_files import Headers, left_aside, require_complete
from job.preflight.checks import Check, attempt, guarded, size
from job.preflight.data_checks import DataFindings
from job.preflight.inputs import PreflightInputs
from job.preflight.model_facts import ModelFacts, model_facts, undone
from job.preflight.planning import LINE
from job.preflight.template_checks import template_checks
from job.records import LARGE_BYTES, ExportFormat

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
class ModelHeaders:
    """What configuration and weight headers say.

    Attributes:
        config: Contents of config.json.
        stored: The tensors in the files.
        facts: What follows for memory and speed.
    """

    config: dict[str, Any]
    stored: Headers
    facts: ModelFacts


@dataclass(frozen=True)
class ModelFindings:
    """Findings on the model; `line` is the download rate in bytes per second."""

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
    headers = attempt("model.weights", lambda: _read_headers(inputs, model))
    stored = {} if isinstance(headers, Check) else headers.stored
    known, architecture_check = _examine_architecture(inputs, model.folder, stored)
    facts, weights_check = (
        (None, headers) if isinstance(headers, Check) else _examine_weights(inputs, model, headers, known)
    )
    checks = (
        files(model.source, model.listing),
        architecture_check,
        weights_check,
        licence(model.folder, inputs.settings.upload),
        # Last: it waits for the prompts.
        *guarded("model.tokenizer", lambda: _tokenizer_checks(inputs, model.folder, data)),
    )
    return ModelFindings(checks, model, facts, line)


def _fetch(inputs: PreflightInputs, cache: Path | None) -> tuple[ModelFiles, float]:
    source = parse_model(inputs.settings.model)
    listing = list_model(source, inputs.earlier.commit, inputs.report)
    folder = fetch_model(source, listing, inputs.report, weights=False, cache=cache)
    line = line_speed(source, listing, inputs.settings.probe_seconds) if inputs.on is None else None
    return ModelFiles(source, listing, folder), line or LINE


def _examine_architecture(inputs: PreflightInputs, folder: Path, stored: Headers) -> tuple[Architecture | None, Check]:
    from job.proof.truth_test import inspect_model

    settings = inputs.settings
    found = attempt("model.architecture", lambda: inspect_model(folder, settings.loading.trust_remote_code, stored))
    if isinstance(found, Check):
        return None, found
    mode, form = settings.ablation.row_normalization, settings.export_format
    return found, attempt("model.architecture", lambda: architecture(found, mode, form))


def _examine_weights(
    inputs: PreflightInputs, model: ModelFiles, headers: ModelHeaders, found: Architecture | None
) -> tuple[ModelFacts, Check]:
    """Check the headers, and a small folder's values; the facts are known even if residual writers are missing."""
    trusted = inputs.settings.loading.trust_remote_code

    def check() -> Check:
        if found is not None:
            _require_fitting(model, headers, found, trusted)
        if model.source.kind == "folder" and sum(file.size for file in model.listing.weights) < LARGE_BYTES:
            from job.model.finite_weights import require_finite

            require_finite(model.folder)  # larger ones are checked once they are loaded
        return weights(headers, model.listing)

    return headers.facts, attempt("model.weights", check)


def _read_headers(inputs: PreflightInputs, model: ModelFiles) -> ModelHeaders:
    stored = tensor_shapes(model.source, model.listing, inputs.report)
    require_complete(model.folder, {file.name for file in model.listing.files}, stored)
    config = model_config(model.folder)
    with reading(
        model.folder, (CONFIG,), "does not describe a decoder", "choose a causal language model in Hugging Face format"
    ):
        return ModelHeaders(config, stored, model_facts(config, stored))


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
        remedy="check that you do not mean those weights" if aside else "",
    )


def weights(headers: ModelHeaders, listing: ModelListing) -> Check:
    """Say how large the weights are, what quantised ones grow to, and that plain ones are called quantised."""
    facts, tensors = headers.facts, len(headers.stored)
    stored = size(facts.stored_bytes)
    packed = sum(file.size for file in listing.weights)
    stale = stale_key(headers.config, headers.stored)
    plain = f"; they are not quantised, although config.json has {stale}" if stale else ""
    grown = f" in bfloat16, made of {size(packed)} in {facts.quantisation}" if facts.quantisation in METHODS else ""
    return Check(
        name="model.weights",
        status="warn" if stale else "ok",
        measured=f"{tensors} tensors, {facts.parameters / 1e9:.3g} billion weights, {stored}{grown}{plain}",
        needed="safetensors",
        remedy=f"none if you mean these weights; the export drops {stale}" if stale else "",
    )


def architecture(found: Architecture, mode: RowNormalization, form: ExportFormat) -> Check:
    """Report the proven architecture, and whether the settings' edit is possible."""
    from job.architectures.spec import require_modes

    require_modes(found, mode, form)
    return Check(
        name="model.architecture",
        status="ok",
        measured=f"{found.model_type}, {found.layer_count} layers, {len(found.writers)} residual writers",
        needed="all residual writers of the family",
    )


def _require_fitting(model: ModelFiles, headers: ModelHeaders, found: Architecture, trusted: bool) -> None:
    """Raise ImpossibleJobError if files lack weights of the configured sizes, or hold more layers."""
    from job.architectures.tiny_model import empty_model
    from job.model.dequantization import forget_quantisation
    from job.model.fit import require_fitting_headers
    from job.model.loading import read_config
    from job.model.safetensors_files import require_declared_layers, require_sizes

    tensors = undone(headers.config, headers.stored)
    shapes, config = {name: shape for name, (_, shape) in tensors.items()}, read_config(model.folder, trusted)
    if headers.facts.quantisation is None:
        forget_quantisation(config)  # a stale key
        require_fitting_headers(model.folder, [file.name for file in model.listing.weights], config, shapes)
    require_sizes(shapes, found, empty_model(config))
    require_declared_layers(shapes, found, headers.config)


def tokenizer(loaded: PreTrainedTokenizerBase) -> Check:
    """Report the tokenizer."""
    return Check(
        name="model.tokenizer",
        status="ok",
        measured=f"{len(loaded)} tokens and a chat template",
        needed="a tokenizer with a chat template",
    )


# What a derived model's name has to begin with, by how the names of licences begin.
_NAMING = {"llama3": "Llama", "llama4": "Llama"}
_DUTIES = {"gemma": "pass on its use restrictions with the derived model, as its terms require"}


def licence(folder: Path, targets: Sequence[str]) -> Check:
    """Name the licence, what known ones ask of a derived model and its name, and what the Hub would refuse of it."""
    card, files = read_base_card(folder), licence_files(folder)
    named = card.licence or (f"see {files[0]}" if files else "not stated")
    key = (card.licence or "").lower()
    duty = next((text for start, text in _DUTIES.items() if key.startswith(start)), "")
    wanted = next((name for start, name in _NAMING.items() if key.startswith(start)), "")
    repositories = [target.partition("@")[0].rpartition("/")[2] for target in targets if target.startswith("hf://")]
    if wanted and not (repositories and all(name.lower().startswith(wanted.lower()) for name in repositories)):
        duty = f'begin the derived model\'s name with "{wanted}", as its licence requires'
    refused = f"; left out of the export's card: {', '.join(card.left_out)}" if card.left_out else ""
    correction = "correct those in the base model's README.md: the Hub refuses them" if refused else ""
    return Check(
        name="model.licence",
        status="warn" if duty or refused else "ok",
        measured=f"licence: {named}{refused}",
        needed="a licence that allows this use",
        remedy="; ".join(filter(None, (duty, correction))),
    )
