"""Talk with a job's model, base or under a trial's edit: switching only changes hooks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from job.edits.hooks import ActiveEdits
from job.errors import JobError
from job.generation.finite import require_finite
from job.model.device_faults import Shortage, within_memory
from job.model.loading import LoadedModel
from job.model.rendering import Rendering, rendered, token_ids
from job.records import Trial
from job.report.results import job_trials
from job.stages.followups import trial_of
from job.stages.session import ModelSession

_UNFINISHED = "�"  # decoding of an incomplete character


@dataclass
class Conversation:
    """A conversation with a session's model.

    Attributes:
        tokens: Longest answer.
        temperature: 0 for greedy decoding.
        system: System prompt, or None.
        trial: Whose edit is active; None for the base model.
    """

    session: ModelSession
    tokens: int = 512
    temperature: float = 0.0
    system: str | None = None
    trial: Trial | None = field(default=None, init=False)
    messages: list[dict[str, str]] = field(default_factory=list, init=False)
    _edits: ActiveEdits | None = field(default=None, init=False)

    def switch(self, trial: Trial | None) -> str | None:
        """Activate a trial's edit, or none; return why it is degenerate, or None."""
        self._edits = None if trial is None else self.session.hooks.activate([self.session.edit(trial)])
        self.trial = trial
        return None if self._edits is None else self._edits.reasons[0]

    def find(self, number: int | None) -> Trial:
        """Return a finished trial, None: the chosen one; a running search has more by now. Raises UsageError."""
        job = self.session.job
        return trial_of(job, job_trials(job.folder), number)

    def reset(self) -> None:
        """Start a new conversation."""
        self.messages.clear()

    def say(self, text: str, show: Callable[[str], None] | None = None) -> str:
        """Return the response to a message; `show` gets it in pieces. On JobError the message is not kept."""
        said = [*self.messages, {"role": "user", "content": text}]
        begun = [] if self.system is None else [{"role": "system", "content": self.system}]
        model = self.session.model
        # Dated like the job's prompts; a thinking model may think here.
        texts = rendered(model.tokenizer, [[*begun, *said]], Rendering(model.rendering.date))
        tokens = self._fitting(token_ids(model.tokenizer, texts)[0])
        with self._edits.on_every_row(model.model) if self._edits else nullcontext():
            streamer = AnswerStreamer(model, show)
            answer = within_memory(lambda: _answered(model, tokens, self.tokens, self.temperature, streamer))
        if isinstance(answer, Shortage):
            raise JobError("out of memory", remedy="/reset, or lower /tokens")
        self.messages = [*said, {"role": "assistant", "content": answer}]
        return answer

    def _fitting(self, tokens: list[int]) -> list[int]:
        config = self.session.model.model.config.get_text_config()
        most = getattr(config, "max_position_embeddings", None)
        if most is not None and len(tokens) >= most:
            raise JobError(f"the conversation has {len(tokens)} tokens, the model takes {most}", remedy="/reset")
        return tokens


class AnswerStreamer:
    """Streams a response; a streamer for transformers' `generate`.

    It decodes the whole text so far, since tokens need not be characters or independent.
    """

    def __init__(self, loaded: LoadedModel, show: Callable[[str], None] | None) -> None:
        self._loaded = loaded
        self._show = show
        self._tokens: list[int] | None = None
        self.text = ""

    def put(self, tokens: Tensor) -> None:
        """Take the prompt first, then each token."""
        if self._tokens is None:
            self._tokens = []
            return
        self._tokens += tokens.flatten().tolist()
        text = self._loaded.decode(self._tokens)
        if not text.endswith(_UNFINISHED):
            self._extend(text)

    def end(self) -> None:
        """Show the rest."""
        self._extend(self._loaded.decode(self._tokens or []))

    def _extend(self, text: str) -> None:
        if self._show is not None:
            self._show(text[len(self.text) :])
        self.text = text


def _answered(loaded: LoadedModel, prompt: list[int], limit: int, temperature: float, streamer: AnswerStreamer) -> str:
    """Return a model's response, up to Ctrl-C at a terminal."""
    ids = torch.tensor([prompt], device=loaded.device)
    how: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    if loaded.end_tokens:
        how["eos_token_id"] = sorted(loaded.end_tokens)
        how["pad_token_id"] = how["eos_token_id"][0]
    how["use_cache"] = loaded.architecture.batching.cached
    # Sampling and argmax would take a token of logits that are not finite.
    how["logits_processor"] = LogitsProcessorList([lambda _, logits: require_finite(logits)])
    try:
        loaded.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, streamer=streamer, **how
        )
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        streamer.end()
    return streamer.text
