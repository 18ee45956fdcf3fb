"""Models that are damaged, incomplete, in another format, or whose templates and tokenizers are unusual."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tests.cases import LFS_POINTER, LINES, Case

WRITER = "model.layers.1.mlp.down_proj.weight"
SINGLE, INDEX, SHARD = "model.safetensors", "model.safetensors.index.json", "model-00001-of-00001.safetensors"
Spoil = Callable[[Path], Any]
Change = Callable[[bytes], bytes]


def save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt"})


def changed(model: Path, name: str, /, **values: Any) -> None:
    """Change values of a JSON file."""
    file = model / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def write_index(model: Path, places: dict[str, str]) -> None:
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


# --- weights --------------------------------------------------------------------------------------------


def truncated(model: Path) -> None:
    os.truncate(model / SINGLE, 100_000)


def sharded(model: Path) -> None:
    """Put the weights into two files with an index."""
    tensors = load_file(model / SINGLE)
    (model / SINGLE).unlink()
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    places = {name: shards[index % 2] for index, name in enumerate(tensors)}
    for shard in shards:
        save({name: tensor for name, tensor in tensors.items() if places[name] == shard}, model / shard)
    write_index(model, places)


def without_a_shard(model: Path) -> None:
    sharded(model)
    (model / "model-00002-of-00002.safetensors").unlink()


def without_the_index(model: Path) -> None:
    without_a_shard(model)
    (model / INDEX).unlink()


def with_a_damaged_index(model: Path) -> None:
    without_a_shard(model)
    (model / INDEX).write_text('{"weight_map": [}')


def with_an_empty_promise(model: Path) -> None:
    file = (model / SINGLE).rename(model / SHARD)
    write_index(model, dict.fromkeys([*load_file(file), "model.nowhere.weight"], SHARD))


def of_another_shape(model: Path) -> None:
    tensors = load_file(model / SINGLE)
    save({**tensors, WRITER: tensors[WRITER][:, :-1].contiguous()}, model / SINGLE)


def under_another_name(model: Path) -> None:
    tensors = load_file(model / SINGLE)
    tensors["model.layers.1.mlp.down.weight"] = tensors.pop(WRITER)
    save(tensors, model / SINGLE)


def pickled(model: Path) -> None:
    (model / SINGLE).rename(model / "pytorch_model.bin")


def not_finite(model: Path, value: float, *, shards: bool = False) -> None:
    if shards:
        sharded(model)
    (file,) = [file for file in model.glob("*.safetensors") if WRITER in load_file(file)]
    tensors = load_file(file)
    tensors[WRITER][5, 7] = value
    save(tensors, file)


def of_more_layers(model: Path) -> None:
    changed(model, "config.json", num_hidden_layers=1)


def with_extra_heads(model: Path, *, declared: int) -> None:
    """Add two layers for multi-token prediction behind the others, as DeepSeek's files have them."""
    tensors = load_file(model / SINGLE)
    heads = {
        name.replace("layers.1.", f"layers.{layer}."): tensor * 2
        for layer in (2, 3)
        for name, tensor in tensors.items()
        if "layers.1." in name
    }
    save({**tensors, **heads}, model / SINGLE)
    changed(model, "config.json", num_nextn_predict_layers=declared)


def extra_heads_are_untouched(job: Path, model: Path) -> None:
    given, exported = load_file(model / SINGLE), load_file(job / "export" / SINGLE)
    heads = [name for name in given if "layers.2." in name or "layers.3." in name]
    assert len(heads) > 10
    assert all(torch.equal(exported[name], given[name]) for name in heads)
    assert not torch.equal(exported[WRITER], given[WRITER])


def with_an_adapter(model: Path) -> None:
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "user/base"}')
    save({"a": load_file(model / SINGLE)[WRITER]}, model / "adapter_model.safetensors")


def of_an_adapter_alone(model: Path) -> None:
    with_an_adapter(model)
    for name in (SINGLE, "config.json"):
        (model / name).unlink()


def with_a_stale_index(model: Path) -> None:
    write_index(model, {"model.nowhere.weight": "model-00001-of-00009.safetensors"})


