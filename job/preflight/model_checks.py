"""The checks of a model before its weights are there: files, architecture, tokenizer, licence."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from job.model.files import ModelListing, ModelSource
from job.model.quantization import METHODS
from job.preflight.checks import Check, size
from job.preflight.model_facts import ModelFacts, Tensors
from job.records import ExportFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from job.architectures.spec import Architecture
    from job.data.prompts import Prompt
    from job.numerics.ablation import RowNormalization  # which loads torch


def files(source: ModelSource, listing: ModelListing) -> Check:
    """Say what a model consists of."""
    commit = f", commit {listing.commit[:12]}" if listing.commit else ""
    return Check(
        name="model.files",
        status="ok",
        measured=f"{source.describe()}{commit}: {len(listing.files)} files, {size(listing.size)}",
        needed="safetensors weights, configuration and tokenizer",
    )


def weights(facts: ModelFacts, listing: ModelListing, tensors: int) -> Check:
    """Say how large the weights are, and what quantised ones grow to."""
    packed = sum(file.size for file in listing.weights)
    grown = f" in bfloat16, made of {size(packed)} in {facts.quantisation}" if facts.quantisation in METHODS else ""
    return Check(
        name="model.weights",
        status="ok",
        measured=f"{tensors} tensors, {facts.parameters / 1e9:.3g} billion weights, {size(facts.stored_bytes)}{grown}",
        needed="safetensors",
    )


def architecture(found: Architecture, mode: RowNormalization, form: ExportFormat) -> Check:
    """Say what was proven on a small twin, and whether it can be edited as the settings ask for."""
    from job.architectures.spec import require_modes

    require_modes(found, mode, form)
    return Check(
        name="model.architecture",
        status="ok",
        measured=f"{found.model_type}, {found.layer_count} layers, {len(found.writers)} residual writers",
        needed="a family whose residual writers are all found",
    )


def require_writers(found: Architecture, folder: Path, trusted: bool, tensors: Tensors) -> None:
    """Refuse files that do not hold all residual writers in the sizes that the configuration asks for.

    Raises:
        ImpossibleJobError: They do not.
    """
    from job.architectures.tiny_model import empty_model
    from job.model.safetensors_files import require_sizes
    from job.proof.truth_test import read_config

    shapes = {name: shape for name, (_, shape) in tensors.items()}
    require_sizes(shapes, found, empty_model(read_config(folder, trusted)))


def tokenizer(loaded: PreTrainedTokenizerBase) -> Check:
    """Say what the tokenizer is."""
    return Check(
        name="model.tokenizer",
        status="ok",
        measured=f"{len(loaded)} tokens, and a chat template",
        needed="a tokenizer with a chat template",
    )


def template(loaded: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> Check:
    """Have the chat template write all prompts, within its limits.

    Raises:
        ImpossibleJobError: It exceeds them, or does not take a conversation.
    """
    from job.model.chat_template import MEMORY_BYTES, SECONDS
    from job.model.loading import GREETING, conversations

    begin = time.monotonic()
    texts = conversations(loaded, dict.fromkeys([GREETING, *prompts]))
    return Check(
        name="model.template",
        status="ok",
        measured=f"{len(texts)} conversations in {time.monotonic() - begin:.1f} s, "
        f"of at most {max(map(len, texts))} characters",
        needed=f"{SECONDS} s of a processor and {MEMORY_BYTES >> 20} MiB, more for many prompts, and an end",
    )


# What a derived model's name has to begin with, by how the names of licences begin.
_NAMING = {"llama3": "Llama", "llama4": "Llama"}
_DUTIES = {"gemma": "its terms ask that its use restrictions go with every derived model"}


def licence(listing: ModelListing, targets: Sequence[str]) -> Check:
    """Name the licence, and what known ones ask of a derived model and its name."""
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
