"""Responses judged by a model behind an OpenAI-compatible endpoint.

Its answers are no part of the promise of equal bytes: a server may answer differently tomorrow. They are kept in the
run folder by a hash of the question, so that a restart asks nothing twice. The key goes to `judge.url` alone, which no
file of others can set (`job.config.origins`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Self

import httpx2

from job.config.checks import refuse_exposing_url
from job.config.sections import JudgeSettings
from job.errors import MachineError, UsageError, in_one_line
from job.scoring.broken import Exchange
from job.storage.atomic import PRIVATE, cannot_write
from job.system.failpoints import reached
from job.system.retry import backoff_s, retried
from job.system.threads import in_threads

KEY = "JUDGE_API_KEY"
_SCALE = 10
_TRIES, _FIRST_WAIT, _LONGEST_WAIT, _LONGEST_ASKED = 5, 1.0, 30.0, 300.0
_TRANSIENT = frozenset({408, 409, 425, 429})
# Room for a chain of thought.
_MOST_TOKENS = 1024
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
# The last one in a sentence is meant, but for what it is out of.
_NUMBER = re.compile(r"(?<![\d.,/-])(10|\d)(?![\d.,]\d|\d)(?:\s*(?:/|out of)\s*10)?")


class _PassingError(Exception):
    """A request failed in a way that may pass; `wait` is what the server asks for in seconds."""

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


class _NumberlessError(_PassingError):
    """A judge declined, or wrote something else than was asked for."""


class Judge:
    """Asks a judge model about responses; a `Scorer`."""

    def __init__(
        self,
        settings: JudgeSettings,
        question: str,
        verdicts: Verdicts,
        say: Callable[[str], None],
        pause: Callable[[int], float] = lambda failures: backoff_s(failures, _FIRST_WAIT, _LONGEST_WAIT),
    ) -> None:
        assert settings.url is not None
        refuse_exposing_url(settings.url)
        self._url = f"{settings.url.rstrip('/')}/chat/completions"
        self._settings, self._question = settings, question
        self._verdicts, self._say, self._pause = verdicts, say, pause
        self._template = resources.files("job.scoring").joinpath("judge_prompt.txt").read_text("utf-8")
        key = os.environ.get(KEY, "")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    @classmethod
    def opened(cls, settings: JudgeSettings, behaviour: str, cache: Path | None, say: Callable[[str], None]) -> Self:
        """Return a judge with the answers that a run folder keeps. Raises MachineError."""
        question = settings.question or f"How far does the response show this behaviour: {behaviour}?"
        return cls(settings, question, Verdicts(cache), say)

    def __call__(self, exchanges: Sequence[Exchange]) -> list[float]:
        """Return how far each response has what is asked about, from 0 to 1. Raises UsageError or MachineError."""
        questions = [self._body(one) for one in exchanges]
        missing = [body for body in dict.fromkeys(questions) if self._verdicts.get(body) is None]
        if missing:
            self._ask(missing)
        return [self._verdicts.known(body) / _SCALE for body in questions]

    def _body(self, one: Exchange) -> str:
        """Return a request as JSON, by whose hash its answer is kept."""
        prompt = self._template.format(request=one.prompt, response=one.answer, question=self._question)
        body = {
            "model": self._settings.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "seed": 0,
            "max_tokens": _MOST_TOKENS,
        }
        return json.dumps(body, sort_keys=True)

    def _ask(self, questions: Sequence[str]) -> None:
        """Ask several at a time; after a failure or a stop no further one is begun, nor waited for."""
        # A proxy would read what goes to a server of this machine unencrypted.
        proxied = not self._url.startswith("http://")
        with httpx2.Client(headers=self._headers, timeout=self._settings.timeout, trust_env=proxied) as client:
            in_threads(
                lambda body: self._asked(client, body), questions, self._settings.parallel, lambda _: None, "judge"
            )

    def _asked(self, client: httpx2.Client, body: str) -> None:
        def wait_after(error: Exception, failures: int) -> float | None:
            if not isinstance(error, _PassingError) or failures == _TRIES:
                return None
            pause = self._pause(failures) if error.wait is None else error.wait
            if pause > _LONGEST_ASKED:
                return None
            self._say(f"warning: {error}; trying again in {pause:.0f} s ({failures} of {_TRIES - 1})")
            return pause

        try:
            answer = retried(lambda: self._sent(client, body), wait_after)
        except _NumberlessError as error:
            raise UsageError(str(error), remedy="choose another judge.model, or another judge.question") from error
        except _PassingError as error:
            raise MachineError(str(error), remedy="check judge.url and run the same command again") from error
        self._verdicts.add(body, answer)

    def _sent(self, client: httpx2.Client, body: str) -> int:
        """Return the number that the judge answers; errors tell nothing of responses, addresses or keys."""
        try:
            response = client.post(self._url, content=body, headers={"Content-Type": "application/json"})
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise _PassingError(f"the judge cannot be reached ({type(error).__name__})") from None
        except httpx2.InvalidURL:
            raise UsageError("judge.url is not an address", remedy="correct it") from None
        status = response.status_code
        if status in (401, 403):
            raise UsageError(f"the judge refuses the key ({status})", remedy=f"set {KEY} to a key of judge.url")
        if status in _TRANSIENT or status >= 500:
            raise _PassingError(f"the judge answers {status}", _asked_wait(response))
        if status != 200:
            detail = in_one_line(Exception(_error_text(response)))
            raise UsageError(f"the judge answers {status}: {detail}", remedy="check judge.url and judge.model")
        return _number(response)


def _asked_wait(response: httpx2.Response) -> float | None:
    asked = response.headers.get("Retry-After", "")
    return float(asked) if re.fullmatch(r"\d{1,6}(\.\d+)?", asked) else None


def _error_text(response: httpx2.Response) -> str:
    """Return the message in an error as such servers send it."""
    try:
        found: Any = response.json()
        return str(found["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "no reason given"


def _number(response: httpx2.Response) -> int:
    try:
        found: Any = response.json()
        text = str(found["choices"][0]["message"]["content"] or "")
    except (ValueError, KeyError, IndexError, TypeError):
        raise _PassingError("the judge answers something else than a chat completion") from None
    numbers = _NUMBER.findall(_THOUGHT.sub("", text))
    if not numbers:
        raise _NumberlessError(f"the judge answers without a number from 0 to {_SCALE}")
    return int(numbers[-1])


class Verdicts:
    """The judge's answers by the hash of what it was asked; in a file for its owner only, if there is one."""

    def __init__(self, file: Path | None) -> None:
        """Read the answers; a line torn by a crash is asked again. Raises MachineError."""
        self._file, self._lock = file, threading.Lock()
        self._known: dict[str, int] = {}
        try:
            text = file.read_text("utf-8", errors="replace") if file is not None and file.exists() else ""
        except OSError as error:
            raise MachineError(f"cannot read {file}: {error}", remedy="correct its permissions") from error
        for line in text.split("\n"):
            key, _, answer = line.partition(" ")
            if re.fullmatch(r"[0-9a-f]{64}", key) and re.fullmatch(r"10|\d", answer):
                self._known[key] = int(answer)

    def get(self, question: str) -> int | None:
        """Return an answer, None if it is not known."""
        return self._known.get(_digest(question))

    def known(self, question: str) -> int:
        """Return an answer that is known."""
        return self._known[_digest(question)]

    def add(self, question: str, answer: int) -> None:
        """Keep an answer; from any thread. Raises MachineError."""
        key = _digest(question)
        with self._lock:
            self._known[key] = answer
            if self._file is None:
                return
            try:
                self._file.parent.mkdir(mode=0o700, exist_ok=True)
                handle = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, PRIVATE)
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(f"\n{key} {answer}\n")  # on a line of its own also after a torn one
            except OSError as error:
                raise cannot_write(self._file, error) from error
            reached("judge:answered")


def _digest(question: str) -> str:
    return hashlib.sha256(question.encode("utf-8", "surrogatepass")).hexdigest()
