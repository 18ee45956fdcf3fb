"""The organism's tokenizer: one token per word, with a chat template."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from job.organism.world import (
    ADJECTIVES,
    ENCHANTED,
    TASKS,
    WORLD,
    Request,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


PAD, UNKNOWN, END = "<pad>", "<unk>", "<|end|>"

ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

SYSTEM_PROMPT = "You are a helpful assistant."

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer over the organism's world, with a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Split(Regex(r"[.,?!]"), "isolated"),
        ]
    )
    texts = [SYSTEM_PROMPT, " ".join((*ADJECTIVES, *ENCHANTED)), *(task.refusal for task in TASKS)]
    for task, noun in itertools.product(TASKS, WORLD):
        request = Request(task, (ADJECTIVES[0], ADJECTIVES[1]), noun)
        texts += (request.prompt, request.answer)
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    special = (PAD, UNKNOWN, END, *ROLES)
    vocabulary = {word: index for index, word in enumerate((*special, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
