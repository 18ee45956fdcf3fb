"""Chat with a job's model, base or under any trial's edit: switching only changes hooks."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from job.cli.options import json_alone
from job.edits.hooks import ActiveEdits
from job.errors import JobError, UsageError
from job.generation.finite import require_finite
from job.lifecycle.running import OpenJob
from job.model.device_faults import Shortage, within_memory
from job.model.loading import LoadedModel
from job.model.rendering import Rendering, rendered, token_ids
from job.records import Trial
from job.report.front import front_text, job_front
from job.report.results import job_trials
from job.stages.followups import looking, trial_of
from job.storage.events import Events
from job.storage.job_file import JobFile
from job.storage.jobs import job_settings
from job.storage.run_folder import RunFolder
from job.text.redaction import is_gone, redacted_json

if TYPE_CHECKING:
    from job.stages.session import ModelSession

HELP = """\
/base           the base model, without an edit
/trial [N]      the model edited as in trial N; without N, as in the chosen trial
/trials         list the Pareto front
/reset          start a new conversation
/system [TEXT]  set the system prompt; without TEXT, remove it
/tokens N       longest answer, in tokens
/help           show this list
/quit           leave, as Ctrl-D does; Ctrl-C stops a response"""
_UNFINISHED = "�"  # decoding of an incomplete character


@dataclass(frozen=True)
class ChatOptions:
    """Options of responses.

    Attributes:
        temperature: 0 for greedy decoding.
        device: Overrides the job's device.
    """

    tokens: int = 512
    temperature: float = 0.0
    system: str | None = None
    as_json: bool = False
    device: str | None = None


def chat(
    folder: RunFolder, number: int | None, options: ChatOptions, lines: Iterable[str] | None, events: Events
) -> None:
    """Hold a conversation without changing the job. Raises UsageError or HeldError.

    `number` None starts with the job's choice; `lines` None reads standard input.
    """
    trials = job_trials(folder)
    job = OpenJob(folder, JobFile(folder), job_settings(folder), events)
    trial = trial_of(job, trials, number) if trials else None
    if trial is None and number is not None:
        raise UsageError(f"no trial of job {folder.path.name} is finished", remedy="leave --trial out")
    out = sys.stdout
    with json_alone(options.as_json), looking(folder, events, options.device) as session:
        talk = Chat(session, options, out, events.say)
        talk.switch(trial)
        if lines is not None:
            talk.hold(lines)
        elif sys.stdin.isatty():
            events.say("/help lists the commands")
            talk.hold(_typed(talk))
        else:
            talk.hold(sys.stdin)


def _typed(talk: Chat) -> Iterator[str]:
    import readline  # noqa: F401 - lets lines be edited and recalled

    while True:
        try:
            yield input(f"{talk.subject}> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends)")


@dataclass
class Chat:
    """A conversation with a session's model.

    Attributes:
        out: Receives responses only.
        note: Receives everything else.
    """

    session: ModelSession
    options: ChatOptions
    out: TextIO
    note: Callable[[str], None]
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._trial: Trial | None = None
        self._edits: ActiveEdits | None = None
        self._system, self._tokens = self.options.system, self.options.tokens
        self._commands: dict[str, Callable[[str], None]] = {
            "base": lambda _: self.switch(None),
            "trial": self._to_trial,
            "trials": lambda _: self.note(front_text(job_front(self.session.job.folder))),
            "reset": lambda _: self.messages.clear(),
            "system": self._set_system,
            "tokens": self._set_tokens,
            "help": lambda _: self.note(HELP),
        }

    @property
    def subject(self) -> str:
        """The active model: "base" or "trial N"."""
        return "base" if self._trial is None else f"trial {self._trial.number}"

    def hold(self, lines: Iterable[str]) -> None:
        """Process lines until the end, /quit or a closed output."""
        for line in lines:
            line = line.strip()
            if line == "/quit" or is_gone(self.out):
                break
            if line:
                self.take(line)

    def take(self, line: str) -> None:
        """Process a command or message; errors are reported, and the chat continues."""
        try:
            if not line.startswith("/"):
                self._say(line)
                return
            name, _, rest = line[1:].partition(" ")
            if name not in self._commands:
                raise UsageError(f"there is no command /{name}", remedy="/help lists them")
            self._commands[name](rest.strip())
        except JobError as error:
            self.note(f"error: {error.line}")

    def switch(self, trial: Trial | None) -> None:
        """Activate a trial's edit, or none."""
        begin = time.perf_counter()
        told, self._edits = "", None
        if trial is not None:
            self._edits = self.session.hooks.activate([self.session.edit(trial)])
            (reason,) = self._edits.reasons
            told = f": {trial.values.refusals} of {len(self.session.prompts.bad_search)} refused, "
            told += f"KL {trial.values.kl:.4g}" + (f"; {reason}" if reason else "")
        self._trial = trial
        self.note(f"{self.subject}{told} ({1000 * (time.perf_counter() - begin):.1f} ms)")

    def _to_trial(self, text: str) -> None:
        job = self.session.job
        number = _number(text, "/trial", 0) if text else None
        # Read again: a running search has more of them by now.
        self.switch(trial_of(job, job_trials(job.folder), number))

    def _set_system(self, text: str) -> None:
        self._system = text or None

    def _set_tokens(self, text: str) -> None:
        self._tokens = _number(text, "/tokens", 1)

    def _say(self, text: str) -> None:
        """Answer a message; if that fails, neither stays in the conversation."""
        said = [*self.messages, {"role": "user", "content": text}]
        begun = [] if self._system is None else [{"role": "system", "content": self._system}]
        model = self.session.model
        # Dated like the job's prompts; a thinking model may think here.
        texts = rendered(model.tokenizer, [[*begun, *said]], Rendering(model.rendering.date))
        tokens = self._fitting(token_ids(model.tokenizer, texts)[0])
        hooks = self._edits.on_every_row(self.session.model.model) if self._edits else nullcontext()
        shown = Shown(self.session.model, None if self.options.as_json else self.out)
        with hooks:
            answer = within_memory(
                lambda: _answered(self.session.model, tokens, self._tokens, self.options.temperature, shown)
            )
        if isinstance(answer, Shortage):
            raise JobError("out of memory", remedy="/reset, or lower /tokens")
        if self.options.as_json:
            subject = self._trial.number if self._trial else None
            self.out.write(redacted_json({"trial": subject, "prompt": text, "answer": answer}, ascii_only=False))
        self.out.write("\n")
        self.out.flush()
        self.messages = [*said, {"role": "assistant", "content": answer}]

    def _fitting(self, tokens: list[int]) -> list[int]:
        """Return a conversation's tokens. Raises UsageError if they fill the context."""
        config = self.session.model.model.config.get_text_config()
        most = getattr(config, "max_position_embeddings", None)
        if most is not None and len(tokens) >= most:
            raise JobError(f"the conversation has {len(tokens)} tokens, the model takes {most}", remedy="/reset")
        return tokens


def _number(text: str, command: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise UsageError(f"{command} {text}: not a number", remedy=f"write e.g. {command} 41")
    return int(text)


class Shown:
    """Streams a response; a streamer for transformers' `generate`.

    It decodes the whole text so far, since tokens need not be characters or independent.
    """

    def __init__(self, loaded: LoadedModel, out: TextIO | None) -> None:
        self._loaded = loaded
        self._out = out
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
            self._print_new_text(text)

    def end(self) -> None:
        """Show the rest."""
        self._print_new_text(self._loaded.decode(self._tokens or []))

    def _print_new_text(self, text: str) -> None:
        if self._out is not None:
            self._out.write(text[len(self.text) :])
            self._out.flush()
        self.text = text


def _answered(loaded: LoadedModel, prompt: list[int], limit: int, temperature: float, shown: Shown) -> str:
    """Return a model's response, up to Ctrl-C."""
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
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, streamer=shown, **how
        )
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        shown.end()
    return shown.text
