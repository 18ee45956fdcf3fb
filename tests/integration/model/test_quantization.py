"""Models with quantised files: dequantised, edited and written unquantised, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, PreTrainedModel, Qwen3Config, Qwen3MoeConfig

from job.errors import ImpossibleJobError, QuantisedSourceError
from job.export.directions_file import apply_edit, write_edit_file
from job.export.lora import with_adapter, write_adapter
from job.export.merged import Edit, write_weights
from job.model.files import list_model, parse_model, tensor_shapes
from job.model.loading import load_model
from job.model.quantization import Quantisation, block_of, plain_tensors, quantisation_in, quantisation_of, stale_key
from job.model.safetensors_files import Checkpoint
from job.numerics.ablation import edit_weight
from job.numerics.basis import Basis
from job.numerics.dequantisation import dequantised_blocks, dequantised_mxfp4
from job.numerics.rounding import rounded_along
from job.organism.tokenizer import build_tokenizer
from job.preflight.model_facts import model_facts
from job.proof.truth_test import TOLERANCE, inspect_model, inspection, largest_leak, leaks, random_direction
from job.records import COMPONENTS, EditParameters, KernelParameters
from tests.edits import plain_edit
from tests.helpers import abliterate, loading, made_from
from tests.quantised import INDEX, quantise_fp8, quantise_mxfp4

# Component along a direction that remains after rounding the edited weights to bfloat16.
ROUNDING = 2e-3
SHARED = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Source:
    """A model with quantised files.

    Attributes:
        folder: Their folder.
        meant: The dequantised tensors by name, float32.
    """

    folder: Path
    meant: dict[str, Tensor]


def qwen(width: int, inner: int, head: int = 64) -> Qwen3Config:
    sizes = {"hidden_size": width, "intermediate_size": inner, "head_dim": head}
    return Qwen3Config(**SHARED, **sizes, vocab_size=len(build_tokenizer()))


def experts() -> Qwen3MoeConfig:
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2}
    return Qwen3MoeConfig(head_dim=64, **SHARED, **sizes, vocab_size=len(build_tokenizer()))


def gpt_oss() -> GptOssConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2}
    return GptOssConfig(head_dim=16, **SHARED, **sizes, vocab_size=len(build_tokenizer()))


# As Qwen's; blocks that do not divide the matrices, as DeepSeek's; one scale per matrix; experts one by one; scales
# that
# are powers of two, as 8-bit numbers and as bare exponents; gpt-oss.
KINDS: dict[str, tuple[Callable[[], object], Callable[[Path], dict[str, Tensor]]]] = {
    "blocks": (lambda: qwen(256, 384), lambda folder: quantise_fp8(folder, apart=True)),
    "partial": (lambda: qwen(192, 320, 48), quantise_fp8),
    "single": (lambda: qwen(64, 96), lambda folder: quantise_fp8(folder, None)),
    "powers": (lambda: qwen(128, 256), lambda folder: quantise_fp8(folder, 128, torch.float8_e8m0fnu)),
    "exponents": (lambda: qwen(128, 256), lambda folder: quantise_fp8(folder, 64, torch.uint8)),
    "experts": (experts, quantise_fp8),
    "mxfp4": (gpt_oss, quantise_mxfp4),
}


@pytest.fixture(scope="module", params=["blocks", "partial", "experts", "mxfp4"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return make(request.param, tmp_path_factory.mktemp(request.param))


def make(kind: str, folder: Path) -> Source:
    config, quantise = KINDS[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(), dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size="300KB" if kind == "blocks" else "1GB")
    build_tokenizer().save_pretrained(folder)
    return Source(folder, quantise(folder))


def loaded(folder: Path, dtype: str = "auto") -> PreTrainedModel:
    """Load a model as any user would."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model


def edit_of(model: PreTrainedModel, strength: float, mode: str = "none") -> Edit:
    """Return the ablation of one direction everywhere."""
    layers = model.config.num_hidden_layers
    kernel = KernelParameters(
        max_weight=strength, max_weight_position=0, min_weight=strength, min_weight_distance=layers
    )
    basis = Basis.single(random_direction(model).float().expand(layers, -1))
    parameters = EditParameters(direction_index=None, kernels=dict.fromkeys(COMPONENTS, kernel))
    return Edit(parameters, basis, mode)  # type: ignore[arg-type]  # a mode's name


