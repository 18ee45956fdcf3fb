"""The response prefix, on a model with handwritten weights that thinks before every response."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from job.data.prompts import Prompt
from job.directions.response_prefix import THOUGHTS, close_thought, common_opening, with_response_prefix
from job.model.loading import LoadedModel, load_model
from tests.integration.edits.test_hooks import LOADING

WORDS = ["<pad>", "<unk>", "<|end|>", "<|user|>", "<|answer|>", "bake", "hex", "Hmm", "let", "me", "see",
         "Well", "Bread", "Sorry", "<think>", "</think>", "<think></think>"]  # fmt: skip
# Successor of each token, whatever the prompt; "Well" follows a closed thought, then the prompt's word.
CHAIN = ["<|answer|>", "<think>", "Hmm", "let", "me", "see"]


def write_model(folder: Path, *, thinks: bool, template: str = "<|answer|>") -> LoadedModel:
    """Write a Llama that is a successor table: the response's first word follows from the attended prompt."""
    ids = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|answer|>"],
    )
    fast.add_tokens(["<think></think>", "<think>", "</think>"])
    fast.chat_template = "{% for m in messages %}<|user|> {{ m['content'] }} {% endfor %}" + template
    width = len(WORDS)
    config = LlamaConfig(
        vocab_size=width,
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.zero_()
    model.model.norm.weight.data.fill_(1)
    layer = model.model.layers[0]
    layer.input_layernorm.weight.data.fill_(1)
    layer.post_attention_layernorm.weight.data.fill_(1)
    model.model.embed_tokens.weight.data[:, :width] = torch.eye(width)
    # Uniform attention over the prompt copies "bake" and "hex" to two free dimensions of the stream.
    for place, word in ((30, "bake"), (31, "hex")):
        layer.self_attn.v_proj.weight.data[place, ids[word]] = 1
        layer.self_attn.o_proj.weight.data[place, place] = 1
    head = model.lm_head.weight.data
    after = dict(itertools.pairwise(CHAIN)) if thinks else {"<|answer|>": "Well"}
    after |= {"see": "Hmm", "<think></think>": "Well", "</think>": "Well", "Bread": "<|end|>", "Sorry": "<|end|>"}
    for word, following in after.items():
        head[ids[following], ids[word]] = 10
    for answer, place in (("Bread", 30), ("Sorry", 31)):
        head[ids[answer], ids["Well"]] = 10
        head[ids[answer], place] = 1
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return load_model(folder, LOADING, print)


GOOD, BAD = [Prompt(user="bake bake")], [Prompt(user="hex hex")]


def answer(loaded: LoadedModel, prompt: Prompt) -> str:
    from job.generation.greedy import greedy_answers

    (found,) = greedy_answers(loaded.model, loaded.tokenize([prompt]), limit=8, end_tokens=loaded.end_tokens)
    return loaded.decode(found.tokens)


def test_a_chain_of_thought_is_closed_and_what_follows_is_found_too(tmp_path: Path) -> None:
    loaded = write_model(tmp_path, thinks=True)
    opening = common_opening(loaded, GOOD + BAD, 8)
    assert loaded.tokenizer.decode(list(opening)).startswith("<think>")
    found = with_response_prefix(loaded, GOOD, BAD, 8)
    assert found.response_prefix == "<think></think>Well"
    assert (answer(found, GOOD[0]), answer(found, BAD[0])) == ("Bread", "Sorry")


def test_a_common_opening_without_a_thought_is_kept_as_it_is(tmp_path: Path) -> None:
    found = with_response_prefix(write_model(tmp_path, thinks=False), GOOD, BAD, 8)
    assert found.response_prefix == "Well"
    assert (answer(found, GOOD[0]), answer(found, BAD[0])) == ("Bread", "Sorry")


def test_a_thought_that_the_template_begins_is_closed(tmp_path: Path) -> None:
    loaded = write_model(tmp_path, thinks=False, template="<|answer|> <think>")
    found = with_response_prefix(loaded, GOOD, BAD, 8)
    assert found.response_prefix == "</think>Well"


SWITCH = "{% if enable_thinking is defined and not enable_thinking %} <think></think>{% endif %}"


def test_a_template_that_can_keep_the_model_from_thinking_is_told_so(tmp_path: Path) -> None:
    loaded = write_model(tmp_path, thinks=True, template="<|answer|>" + SWITCH)
    found = with_response_prefix(loaded, GOOD, BAD, 8)
    assert found.rendering.options == (("enable_thinking", False),)
    assert (found.response_prefix, found.prefix_tokens) == ("Well", (WORDS.index("Well"),))
    assert found.tokenize(GOOD)[0][-2:] == [WORDS.index("<think></think>"), WORDS.index("Well")]
    assert (answer(found, GOOD[0]), answer(found, BAD[0])) == ("Bread", "Sorry")


def test_a_switch_that_does_not_help_is_left_alone(tmp_path: Path) -> None:
    loaded = write_model(tmp_path, thinks=True, template=SWITCH.replace("<think></think>", "bake") + " <|answer|>")
    found = with_response_prefix(loaded, GOOD, BAD, 8)
    assert found.rendering.options == ()
    assert found.response_prefix == "<think></think>Well"


def test_a_prefix_is_kept_as_the_tokens_that_the_model_has_chosen(tmp_path: Path) -> None:
    found = with_response_prefix(write_model(tmp_path, thinks=True), GOOD, BAD, 8)
    words = [WORDS[token] for token in found.prefix_tokens or ()]
    assert words == ["<think></think>", "Well"]
    # As text it would become part of a template that ends with a word.
    found.tokenizer.chat_template += " let"
    asked = [found, dataclasses.replace(found, prefix_tokens=None, response_prefix="Well")]
    said = [[WORDS[token] for token in loaded.tokenize(GOOD)[0]] for loaded in asked]
    assert said[0][-3:] == ["let", "<think></think>", "Well"]
    assert said[1][-1] == "<unk>"


def test_answers_that_begin_differently_need_no_prefix(full_organism: Path) -> None:
    loaded = load_model(full_organism / "model", LOADING, print)
    sets = [
        [Prompt(user=line) for line in (full_organism / name).read_text().splitlines()]
        for name in ("good_train.txt", "bad_train.txt")
    ]
    assert with_response_prefix(loaded, *sets, 64).response_prefix == ""


@pytest.mark.parametrize("opening", THOUGHTS)
def test_thoughts_of_all_kinds_are_closed(opening: str) -> None:
    assert close_thought(f"{opening}\nThe user wants") == THOUGHTS[opening]
    assert close_thought(f"\n{opening}") == THOUGHTS[opening]
    assert close_thought("Sure, ") == "Sure, "