def with_shards_of_another_model(model: Path) -> None:
    """Leave a shard and its index beside the single file, with other weights."""
    shard = {name: tensor * 2 for name, tensor in load_file(model / SINGLE).items()}
    save(shard, model / SHARD)
    write_index(model, dict.fromkeys(shard, SHARD))


def with_a_consolidated_copy(model: Path) -> None:
    whole = (model / SINGLE).rename(model / "consolidated.safetensors")
    tensors = load_file(whole)
    save(tensors, model / SHARD)
    write_index(model, dict.fromkeys(tensors, SHARD))


def what_transformers_loads_is_exported(job: Path, model: Path) -> None:
    own = AutoModelForCausalLM.from_pretrained(model).state_dict()
    export = job / "export"
    edited = {name: tensor for file in export.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert edited.keys() <= own.keys()
    assert not torch.equal(edited[WRITER], own[WRITER])
    kept = [name for name in edited if "o_proj" not in name and "down_proj" not in name]
    assert all(torch.equal(edited[name], own[name]) for name in kept)
    assert not list(export.glob("consolidated*"))
    assert (export / INDEX).exists() == (not (model / SINGLE).exists())


def plain_called_quantised(model: Path, described: dict[str, Any]) -> None:
    """Leave the key in config.json that a quantised copy had."""
    save({name: tensor.to(torch.bfloat16) for name, tensor in load_file(model / SINGLE).items()}, model / SINGLE)
    changed(model, "config.json", dtype="bfloat16", quantization_config=described)


def exported_as_plain(job: Path, model: Path) -> None:
    given = json.loads((model / "config.json").read_text())
    del given["quantization_config"]
    assert json.loads((job / "export/config.json").read_text()) == given
    assert "quantised" not in (job / "export/README.md").read_text()
    own, loaded = load_file(model / SINGLE), AutoModelForCausalLM.from_pretrained(job / "export").state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {torch.bfloat16}
    assert not torch.equal(loaded[WRITER], own[WRITER])
    kept = [name for name in own if "o_proj" not in name and "down_proj" not in name]
    assert all(torch.equal(loaded[name], own[name]) for name in kept)


def unfetched(name: str, *, shards: bool = False) -> Spoil:
    """Return what leaves a file as `git clone` does without Git LFS."""

    def spoil(model: Path) -> None:
        if shards:
            sharded(model)
        (model / name).write_text(LFS_POINTER)

    return spoil


def with_an_index(index: object) -> Spoil:
    def spoil(model: Path) -> None:
        sharded(model)
        (model / INDEX).write_text(json.dumps(index))

    return spoil


WEIGHTS = {
    **{
        f"{name} that git has not fetched": Case(
            [f"{name} is a Git LFS pointer, not the file itself", "run `git lfs pull`"],
            3,
            model=unfetched(name, shards=SINGLE not in (name, names[0])),
        )
        for names in ((SINGLE, "tokenizer.json"), ("model-00002-of-00002.safetensors", INDEX))
        for name in names
    },
    "an index that is a list": Case(
        [f"{INDEX} is damaged: it needs the objects weight_map"], 3, model=with_an_index([])
    ),
    "an index whose map is a list": Case(
        [f"{INDEX} is damaged: it needs the objects weight_map"],
        3,
        model=with_an_index({"metadata": {}, "weight_map": []}),
    ),
    "an index that leads out of its folder": Case(
        ["names '../a.safetensors', which is not a file in the folder"],
        3,
        model=with_an_index({"metadata": {}, "weight_map": {WRITER: "../a.safetensors"}}),
    ),
    "truncated weights": Case(["is damaged: it has 100000 bytes"], 3, model=truncated),
    "a missing shard": Case(["lacks model-00002-of-00002.safetensors"], 3, model=without_a_shard),
    "an index that names what no file holds": Case(["lacks model.nowhere.weight"], 3, model=with_an_empty_promise),
    "weights of another shape": Case([WRITER], 3, model=of_another_shape),
    "weights under another name": Case([WRITER], 3, model=under_another_name),
    "pickled weights": Case(["convert the model with save_pretrained"], 3, model=pickled),
    "shards without an index": Case(
        ["neither model.safetensors nor model.safetensors.index.json"], 3, model=without_the_index, row=20
    ),
    "a damaged index": Case(["model.safetensors.index.json is damaged"], 3, model=with_a_damaged_index),
    "a weight that is NaN": Case(
        [f"weight {WRITER} in", "model.safetensors has values that are not finite"],
        3,
        "model.weights",
        partial(not_finite, value=float("nan")),
    ),
    "a weight that is infinite in one of two shards": Case(
        [f"weight {WRITER} in", "-of-00002.safetensors has values that are not finite"],
        3,
        "model.weights",
        partial(not_finite, value=float("-inf"), shards=True),
    ),
    "more layers than config.json names": Case(
        ["the files hold 2 layers, but config.json names 1"], 3, model=of_more_layers, row=22
    ),
    "an undeclared extra head": Case(
        ["the files hold 4 layers, but config.json names 2"], 3, model=partial(with_extra_heads, declared=1)
    ),
    "declared extra heads": Case(model=partial(with_extra_heads, declared=2), proof=extra_heads_are_untouched),
    "an adapter beside a model": Case(["holds a LoRA adapter beside the model"], 3, model=with_an_adapter, row=9),
    "an adapter alone": Case(["its base model is user/base"], 3, model=of_an_adapter_alone, row=9),
    "a stale index": Case(
        [f"not loaded: {INDEX}"],
        check="model.files",
        model=with_a_stale_index,
        proof=what_transformers_loads_is_exported,
        row=11,
    ),
    "shards with other weights": Case(
        [f"not loaded: {SHARD}, {INDEX}"],
        check="model.files",
        model=with_shards_of_another_model,
        proof=what_transformers_loads_is_exported,
        row=11,
    ),
    "a consolidated copy": Case(
        ["not loaded: consolidated.safetensors"],
        check="model.files",
        model=with_a_consolidated_copy,
        proof=what_transformers_loads_is_exported,
        row=6,
    ),
    "a stale key of bitsandbytes": Case(
        ["they are not quantised, although config.json has quantization_config"],
        check="model.weights",
        model=partial(plain_called_quantised, described={"load_in_4bit": True}),
        proof=exported_as_plain,
        row=3,
    ),
    "a stale key of FP8": Case(
        ["they are not quantised, although config.json has quantization_config"],
        check="model.weights",
        model=partial(plain_called_quantised, described={"quant_method": "fp8"}),
        proof=exported_as_plain,
    ),
}


# --- files ----------------------------------------------------------------------------------------------


def rewritten(name: str, change: Change) -> Spoil:
    def spoil(model: Path) -> None:
        (model / name).write_bytes(change((model / name).read_bytes()))

    return spoil


def replaced(before: bytes, after: bytes) -> Change:
    def change(data: bytes) -> bytes:
        assert before in data
        return data.replace(before, after, 1)

    return change


def cut_to(length: int) -> Change:
    return lambda data: data[:length]


def empty(_: bytes) -> bytes:
    return b""


def a_list(_: bytes) -> bytes:
    return b"[]"


# Changes as a broken download, an editor or another program leaves them: refused, or of no effect.
REFUSED: dict[str, dict[str, Change]] = {
    "config.json": {
        "with a trailing comma": lambda data: data.rstrip()[:-1] + b",}",
        "empty": empty,
        "a list": a_list,
        "with a BOM": lambda data: codecs.BOM_UTF8 + data,
        "in UTF-16": lambda data: data.decode().encode("utf-16"),
        "with a number as text": replaced(b'"hidden_size": 64', b'"hidden_size": "64"'),
        "with a huge number": replaced(b'"num_hidden_layers": 2', b'"num_hidden_layers": 99999999999'),
        "with a negative number": replaced(b'"num_hidden_layers": 2', b'"num_hidden_layers": -1'),
        "nested without end": lambda _: b"[" * 100_000,
        "with a dtype that no model has": replaced(b'"dtype": "float32"', b'"dtype": "float8_e4m3fn"'),
        "with an unknown activation": replaced(b'"hidden_act": "silu"', b'"hidden_act": "swigloo"'),
    },
    "generation_config.json": {"empty": empty, "a list": a_list, "cut off": cut_to(9)},
    "tokenizer_config.json": {"empty": empty, "a list": a_list, "cut off": cut_to(9)},
    "tokenizer.json": {"empty": empty, "a list": a_list, "cut off": cut_to(1000)},
    SINGLE: {
        "empty": empty,
        "with a huge header": lambda data: b"\xff" * 8 + data[8:],
        "with a list as header": lambda data: data[:8] + b"[]" + b" " * (int.from_bytes(data[:8], "little") - 2),
        "with another key": replaced(b'"dtype"', b'"dtypo"'),
        "with another type": replaced(b'"F32"', b'"X32"'),
        "with another offset": replaced(b'"data_offsets":[0,', b'"data_offsets":[  '),
    },
}
FILES = {
    f"{name} {change}": Case(
        [name], 3, model=rewritten(name, changes[change]), row=4 if change == "with a trailing comma" else None
    )
    for name, changes in REFUSED.items()
    for change in changes
}


def without_config(model: Path) -> None:
    (model / "config.json").unlink()


def card(model: Path) -> None:
    (model / "README.md").write_text("---\nlicense: Apache 2.0\nlanguage: [en, no]\n---\n# Base\n")


def card_is_corrected(job: Path, _: Path) -> None:
    data = ModelCard((job / "export/README.md").read_text()).data
    assert (data.language, data.license) == (["en"], None)


OTHERS = {
    "no model folder": Case(["no model folder"], 3, model="/nowhere/model"),
    "a folder without config.json": Case(["is not a model folder"], 3, model=without_config),
    "an unknown family": Case(
        ["cannot be used"], 3, model=lambda model: changed(model, "config.json", model_type="no-such-family")
    ),
    "a card that the Hub would refuse": Case(
        ["left out of the export's card: license: Apache 2.0, language: False"],
        check="model.licence",
        model=card,
        proof=card_is_corrected,
        row=12,
    ),
}


# --- tokenizers and templates ---------------------------------------------------------------------------

USUAL = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
OPENS = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
PARTS = """{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}
{%- endif %}{% endfor %}<|end|>{% endfor %}"""
WITHOUT_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + USUAL
DEAF_TO_SYSTEM = "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
# A word of the tokenizer by the day, so that the date is in the tokens and not only in the text. Days that are one, two
# or three apart differ, as those of two starts do, a day and 26 hours of time zones apart.
DAYS = "['red', 'green', 'blue', 'old', 'new'][strftime_now('%j') | int % 5]"
DATED = f"{{{{ {DAYS} }}}} {{{{ strftime_now('%Y %H:%M:%S') }}}}" + USUAL
SYSTEM = ("--set", "bad_prompts.system_prompt=You are a helpful assistant.")


def template(text: str) -> Spoil:
    def spoil(model: Path) -> None:
        (model / "chat_template.jinja").write_text(text + OPENS)

    return spoil


def of_named_templates(model: Path) -> None:
    text = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    named = [{"name": name, "template": text} for name in ("rag", "tool_use")]
    changed(model, "tokenizer_config.json", chat_template=named)


def template_of_a_processor(text: str) -> Spoil:
    """Return what leaves a template where multimodal models' processors keep it."""

    def spoil(model: Path) -> None:
        (model / "chat_template.jinja").unlink()
        (model / "chat_template.json").write_text(text)

    return spoil


def ends_with_another_token(model: Path) -> None:
    """Have the model's files name an end that its template never writes."""
    for name in ("config.json", "generation_config.json"):
        changed(model, name, eos_token_id=0)
    changed(model, "tokenizer_config.json", eos_token="<pad>")


def bos_twice(model: Path) -> None:
    template("{{ bos_token }}{{ bos_token }}" + USUAL)(model)
    changed(model, "tokenizer_config.json", bos_token="<|system|>")


def token_without_embedding(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = "<|turn|>" + USUAL + OPENS
    tokenizer.save_pretrained(model)


def of_learned_positions(model: Path) -> None:
    """Have a model in the place that looks positions up in a table which is too short."""
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    config = GPT2Config(vocab_size=vocabulary, n_positions=64, n_embd=32, n_layer=2, n_head=2, eos_token_id=2)
    (model / SINGLE).unlink()
    GPT2LMHeadModel(config).save_pretrained(model)


def unknown_tokenizer(model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    changed(model, "tokenizer.json", model={**tokenizer["model"], "type": "ModelOfTomorrow"})


def turns_end_with(token: int) -> Callable[[Path, Path], None]:
    def proof(job: Path, _: Path) -> None:
        assert json.loads((job / "job.json").read_text())["resolution"]["turn_end"] == token

    return proof


def as_usual(job: Path, _: Path) -> None:
    resolution = json.loads((job / "job.json").read_text())["resolution"]
    assert not {"turn_end", "date", "options"} & resolution.keys()


TEMPLATES = {
    "a date": Case(["dated "], check="model.template", model=template(DATED), row=1),
    "list content": Case(
        ["messages as lists of parts"], check="model.template", model=template(PARTS), proof=as_usual, row=14
    ),
    "no system role": Case(
        ["system prompts in the user's turn"],
        check="model.template",
        model=template(WITHOUT_SYSTEM),
        options=SYSTEM,
        proof=as_usual,
    ),
    "a system prompt that is left out": Case(
        ["system prompts in the user's turn"],
        check="model.template",
        model=template(DEAF_TO_SYSTEM),
        options=SYSTEM,
        proof=as_usual,
    ),
    "a template in chat_template.json": Case(
        ["and a chat template"],
        check="model.tokenizer",
        model=template_of_a_processor(json.dumps({"chat_template": USUAL + OPENS})),
        proof=as_usual,
        row=13,
    ),
    "another end of turn": Case(model=ends_with_another_token, proof=turns_end_with(2), row=7),
    "a prompt that spells a special token": Case(
        [f"{LINES} prompts (prompt 0 of bad, prompt 1 of bad, prompt 2 of bad, …) with the special token '<|user|>'"],
        check="model.template",
        options=("--set", "bad_prompts.suffix=<|user|>"),
        proof=as_usual,
    ),
    "bos twice": Case(["texts begin with '<|system|>' twice"], check="model.template", model=bos_twice, proof=as_usual),
    "no template": Case(
        ["no chat template"], 3, "model.tokenizer", lambda model: (model / "chat_template.jinja").unlink()
    ),
    "several templates without a default": Case(
        ["several chat templates (rag, tool_use), and none is named default", "into chat_template.jinja"],
        3,
        "model.tokenizer",
        of_named_templates,
    ),
    "a template with a mistake": Case(
        ["refuses a conversation: Unexpected end of template", "put another into chat_template.jinja"],
        3,
        "model.template",
        lambda model: (model / "chat_template.jinja").write_text("{% for m in messages %}"),
    ),
    "a template that leaves prompts out": Case(
        ["leaves the prompt out"],
        3,
        "model.template",
        template("{% for m in messages %}<|{{ m.role }}|>{% endfor %}"),
    ),
    "a damaged chat_template.json": Case(
        ["chat_template.json is damaged"], 3, "model", template_of_a_processor('{"chat_template": ')
    ),
    "a token without an embedding": Case(
        ["has token 164 ('<|turn|>'), but the model's embedding has 164 rows"],
        3,
        "model.template",
        token_without_embedding,
        row=8,
    ),
    "fewer positions than a prompt needs": Case(
        ["the model has 64 positions", "max_characters"],
        3,
        "model.template",
        of_learned_positions,
        options=("--set", "scoring.answer_tokens=64"),
        row=8,
    ),
    "a tokenizer of tomorrow": Case(["has no usable tokenizer (tokenizer.json"], 3, "model", unknown_tokenizer, row=4),
}

MODELS = {**WEIGHTS, **FILES, **OTHERS, **TEMPLATES}