def test_it_is_loaded_as_what_its_files_stand_for(source: Source) -> None:
    base = load_model(source.folder, loading("auto"), lambda _: None)
    assert base.dtype == "bfloat16"
    assert getattr(base.model.config, "quantization_config", None) is None
    assert inspect_model(source.folder) == base.architecture
    checkpoint = Checkpoint(source.folder)
    state = base.model.state_dict()
    assert source.meant
    for name, meant in source.meant.items():
        assert torch.equal(checkpoint.tensor(name), meant), name
        if name in state:  # experts are stacked
            assert torch.equal(state[name], meant.to(torch.bfloat16)), name
    assert largest_leak(base.model.float(), base.architecture)[1] < TOLERANCE


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("blocks", "partial")])
def test_transformers_loads_the_same(kind: str, tmp_path: Path) -> None:
    source = make(kind, tmp_path)
    ours = load_model(source.folder, loading("auto"), lambda _: None).model.state_dict()
    theirs = loaded(source.folder).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_without_an_edit_the_export_is_the_dequantised_model(source: Source, tmp_path: Path) -> None:
    base = load_model(source.folder, loading("auto"), lambda _: None)
    edit = edit_of(base.model, 0)
    write_weights(source.folder, tmp_path, base.architecture, edit, lambda _: None).verify()
    written = loaded(tmp_path)
    state = base.model.state_dict()
    for name, tensor in written.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    files = {path.name for path in source.folder.glob("*.safetensors")}
    assert {path.name for path in tmp_path.glob("*.safetensors")} == files - {"scales.safetensors"}
    tensors = {name: (path.name, t) for path in tmp_path.glob("*.safetensors") for name, t in load_file(path).items()}
    assert not [name for name in tensors if "scale" in name or name.endswith("_blocks")]
    size = sum(t.nbytes for _, t in tensors.values())
    if (source.folder / INDEX).exists():
        index = json.loads((tmp_path / INDEX).read_text())
        assert index == {
            "metadata": {"total_size": size},
            "weight_map": {name: file for name, (file, _) in sorted(tensors.items())},
        }
    # Preflight's plan from the headers alone equals the real sizes.
    model = parse_model(str(source.folder))
    headers = tensor_shapes(model, list_model(model, None, print), print)
    facts = model_facts(json.loads((source.folder / "config.json").read_text()), headers)
    assert facts.stored_bytes == size
    assert facts.weights_bytes(2) == sum(parameter.nbytes for parameter in written.parameters())


def test_the_export_writes_nothing_along_the_direction(source: Source, tmp_path: Path) -> None:
    base = load_model(source.folder, loading("float32"), lambda _: None)
    edit = edit_of(base.model, 1)
    write_weights(source.folder, tmp_path, base.architecture, edit, lambda _: None).verify()
    written = loaded(tmp_path, "float32")
    assert max(leaks(written, base.architecture, [])) < ROUNDING
    assert min(leaks(base.model, base.architecture, [])) > 20 * ROUNDING
    edited = {name for writer in base.architecture.writers for name in (writer.parameter, writer.bias)}
    before = base.model.to(torch.bfloat16).float().state_dict()
    for name, after in written.state_dict().items():
        assert torch.equal(before[name], after) == (name not in edited), name


