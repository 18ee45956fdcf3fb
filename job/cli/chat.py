"""Chat with a job's model, base or under any trial's edit: switching only changes hooks."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TextIO

from job.cli.options import json_alone
from job.errors import JobError, UsageError
from job.lifecycle.running import OpenJob
from job.records import Trial
from job.report.front import front_text, job_front
from job.report.results import job_trials
from job.stages.conversation import Conversation
from job.stages.followups import looking, trial_of
from job.storage.events import Events
from job.storage.job_file import JobFile
from job.storage.jobs import job_settings
from job.storage.run_folder import RunFolder
from job.text.redaction import is_gone, redacted_json, unsteered

HELP = """\
/base           the base model, without an edit
/trial [N]      the model edited as in trial N; without N, as in the chosen trial
/trials         list the Pareto front
/reset          start a new conversation
/system [TEXT]  set the system prompt; without TEXT, remove it
/tokens N       longest answer, in tokens
/help           show this list
/quit           leave, as Ctrl-D does; Ctrl-C stops a response"""


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
        conversation = Conversation(session, options.tokens, options.temperature, options.system)
        talk = Chat(conversation, options.as_json, out, events.say)
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
    """The commands and messages of a conversation.

    Attributes:
        out: Receives responses only.
        note: Receives everything else.
    """

    talk: Conversation
    as_json: bool
    out: TextIO
    note: Callable[[str], None]

    def __post_init__(self) -> None:
        self._commands: dict[str, Callable[[str], None]] = {
            "base": lambda _: self.switch(None),
            "trial": lambda text: self.switch(self.talk.find(_number(text, "/trial", 0) if text else None)),
            "trials": lambda _: self.note(front_text(job_front(self.talk.session.job.folder))),
            "reset": lambda _: self.talk.reset(),
            "system": self._set_system,
            "tokens": self._set_tokens,
            "help": lambda _: self.note(HELP),
        }

    @property
    def subject(self) -> str:
        """The active model: "base" or "trial N"."""
        return "base" if self.talk.trial is None else f"trial {self.talk.trial.number}"

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
        reason, told = self.talk.switch(trial), ""
        if trial is not None:
            told = f": {trial.values.refusals} of {len(self.talk.session.prompts.bad_search)} refused, "
            told += f"KL {trial.values.kl:.4g}" + (f"; {reason}" if reason else "")
        self.note(f"{self.subject}{told} ({1000 * (time.perf_counter() - begin):.1f} ms)")

    def _set_system(self, text: str) -> None:
        self.talk.system = text or None

    def _set_tokens(self, text: str) -> None:
        self.talk.tokens = _number(text, "/tokens", 1)

    def _say(self, text: str) -> None:
        answer = self.talk.say(text, None if self.as_json else self._show)
        if self.as_json:
            subject = self.talk.trial.number if self.talk.trial else None
            self.out.write(redacted_json({"trial": subject, "prompt": text, "answer": answer}, ascii_only=False))
        self._show("\n")

    def _show(self, text: str) -> None:
        self.out.write(unsteered(text))
        self.out.flush()


def _number(text: str, command: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise UsageError(f"{command} {text}: not a number", remedy=f"write e.g. {command} 41")
    return int(text)
