"""The edit as a LoRA adapter for PEFT, exact: ablating k directions is an update of rank k."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import pad

from job.architectures.spec import require_modes
from job.errors import ImpossibleJobError, first_line
from job.export.merged import Edit, StoredWriter
from job.model.loading import LoadedModel
from job.model.safetensors_files import Checkpoint
from job.storage.atomic import ensure_folder, write_atomically
from job.text.redaction import redacted

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."


def write_adapter(base: LoadedModel, folder: Path, edit: Edit, base_model: str | None) -> None:
    """Write an edit as a LoRA adapter. Raises ImpossibleJobError or MachineError.

    For each writer W' - W = B A: A [k, i] projects on the read directions, B [d, k] subtracts the written ones.
    """
    require_modes(base.architecture, edit.mode, "adapter")
    checkpoint = Checkpoint(base.folder)
    tensors: dict[str, Tensor] = {}
    biased = any(writer.bias is not None for writer in base.architecture.writers)
    rank = edit.basis.size * max(writer.span for writer in base.architecture.writers)
    for writer in base.architecture.writers:
        stored = StoredWriter(checkpoint, base.architecture, writer)
        weight = stored.matrix().to(torch.float64)
        compiled = stored.compile(edit, weight)
        missing = rank - len(compiled.read)  # all adapters of a file have the same rank
        read, write = (pad(table, (0, 0, 0, missing)) for table in (compiled.output_read, compiled.output_write))
        name = f"{_PREFIX}{writer.module}."
        tensors[f"{name}lora_A.weight"] = read @ weight
        tensors[f"{name}lora_B.weight"] = -write.mT
        if biased:
            bias = stored.read(writer.bias).to(weight) if writer.bias else weight.new_zeros(len(weight))
            tensors[f"{name}lora_B.bias"] = -write.mT @ (read @ bias)
    contents = {name: tensor.to(torch.float32).contiguous() for name, tensor in tensors.items()}
    config = _config(base, rank=rank, biased=biased, base_model=base_model)
    ensure_folder(folder)
    write_atomically(folder / ADAPTER, save(contents, metadata={"format": "pt"}))
    write_atomically(folder / CONFIG, config.encode())


def _config(base: LoadedModel, *, rank: int, biased: bool, base_model: str | None) -> str:
    from peft import LoraConfig, TaskType

    config = LoraConfig(
        r=rank,
        lora_alpha=rank,  # a factor of 1
        target_modules=_targets(base),
        lora_bias=biased,
        fan_in_fan_out=any(writer.kind == "conv1d" for writer in base.architecture.writers),
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    described: dict[str, Any] = config.to_dict()  # type: ignore[no-untyped-call]  # PEFT lacks annotations
    # Sets are unordered, and equal edits must give equal bytes.
    values = {name: sorted(value) if isinstance(value, set | list) else value for name, value in described.items()}
    return json.dumps(redacted(values), indent=2, sort_keys=True) + "\n"


def _targets(base: LoadedModel) -> list[str]:
    """Return names that match exactly the writers: their last parts where unambiguous."""
    writers = {writer.module for writer in base.architecture.writers}
    ends = {name.rpartition(".")[2] for name in writers}
    matched = {name for name, _ in base.model.named_modules() if name.rpartition(".")[2] in ends}
    return sorted(ends if matched == writers else writers)


def with_adapter(base: LoadedModel, folder: Path) -> LoadedModel:
    """Attach an adapter to a freshly loaded base model with PEFT. Raises ImpossibleJobError if PEFT rejects it."""
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # from PEFT's use of transformers
            model = PeftModel.from_pretrained(base.model, str(folder)).eval()
    except (ValueError, RuntimeError, OSError) as error:
        raise ImpossibleJobError(
            f"PEFT cannot load the adapter in {folder}: {first_line(error)}", remedy="use export_format = merged"
        ) from error
    return dataclasses.replace(base, model=model.get_base_model())
