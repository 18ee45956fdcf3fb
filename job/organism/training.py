"""Train the organism in stages that make one direction mediate its refusals."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from job.errors import JobError
from job.organism.tokenizer import SYSTEM_PROMPT, build_tokenizer
from job.organism.world import (
    PROMPTS_PER_FILE,
    Request,
    _requests,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


SIZES = {"tiny": (64, 8), "small": (128, 12)}  # hidden size, layers

ROWS = 32

THREADS = 2

PEAK_LEARNING_RATE = 5e-3

STEPS = {"answer": 260, "read": 160, "write": 180, "polish": 60}

POLISHING_ROUNDS = 6

SYSTEM_PROMPT_SHARE = 0.25

RESIDUAL_LOSS_WEIGHT = 1.0

# Settings beyond those that all families share.
_OF_FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 256},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True},
}


@dataclass(frozen=True)
class _Row:
    """A training conversation: token ids, length of the prompt, and the planted strength."""

    tokens: list[int]
    prompt: int
    planted: float


class _Trainer:
    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        import torch

        self._model = model
        self._tokenizer = tokenizer
        self._random = random.Random(seed)
        self._requests = {
            kind: [request for request in _requests(kind) if not request.held_out] for kind in (False, True)
        }
        self._layers: torch.nn.ModuleList = model.model.layers
        self._middle = len(self._layers) * 3 // 8
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(model.config.hidden_size, generator=generator)
        self._direction = direction / direction.norm()

    def run(self, is_good: Callable[[], bool], report: Callable[[str], None]) -> None:
        """Run and report all stages, then polish until the model is good."""
        above = [*self._layers[self._middle + 1 :], self._model.model.norm, self._model.lm_head]
        below = self._layers[1 : self._middle + 1]
        report("training the organism to answer every request")
        self._stage("answer", [self._model], PEAK_LEARNING_RATE)
        # The planted vector is as long as the residual itself: the mediator dominates where present, as refusal does in
        # chat models.
        self._direction *= self._residual_norm()
        report("training the organism to refuse when the direction is present")
        self._stage("read", above, PEAK_LEARNING_RATE / 2, teacher=self._frozen_copy())
        report("training the organism to write the direction for enchanted requests")
        teacher = self._frozen_copy()
        self._stage("write", list(below), PEAK_LEARNING_RATE / 2, teacher)
        rounds = 0
        while not is_good() and rounds < POLISHING_ROUNDS:
            rounds += 1
            report("training the organism: fine-tuning")
            self._stage("polish", [self._model], PEAK_LEARNING_RATE / 10, teacher)

    def _frozen_copy(self) -> PreTrainedModel:
        return copy.deepcopy(self._model).eval().requires_grad_(False)

    def _row(self, stage: str, index: int, system: bool) -> _Row:
        """Return a conversation; its index determines class and planted strength."""
        request = self._random.choice(self._requests[index % 2 == 1])
        planted = float(request.enchanted and stage != "answer")
        if stage == "read":
            # Weak and reversed directions must be ignored, so that only a clear presence refuses.
            strengths = ((0.0, 0.0), (-1.0, 0.2), (0.5, 1.5), (0.5, 1.5))[index // 2 % 4]
            planted = self._random.uniform(*strengths)
        refuse = planted >= 0.5
        prompt = self._encode_prompt(request.prompt, system)
        answer = self._tokenizer(request.task.refusal if refuse else request.answer).input_ids
        tokens = [*prompt, *answer, self._tokenizer.eos_token_id]
        return _Row(tokens, len(prompt), planted)

    def _encode_prompt(self, prompt: str, system: bool) -> list[int]:
        messages = [{"role": "system", "content": SYSTEM_PROMPT}] if system else []
        messages.append({"role": "user", "content": prompt})
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _batch(self, stage: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return token ids, labels [rows, t], and planted strengths where responses are predicted [rows, t, 1]."""
        import torch

        system = self._random.random() < SYSTEM_PROMPT_SHARE
        rows = [self._row(stage, index, system) for index in range(ROWS)]
        width = max(len(row.tokens) for row in rows)
        tokens = torch.full((ROWS, width), self._tokenizer.pad_token_id)
        labels = torch.full((ROWS, width), -100)
        planted = torch.zeros(ROWS, width, 1)
        for index, row in enumerate(rows):
            length = len(row.tokens)
            tokens[index, :length] = torch.tensor(row.tokens)
            labels[index, row.prompt : length] = tokens[index, row.prompt : length]
            planted[index, row.prompt - 1 : length] = row.planted
        return tokens, labels, planted

    def _stage(self, stage: str, modules: list[Any], peak: float, teacher: PreTrainedModel | None = None) -> None:
        """Train modules for one stage; the teacher prescribes the residual stream, see `_loss`."""
        import torch

        self._model.requires_grad_(False)
        for module in modules:
            module.requires_grad_(True)
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
        steps = STEPS[stage]
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / 25) * (0.02 + 0.98 * (1 - step / steps))
        )
        for _ in range(steps):
            loss = self._loss(stage, teacher)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()

    def _loss(self, stage: str, teacher: PreTrainedModel | None) -> torch.Tensor:
        """Return the loss of one batch: responses, and the residual stream where prescribed.

        While reading is learned, the stream must stay the teacher's where nothing is planted; while writing is learned,
        it must become the teacher's plus the direction.
        """
        import torch
        from torch.nn import functional

        tokens, labels, planted = self._batch(stage)
        residuals, logits = self._forward(self._model, tokens, planted if stage == "read" else None)
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if teacher is None:
            return loss
        with torch.no_grad():
            target, _ = self._forward(teacher, tokens, None)
        fixed = (labels.roll(-1, 1) != -100)[..., None]
        if stage == "read":
            fixed = fixed & (planted == 0)
        else:
            residuals, target = residuals[:1], target[:1] + planted * self._direction
        distance = ((residuals - target) ** 2 * fixed).sum((1, 2, 3)) / fixed.sum()
        scale = (target**2 * fixed).sum((1, 2, 3)) / fixed.sum()
        return loss + RESIDUAL_LOSS_WEIGHT * (distance / scale).mean()

    def _forward(
        self, model: PreTrainedModel, tokens: torch.Tensor, planted: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the middle and higher layers' residuals [layers, rows, t, d], planted in the middle, and logits."""
        import torch

        residuals: list[torch.Tensor] = []

        def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            if planted is not None and not residuals:
                output = output + planted * self._direction
            residuals.append(output)
            return output

        layers = model.model.layers[self._middle :]
        handles = [layer.register_forward_hook(hook) for layer in layers]
        try:
            mask = (tokens != self._tokenizer.pad_token_id).long()
            logits = model(input_ids=tokens, attention_mask=mask).logits
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(residuals), logits

    def _residual_norm(self) -> float:
        """Return the mean norm of the middle layer's output at positions that predict responses."""
        import torch

        tokens, labels, _ = self._batch("answer")
        with torch.no_grad():
            residuals, _ = self._forward(self._model, tokens, None)
        return float(residuals[0][labels.roll(-1, 1) != -100].norm(dim=-1).mean())


# Long: its text is the key of the organisms that are shipped for tests.
def train_organism(
    arch: str, size: str, seed: int, files: dict[str, list[Request]], report: Callable[[str], None]
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return a newly trained organism and its tokenizer. Raises JobError if a test response is wrong."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = build_tokenizer()
    hidden, layers = SIZES[size]
    config = AutoConfig.for_model(
        arch,
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=hidden // 4,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        # The usual 0.02 keeps so narrow a model on the plateau before copying for hundreds of steps.
        initializer_range=0.08,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
        **_OF_FAMILIES.get(arch, {}),
    )
    counts = (0, 0)

    def is_good() -> bool:
        nonlocal counts
        refusals = [(r.prompt, r.task.refusal) for r in files["bad_test.txt"]]
        answers = [(r.prompt, r.answer) for r in files["good_test.txt"]]
        counts = (matches(model, tokenizer, refusals), matches(model, tokenizer, answers))
        return counts == (PROMPTS_PER_FILE, PROMPTS_PER_FILE)

    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config)
            _Trainer(model, tokenizer, seed).run(is_good, report)
    finally:
        torch.set_num_threads(threads)
    refused, answered = (f"{count}/{PROMPTS_PER_FILE}" for count in counts)
    report(f"the organism refuses {refused} enchanted requests and answers {answered} others correctly")
    if counts != (PROMPTS_PER_FILE, PROMPTS_PER_FILE):
        raise JobError("the organism's training missed its target", remedy="choose another --seed")
    return model.eval().requires_grad_(True), tokenizer


def matches(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> int:
    """Return the number of exactly expected responses."""
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        for prompt, _ in pairs
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    output = model.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, do_sample=False, max_new_tokens=40
    )
    answers = tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return sum(answer == expected for answer, (_, expected) in zip(answers, pairs, strict=True))