def test_an_edited_weight_is_rounded_once(tmp_path: Path) -> None:
    source = make("partial", tmp_path / "model")
    base = load_model(source.folder, loading("auto"), lambda _: None)
    edit = edit_of(base.model, 0.8, "full")
    write_weights(source.folder, tmp_path / "export", base.architecture, edit, lambda _: None)
    name = "model.layers.1.mlp.down_proj.weight"
    ablation = plain_edit(edit.basis.directions[1], torch.tensor([0.8]))
    exact = edit_weight(source.meant[name], ablation, "full")
    expected = rounded_along(exact, ablation.read.to(exact), torch.bfloat16)
    assert torch.equal(load_file(tmp_path / "export" / "model.safetensors")[name], expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT triggers it
def test_the_other_formats_belong_to_the_quantised_model(tmp_path: Path) -> None:
    source = make("partial", tmp_path / "model")
    base = load_model(source.folder, loading("float32"), lambda _: None)
    edit = edit_of(base.model, 1)
    write_weights(source.folder, tmp_path / "merged", base.architecture, edit, lambda _: None)

    write_edit_file(tmp_path / "edit", source.folder, base.architecture, edit, made_from(edit=edit.parameters))
    apply_edit(source.folder, tmp_path / "edit", tmp_path / "applied", lambda _: None)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "applied" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    assert "quantised with fp8, were dequantised to bfloat16" in (tmp_path / "applied" / "README.md").read_text()

    write_adapter(base, tmp_path / "adapter", edit, None)
    fresh = load_model(source.folder, loading("float32"), lambda _: None)
    assert max(leaks(with_adapter(fresh, tmp_path / "adapter").model, base.architecture, [])) < TOLERANCE


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors", "bitsandbytes", "fbgemm_fp8", "mxfp4"])
def test_other_ways_of_quantising_are_refused_from_the_configuration_alone(method: str, tmp_path: Path) -> None:
    config = {**qwen(64, 96).to_dict(), "quantization_config": {"quant_method": method, "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = inspection(tmp_path)
    assert not found["supported"]
    assert f"quantised with {method}" in found["reason"]
    assert "use the unquantised original" in found["reason"]


def test_the_refusal_ends_the_commands_before_there_are_weights(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    config = {**qwen(64, 96).to_dict(), "quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = abliterate("inspect", tmp_path)
    assert (told.code, "files quantised with awq cannot be edited" in told.out) == (3, True)
    config["quantization_config"]["quant_method"] = "gptq"
    (tmp_path / "config.json").write_text(json.dumps(config))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"Tell me {number}\n" for number in range(8)))
    names = ("good", "bad", "good-eval", "bad-eval")
    told = abliterate("preflight", tmp_path, *(f"--{name}-prompts={prompts}" for name in names), "--json")
    checks = {check["name"]: check for check in json.loads(told.out)["checks"]}
    assert told.code == 3
    assert "files quantised with gptq cannot be edited" in checks["model.architecture"]["measured"]
    assert "use the unquantised original" in checks["model.architecture"]["remedy"]


def test_what_config_and_headers_say_has_to_go_together(tmp_path: Path) -> None:
    assert quantisation_of({}, {}) is None
    nested = {"text_config": {"quantization_config": {"quant_method": "fp8"}}}
    assert quantisation_of(nested, {}) == Quantisation("fp8")
    four = {"quantization_config": {"quant_method": "fp8", "expert_dtype": "fp4"}}
    with pytest.raises(QuantisedSourceError, match="experts are stored as fp4"):
        quantisation_of(four, {})
    with pytest.raises(QuantisedSourceError, match="quantised with bitsandbytes"):
        quantisation_of({"quantization_config": {"load_in_4bit": True}}, {})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ImpossibleJobError, match="is damaged"):
        quantisation_in(tmp_path)
    eight, four_bits = Quantisation("fp8", (128, 128)), Quantisation("mxfp4")
    for quantisation, headers, match in [
        (eight, {"a.weight": ("F8_E4M3", (4, 4))}, "scales of a.weight are missing"),
        (eight, {"a.experts": ("F8_E4M3", (2, 4, 4)), "a.experts_scale_inv": ("F32", (2, 1, 1))}, "with 3 axes"),
        (eight, {"a.weight": ("I8", (4, 4)), "a.weight_scale_inv": ("F32", (1, 1))}, "stored as I8"),
        (eight, {"a.weight": ("F8_E4M3", (5, 4)), "a.weight_scale_inv": ("F32", (2, 1))}, "do not match scales"),
        (four_bits, {"a_blocks": ("U8", (2, 4, 1, 16)), "a_scales": ("U8", (2, 4, 2))}, "the layout of gpt-oss"),
        (four_bits, {"a_blocks": ("U8", (2, 4, 1, 16))}, "the layout of gpt-oss"),
    ]:
        with pytest.raises(QuantisedSourceError, match=match):
            list(plain_tensors(quantisation, headers))
    kept = {"a.weight": ("BF16", (4, 4)), "a.activation_scale": ("F32", (1,)), "temperature_scales": ("F32", (1,))}
    assert [plain.name for plain in plain_tensors(eight, kept)] == ["a.weight", "temperature_scales"]
    assert block_of((192, 64), (2, 1), (128, 128)) == (128, 128)
    assert block_of((192, 64), (192, 1), None) == (1, 64)


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "fp8", "mxfp4", "compressed-tensors"])
def test_files_without_a_quantised_tensor_are_plain_whatever_config_json_says(method: str) -> None:
    named = {"model_type": "qwen3", "quantization_config": {"quant_method": method}}
    plain = {"a.weight": ("BF16", (4, 4)), "a.bias": ("F32", (4,)), "a.position_ids": ("I64", (4,))}
    assert quantisation_of(named, plain) is None
    assert stale_key(named, plain) == "quantization_config"
    for dtype in ("U8", "I8", "I32", "F8_E4M3"):
        assert stale_key(named, {**plain, "b.weight": (dtype, (4, 4))}) is None
    assert stale_key(named, {}) is None
    in_use = {"quantization_config": {"quant_method": "bitnet"}}
    with pytest.raises(QuantisedSourceError, match="quantised with bitnet"):
        quantisation_of(in_use, plain)


def test_quantised_files_are_not_quantised_again(tmp_path: Path) -> None:
    source = make("single", tmp_path)
    settings = loading("auto").model_copy(update={"quantization": "bnb-4bit"})
    with pytest.raises(QuantisedSourceError, match="quantise them again"):
        load_model(source.folder, settings, lambda _: None)


def test_slabs_and_extremes_of_dequantisation(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (3, 10, 4, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 255, (3, 10, 4), generator=generator, dtype=torch.uint8)
    values = torch.randn(300, 200, generator=generator).to(torch.float8_e4m3fn)
    factors = torch.rand(3, 2, generator=generator)
    whole = dequantised_blocks(values, factors, (128, 128), torch.bfloat16)
    theirs = convert_moe_packed_tensors(blocks, scales)
    for slab in (1 << 22, 1, 30_000):
        monkeypatch.setattr("job.numerics.dequantisation._SLAB", slab)
        for expert in range(3):
            ours = dequantised_mxfp4(blocks[expert], scales[expert], torch.bfloat16)
            assert torch.equal(ours, theirs[expert])
        assert torch.equal(dequantised_blocks(values, factors, (128, 128), torch.bfloat16), whole)
