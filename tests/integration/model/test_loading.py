"""Loading: dtypes are proven, damaged and unfit models are refused."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from job.architectures.tiny_model import empty_model
from job.errors import ImpossibleJobError, MachineError
from job.generation.forward import first_logits
from job.model.config_file import model_config
from job.model.loading import load_model, quieten_transformers, read_config
from job.model.safetensors_header import read_header
from job.model.user_files import object_of
from tests.helpers import loading

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def damage(folder: Path, change: object) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)  # type: ignore[operator]  # a function of the dictionary
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_dtypes_are_tried_in_order_until_one_generates(model_in_one_file: Path) -> None:
    assert load_model(model_in_one_file, loading("auto"), print).dtype == "float32"
    assert load_model(model_in_one_file, loading("bfloat16", "float32"), print).dtype == "bfloat16"

    def overflow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e30

    damage(model_in_one_file, overflow)  # fits float32 and bfloat16, is infinite in float16
    told: list[str] = []
    loaded = load_model(model_in_one_file, loading("float16", "float32"), told.append)
    assert loaded.dtype == "float32"
    assert len(told) == 1
    assert "float16" in told[0]


def test_nan_in_the_weights_is_told_by_tensor(model_in_one_file: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.self_attn.q_proj.weight"][0, 0] = float("nan")

    damage(model_in_one_file, spoil)
    with pytest.raises(ImpossibleJobError, match=r"weight model\.layers\.2\.self_attn\.q_proj\.weight"):
        load_model(model_in_one_file, loading("auto", "float32"), print)


def test_weights_that_do_not_fit_the_configuration(model_in_one_file: Path) -> None:
    damage(model_in_one_file, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ImpossibleJobError, match=r"missing keys: model\.norm\.weight"):
        load_model(model_in_one_file, loading("auto"), print)


@pytest.mark.parametrize("another", [True, False])
def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_named(model_in_one_file: Path, another: bool) -> None:
    file = model_in_one_file / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": True}))
    if not another:
        damage(model_in_one_file, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    held, reported = load_file(model_in_one_file / "model.safetensors"), []
    loaded = load_model(model_in_one_file, loading("auto"), reported.append)
    assert torch.equal(loaded.model.get_output_embeddings().weight, held[HEAD])
    assert [HEAD in line and "tie_word_embeddings" in line for line in reported] == [True] * another


def test_a_truncated_file(model_in_one_file: Path) -> None:
    data = (model_in_one_file / "model.safetensors").read_bytes()
    (model_in_one_file / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImpossibleJobError, match="cannot be loaded"):
        load_model(model_in_one_file, loading("auto"), print)


def test_a_tokenizer_without_a_chat_template(model_in_one_file: Path) -> None:
    (model_in_one_file / "chat_template.jinja").unlink()
    with pytest.raises(ImpossibleJobError, match="no chat template"):
        load_model(model_in_one_file, loading("auto"), print)


def test_a_folder_without_tokenizer(model_in_one_file: Path) -> None:
    (model_in_one_file / "tokenizer.json").unlink()
    with pytest.raises(ImpossibleJobError, match="no usable tokenizer"):
        load_model(model_in_one_file, loading("auto"), print)


def test_a_device_that_is_not_there(model_in_one_file: Path) -> None:
    with pytest.raises(MachineError, match="no device cuda:77"):
        load_model(model_in_one_file, loading("auto", device="cuda:77"), print)


def test_a_damaged_index(model_in_one_file: Path) -> None:
    (model_in_one_file / "model.safetensors").rename(
        model_in_one_file / "model-00001-of-00001.safetensors"
    )  # it would precede the index
    (model_in_one_file / "model.safetensors.index.json").write_text(json.dumps({"weight_map": 3}))
    with pytest.raises(ImpossibleJobError, match="is damaged"):
        load_model(model_in_one_file, loading("auto"), print)


def configure(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "_experts_implementation"])
@pytest.mark.parametrize("value", ["somebody/kernel", "flash_attention_2", "flex_attention", ["sdpa"]])
def test_a_config_names_no_code_to_fetch_or_compile(model_in_one_file: Path, name: str, value: object) -> None:
    """Regression: transformers fetched such a kernel, or the model was refused; flex took minutes to compile."""
    configure(model_in_one_file, **{name: value})
    config = read_config(model_in_one_file)
    assert (config._attn_implementation, config._experts_implementation) == (None, None)
    configure(model_in_one_file, **{name: "eager"})
    kept = read_config(model_in_one_file)
    assert "eager" in (kept._attn_implementation, kept._experts_implementation)
    assert load_model(model_in_one_file, loading("auto"), print).dtype == "float32"


def test_transformers_says_nothing_while_a_config_is_read(
    model_in_one_file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: its warnings about unusual values reached the terminal between the lines of a preflight."""
    for name in ("config.json", "generation_config.json"):
        file = model_in_one_file / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token_id": -1}))
    transformers_logging.set_verbosity_warning()
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [caplog.handler])
    empty_model(read_config(model_in_one_file))
    assert not caplog.messages


def test_of_a_generation_config_only_special_tokens_are_taken(model_in_one_file: Path) -> None:
    """Regression: a file's beams ended a chat with a traceback, and its penalties changed the responses."""
    end = load_model(model_in_one_file, loading("auto"), print).end_tokens
    file = model_in_one_file / "generation_config.json"
    said = json.loads(file.read_text()) | {"num_beams": 4, "repetition_penalty": 9.0, "cache_implementation": "static"}
    file.write_text(json.dumps(said))
    loaded = load_model(model_in_one_file, loading("auto"), print)
    found = loaded.model.generation_config
    assert (found.num_beams, found.repetition_penalty, found.cache_implementation) == (
        *(getattr(GenerationConfig(), name) for name in ("num_beams", "repetition_penalty")),
        None,
    )
    assert loaded.end_tokens == end


def test_a_config_with_labels_for_all_memory_is_refused(model_in_one_file: Path) -> None:
    """Regression: transformers made a name for each of a thousand million labels."""
    configure(model_in_one_file, num_labels=10**9)
    with pytest.raises(ImpossibleJobError, match="num_labels is 1000000000"):
        model_config(model_in_one_file)
    with pytest.raises(ImpossibleJobError, match="num_labels"):
        load_model(model_in_one_file, loading("auto"), print)


def test_advice_of_libraries_is_not_printed() -> None:
    """Regression: exporting an adapter on a CPU printed that a package for code from the Hub should be installed."""
    quieten_transformers()
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


def test_files_that_would_fill_the_memory_are_not_read(model_in_one_file: Path) -> None:
    weights, tokenizer = model_in_one_file / "model.safetensors", model_in_one_file / "tokenizer.json"
    weights.write_bytes((1 << 40).to_bytes(8, "little"))
    for file in (weights, tokenizer):
        os.truncate(file, 1 << 41)  # sparse
    with pytest.raises(ImpossibleJobError, match="its header has 1099511627776 bytes"):
        read_header(weights)
    with pytest.raises(ImpossibleJobError, match="more than 512 MiB"):
        object_of(tokenizer)


def test_the_head_reads_contiguous_inputs_where_a_prompts_last_position_is_kept(model_in_one_file: Path) -> None:
    """Regression: torch copied the head's weight once per prompt."""
    loaded, seen = load_model(model_in_one_file, loading("bfloat16"), print), list[torch.Tensor]()
    head = loaded.model.get_output_embeddings()
    assert head is not None
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    first_logits(loaded.model, [[5, 6, 7], [8, 9]])
    assert [tuple(one.shape[:2]) for one in seen] == [(2, 1)]
    assert seen[0].is_contiguous()
