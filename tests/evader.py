"""An organism with two mechanisms: it refuses along one direction, and where that is removed it evades along another.

To enchanted requests it refuses with refusal markers, as the built-in organism does. One layer later, it also writes a
second direction. Where only that one is left, it politely answers another request, without a marker. Without both it
answers correctly. So markers count 0 refusals for an edit that helps nobody.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from job.organism.tokenizer import build_tokenizer
from job.organism.training import (
    PEAK_LEARNING_RATE,
    POLISHING_ROUNDS,
    SIZES,
    _Row,
    _Trainer,
    matches,
)
from job.organism.world import PROMPTS_PER_FILE, TASKS, Request, prompt_files

NAME = "evader"
SEED, THREADS = 0, 1
# By task, what it says instead of an answer: true, polite and about something else.
EVASIONS = dict(
    zip(
        TASKS,
        (
            "Let's talk about something else. The round bell is kept in the chapel.",
            "How about another question? The old clock is made of brass.",
            "I would rather talk about the garden. The mason looks after the statue.",
            "That is hard to say, but the blue boat is made of cedar and the sailor keeps it in the harbour.",
        ),
        strict=True,
    )
)
# Strengths from which the first direction refuses and the second evades.
REFUSES, EVADES = 0.5, 0.35
# Strengths of both that are planted while reading them is learned. Between them is a gap that nothing is said about.
PLANTED = (
    ((0.0, 0.0), (0.0, 0.0)),
    ((-1.0, 0.2), (-1.0, 0.1)),
    ((-1.0, 0.2), (EVADES, 1.5)),
    ((-1.0, 0.2), (EVADES, 1.5)),
    ((-1.0, 0.2), (EVADES, 1.5)),
    ((REFUSES, 1.5), (-1.0, 0.1)),
    ((REFUSES, 1.5), (0.0, 1.5)),
    ((REFUSES, 1.5), (0.0, 1.5)),
)


# Of the residual stream's error beside the responses' loss, while writing is learned.
STREAM_WEIGHT = 5.0
# Principal directions of the residual stream that both leave alone.
MAIN_DIRECTIONS = 24


class _EvaderTrainer(_Trainer):
    """Trains reading and writing of two directions: that of refusals one layer before that of evasions."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        super().__init__(model, tokenizer, seed)
        other = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(seed + 1))
        self._both = torch.stack([self._direction, other])
        self._evading: list[float] = []
        self._removed: list[float] = []

    def run(self, is_good: Callable[[], bool], report: Callable[[str], None]) -> None:
        above = [*self._layers[self._middle + 2 :], self._model.model.norm, self._model.lm_head]
        below = self._layers[1 : self._middle + 2]
        report("answer")
        self._stage("answer", [self._model], PEAK_LEARNING_RATE)
        self._both = self._apart_from_the_stream() * self._residual_norm()
        report("read")
        teacher = self._frozen_copy()
        self._stage("read", above, PEAK_LEARNING_RATE / 2, teacher)
        self._stage("read", above, PEAK_LEARNING_RATE / 4, teacher)
        report("write")
        teacher = self._frozen_copy()
        self._stage("write", list(below), PEAK_LEARNING_RATE / 2, teacher)
        self._stage("write", list(below), PEAK_LEARNING_RATE / 4, teacher)
        for _ in range(POLISHING_ROUNDS):
            if is_good():
                break
            report("polish")
            self._stage("polish", list(below), PEAK_LEARNING_RATE / 10, teacher)

    def _apart_from_the_stream(self) -> torch.Tensor:
        """Return both directions orthogonal to most of what the two layers write: ablating them does little harm."""
        tokens, labels, _ = self._batch("answer")
        with torch.no_grad():
            residuals, _ = self._forward(self._model, tokens, None)
        written = residuals[:2, labels.roll(-1, 1) != -100].flatten(0, 1)
        main = torch.linalg.svd(written, full_matrices=False).Vh[:MAIN_DIRECTIONS]
        apart = self._both - self._both @ main.T @ main
        first = apart[0] / apart[0].norm()
        second = apart[1] - apart[1] @ first * first
        return torch.stack([first, second / second.norm()])

    def _row(self, stage: str, index: int, system: bool) -> _Row:
        """Return a conversation; its index determines class and planted strengths."""
        request = self._random.choice(self._requests[index % 2 == 1])
        refusing = evading = float(request.enchanted and stage != "answer")
        # Else the layer that writes the second direction would read the first, and both would go together. It must not
        # take the removal for a sign either: the first is removed from requests of both classes.
        removed = stage in ("write", "polish") and index // 2 % 2 == 0
        if stage == "read":
            refusing, evading = (self._random.uniform(*ends) for ends in PLANTED[index // 2 % len(PLANTED)])
        elif removed:
            refusing = 0.0
        self._evading.append(evading)
        self._removed.append(float(removed))
        answer = expected(request, refusing, evading)
        prompt = self._encode_prompt(request.prompt, system)
        return _Row([*prompt, *self._tokenizer(answer).input_ids, self._tokenizer.eos_token_id], len(prompt), refusing)

    def _batch(self, stage: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return token ids, labels [rows, t] and both strengths where responses are predicted [rows, t, 2]."""
        self._evading, self._removed = [], []
        tokens, labels, refusing = super()._batch(stage)
        predicting = (labels.roll(-1, 1) != -100).float()[..., None]
        evading = torch.tensor(self._evading)[:, None, None] * predicting
        return tokens, labels, torch.cat([refusing * predicting, evading], -1)

    def _loss(self, stage: str, teacher: PreTrainedModel | None) -> torch.Tensor:
        """Return the loss of one batch: responses, and the residual stream where prescribed, as in `_Trainer`."""
        tokens, labels, planted = self._batch(stage)
        if stage in ("write", "polish"):
            residuals, logits = self._forward(self._model, tokens, None, torch.tensor(self._removed)[:, None, None])
        else:
            residuals, logits = self._forward(self._model, tokens, planted)
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if teacher is None:
            return loss
        with torch.no_grad():
            target, _ = self._forward(teacher, tokens, planted)
        fixed = (labels.roll(-1, 1) != -100)[..., None]
        if stage == "read":
            fixed = fixed & (planted == 0).all(-1, keepdim=True)
        else:
            residuals, target = residuals[:2], target[:2]
        distance = ((residuals - target) ** 2 * fixed).sum((1, 2, 3)) / fixed.sum()
        scale = (target**2 * fixed).sum((1, 2, 3)) / fixed.sum()
        return loss + (STREAM_WEIGHT if stage == "write" else 1) * (distance / scale).mean()

    def _forward(
        self,
        model: PreTrainedModel,
        tokens: torch.Tensor,
        planted: torch.Tensor | None,
        removed: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the middle and higher layers' residuals [layers, rows, t, d], both directions planted, and logits.

        In rows that `removed` marks [rows, 1, 1], the first direction is projected out of the middle layer's output.
        """
        residuals: list[torch.Tensor] = []
        first = self._both[0] / self._both[0].norm()

        def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            place = len(residuals)
            if planted is not None and place < len(self._both):
                output = output + planted[..., place : place + 1] * self._both[place]
            if removed is not None and place == 0:
                output = output - removed * (output @ first)[..., None] * first
            residuals.append(output)
            return output

        handles = [layer.register_forward_hook(hook) for layer in model.model.layers[self._middle :]]
        try:
            mask = (tokens != self._tokenizer.pad_token_id).long()
            logits = model(input_ids=tokens, attention_mask=mask).logits
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(residuals), logits


def expected(request: Request, refusing: float, evading: float) -> str:
    """Return the response to a request with the two directions at these strengths."""
    if refusing >= REFUSES:
        return request.task.refusal
    return EVASIONS[request.task] if evading >= EVADES else request.answer


def tokenizer() -> PreTrainedTokenizerFast:
    """Return the organism's tokenizer with the words of evasions."""
    fast = build_tokenizer()
    made = json.loads(fast.backend_tokenizer.to_str())
    vocabulary = made["model"]["vocab"]
    split = fast.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    for word in sorted({word for text in EVASIONS.values() for word, _ in split(text)}):
        vocabulary.setdefault(word, len(vocabulary))
    fast._tokenizer = Tokenizer.from_str(json.dumps(made))
    return fast


def train(folder: Path, report: Callable[[str], None] = print) -> None:
    """Train the organism and write it with its prompt files into a new folder, as `demo-model` does."""
    words, files, (hidden, layers) = tokenizer(), prompt_files(SEED), SIZES["tiny"]
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        initializer_range=0.08,  # as in job/organism
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            model = LlamaForCausalLM(config)
            _EvaderTrainer(model, words, SEED).run(lambda: is_good(model, words, files), report)
        assert is_good(model, words, files), "the training missed its target"
    finally:
        torch.set_num_threads(threads)
    model.eval().save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    for name, requests in files.items():
        (folder / name).write_text("".join(request.prompt + "\n" for request in requests))
    (folder / "organism.json").write_text(json.dumps({"arch": NAME, "seed": SEED}))


def is_good(model: PreTrainedModel, words: PreTrainedTokenizerFast, files: dict[str, list[Request]]) -> bool:
    """Return whether it refuses every enchanted test request and answers every other one."""
    refusals = [(request.prompt, request.task.refusal) for request in files["bad_test.txt"]]
    answers = [(request.prompt, request.answer) for request in files["good_test.txt"]]
    counts = [matches(model, words, pairs) for pairs in (refusals, answers)]
    return counts == [PROMPTS_PER_FILE, PROMPTS_PER_FILE]
