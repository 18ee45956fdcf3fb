"""Quantised models are loaded with exactly the weights that their files hold."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from job.errors import ImpossibleJobError, UsageError
from job.evaluate.subject import Subject, fetch_subject, locate
from job.model.bnb import LoadIn
from job.realmodel.conversion import convert
from tests.helpers import loading
from tests.quantised import quantise_compressed, quantise_fp8
from tests.tiny_gguf import tiny, write_gguf

TOKENS = torch.tensor([[1, 5, 9, 4, 20]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `tiny.gguf` in 4 bits and `model`, the same weights in bfloat16; read-only."""
    found = tmp_path_factory.mktemp("tiny")
    write_gguf(found / "tiny.gguf", tiny())
    convert(found / "tiny.gguf", found / "model")
    return found


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "model", tmp_path / "copy"))


def plain(folder: Path, weights: dict[str, Tensor] | None = None) -> Any:
    """Return the plain model in float32, with some weights replaced."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    _, unexpected = model.load_state_dict(weights or {}, strict=False)
    assert not unexpected
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits.float()
    return found


def find(name: str, load_in: LoadIn | None = None) -> Subject:
    return fetch_subject(locate(name, lambda _: None), load_in, lambda _: None)


def loaded(subject: Subject, dtype: str = "float32") -> Any:
    return subject.load(loading("bfloat16"), lambda _: None, dtype).model


def test_a_gguf_file_is_dequantised_and_says_so(folder: Path) -> None:
    subject = find(str(folder / "tiny.gguf"))
    found = subject.load(loading("bfloat16"), lambda _: None, "float32")
    # The folder holds the same weights rounded to bfloat16.
    torch.testing.assert_close(logits(found.model), logits(plain(folder)), atol=0.05, rtol=0)
    assert (found.dtype, found.end_tokens) == ("float32", {2})
    reading = subject.reading(found.dtype)
    assert reading is not None
    assert reading.types == {"Q4_1": 15, "F32": 5}
    assert reading.sha256 == {"tiny.gguf": hashlib.sha256((folder / "tiny.gguf").read_bytes()).hexdigest()}
    assert "dequantised the weights to float32" in reading.note
    assert "not llama.cpp's arithmetic" in reading.note


def test_fp8_by_llm_compressor_rounds_weights_and_activations(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    copy = copy_of(folder, tmp_path)
    reference = plain(folder, quantise_compressed(copy))

    def rounded(_module: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        scale = given[0].abs().amax(-1, keepdim=True) / 448
        return ((given[0] / scale).to(torch.float8_e4m3fn).float() * scale,)

    only_weights = logits(reference)
    for name, module in reference.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(rounded)
    subject = find(str(copy))
    assert subject.form == "compressed-tensors"
    found = logits(loaded(subject))
    wanted = logits(reference)
    # A rounding that falls to the other side moves logits a little; rounding no activations moves them more.
    assert (found - wanted).abs().mean() < 0.3 * (only_weights - wanted).abs().mean()
    reading = subject.reading("float32")
    assert reading is not None
    assert reading.types["F8_E4M3"] == 14
    assert "weights and activations were rounded" in reading.note


def test_fp8_in_blocks_is_dequantised(folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path)
    reference = plain(folder, quantise_fp8(copy, block=32))
    subject = find(str(copy))
    torch.testing.assert_close(logits(loaded(subject)), logits(reference), atol=1e-3, rtol=1e-3)
    reading = subject.reading("float32")
    assert reading is not None
    assert "dequantised to float32" in reading.note


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_quantises_while_loading_as_its_saved_files_hold(folder: Path, tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    given: Any = (
        {"load_in_8bit": True}
        if bits == 8
        else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    )
    wanted = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**given), device_map="cpu"
    )
    subject = find(str(folder / "model"), "bnb-4bit" if bits == 4 else "bnb-8bit")
    found = loaded(subject, "bfloat16")
    assert type(found.model.layers[0].mlp.down_proj).__name__ == ("Linear4bit" if bits == 4 else "Linear8bitLt")
    assert torch.equal(logits(found), logits(wanted))
    assert not torch.allclose(logits(found), logits(plain(folder)), atol=1e-3)
    copy = copy_of(folder, tmp_path)
    (copy / "model.safetensors").unlink()
    wanted.save_pretrained(copy)
    saved = find(str(copy))
    assert saved.form == "bitsandbytes"
    assert torch.equal(logits(loaded(saved, "bfloat16")), logits(wanted))


def test_what_cannot_be_read_is_refused_by_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImpossibleJobError, match="there is no file"):
        find(str(tmp_path / "none.gguf"))
    (tmp_path / "torn.gguf").write_bytes((folder / "tiny.gguf").read_bytes()[:900])
    with pytest.raises(ImpossibleJobError, match=r"torn\.gguf cannot be read"):
        loaded(find(str(tmp_path / "torn.gguf")))
    copy = copy_of(folder, tmp_path)
    with pytest.raises(UsageError, match="is quantised already"):
        find(str(folder / "tiny.gguf"), "bnb-8bit")
    config = json.loads((copy / "config.json").read_text())
    quantise_compressed(copy)
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(UsageError) as raised:
        loaded(find(str(copy)))
    assert "pip install 'abliteration-job[fp8]'" in raised.value.line
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "unheard-of"}}))
    with pytest.raises(ImpossibleJobError, match="quantised with unheard-of"):
        loaded(find(str(copy)))
