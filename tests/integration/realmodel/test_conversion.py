"""Converting a GGUF file restores the model folder that it was made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from job.config.load import default_values
from job.config.sections import LoadingSettings
from job.errors import ImpossibleJobError
from job.model.loading import load_model
from job.realmodel.conversion import convert
from tests.tiny_gguf import VOCABULARY, gguf, tiny, write_gguf


def rounded(tensor: Tensor) -> Tensor:
    """Return a weight rounded to four bits and then to bfloat16."""
    if tensor.dim() == 2:
        kind = gguf.GGMLQuantizationType.Q4_1
        tensor = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), kind), kind))
    return tensor.to(torch.bfloat16)


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf", tiny())
    convert(tmp_path / "tiny.gguf", tmp_path / "model")
    return tmp_path / "model"


def test_weights_are_those_of_the_file_in_bfloat16(converted: Path) -> None:
    found = load_file(converted / "model.safetensors")
    wanted = {name: tensor for name, tensor in tiny().state_dict().items() if name != "lm_head.weight"}
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], rounded(tensor)), name


def test_the_folder_is_a_plain_chat_model(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["dtype"], config["tie_word_embeddings"], config["num_key_value_heads"]) == ("bfloat16", True, 2)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    said = [{"role": "user", "content": "help"}]
    assert tokenizer.apply_chat_template(said, tokenize=False) == "<s>user: help</s><s>assistant: "
    assert tokenizer("help", add_special_tokens=False).input_ids == [VOCABULARY.index(t) for t in ("he", "l", "p")]
    assert tokenizer.eos_token == "</s>"
    model = AutoModelForCausalLM.from_pretrained(converted, dtype="float32")
    reference = tiny()
    reference.load_state_dict({name: rounded(tensor).float() for name, tensor in reference.state_dict().items()})
    tokens = torch.tensor([[1, 5, 9, 4, 20]])
    torch.testing.assert_close(model(tokens).logits, reference(tokens).logits)


def test_a_job_can_load_it(converted: Path) -> None:
    settings = LoadingSettings.model_validate({**default_values()["loading"], "device": "cpu", "dtypes": ["float32"]})
    loaded = load_model(converted, settings, lambda line: pytest.fail(line))
    assert loaded.end_tokens == {2}


def test_a_model_without_a_template_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny(), template=None)
    with pytest.raises(ImpossibleJobError, match="has no chat template"):
        convert(tmp_path / "tiny.gguf", tmp_path / "model")
    assert not (tmp_path / "model").exists()
