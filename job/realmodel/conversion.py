"""Convert a GGUF file to a model folder in Hugging Face format."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from job.errors import ImpossibleJobError, first_line


def convert(file: Path, folder: Path) -> None:
    """Convert a GGUF file with a chat template to a folder of bfloat16 safetensors. Raises ImpossibleJobError."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from job.model.loading import quieten_transformers

    quieten_transformers()
    source = {"gguf_file": file.name, "local_files_only": True}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # transformers draws a bar that cannot be disabled
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
            # Packed weights could not be saved.
            unpacked = GgufConfig(dequantize=True)
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, dtype=torch.bfloat16, quantization_config=unpacked, **source
            )
    except Exception as error:  # a damaged file may raise anything in the reader
        raise ImpossibleJobError(
            f"{file} cannot be read: {first_line(error)}", remedy="reinstall its package"
        ) from error
    if not tokenizer.chat_template:
        raise ImpossibleJobError(f"{file} has no chat template", remedy="use the GGUF file of a chat model")
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
