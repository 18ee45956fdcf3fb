"""Convert a GGUF file to a model folder in Hugging Face format."""

from __future__ import annotations

from pathlib import Path

from job.model.gguf_files import gguf_tokenizer, reading_gguf

_REMEDY = "reinstall its package"


def convert(file: Path, folder: Path) -> None:
    """Convert a GGUF file with a chat template to a folder of bfloat16 safetensors. Raises ImpossibleJobError."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    from job.model.loading import quieten_transformers

    quieten_transformers()
    tokenizer = gguf_tokenizer(file, _REMEDY)
    with reading_gguf(file, _REMEDY) as source:
        # Packed weights could not be saved.
        unpacked = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.bfloat16, quantization_config=unpacked, **source
        )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
