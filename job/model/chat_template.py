"""Render chat templates within limits of time, memory and length: they are untrusted code.

A child process (`job/model/template_child.py`) renders all conversations of a batch at once, in a tenth of a second and
without model libraries. Nothing is rendered in this process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from job.errors import ImpossibleJobError, MachineError

Messages = Sequence[Mapping[str, Any]]

MEMORY_BYTES = 512 << 20
# Of a processor: usual templates take less than a millisecond a conversation.
SECONDS, SECONDS_EACH = 4, 0.005
# Time may pass while others have the processors; this many times as much is waited for.
_PATIENCE = 20
# Written in all: a template may say much itself, and some of the messages several times.
CHARACTERS, CHARACTERS_EACH, CHARACTERS_PER_CHARACTER = 4_000_000, 20_000, 32
_CHILD = Path(__file__).with_name("template_child.py")
# What an interpreter may need to start at all. It gets no other variable: none of its business.
_PASSED = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ", "SYSTEMROOT")
_START = "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[1]); runpy.run_path(sys.argv[2], None, '__main__')"
_KEPT = 100_000
_ANOTHER = "use the original template of the model, or put another into chat_template.jinja"

_texts: dict[str, str] = {}
# Templates that have exceeded a limit are not tried again.
_hostile: dict[str, str] = {}
_lock = threading.Lock()


def render(
    template: str,
    variables: Mapping[str, Any],
    conversations: Sequence[Messages],
    name: str,
    *,
    date: str | None = None,
    answer: bool = True,
) -> list[str]:
    """Render conversations with a chat template. Raises ImpossibleJobError beyond limits, or MachineError.

    `variables` include the tokenizer's special tokens; `date` is the clock's, ISO 8601, by default now. `answer`
    renders up to the next response, else to the end of the last message.
    """
    told = json.dumps([variables, date, answer], sort_keys=True, default=str)
    keys = [json.dumps([template, told, list(map(dict, one))]) for one in conversations]
    with _lock:
        texts = {key: _texts[key] for key in keys if key in _texts}
        missing = {key: list(map(dict, one)) for key, one in zip(keys, conversations, strict=True) if key not in texts}
        if missing:
            plain = json.loads(told)[0]
            made = _render_missing(
                {"template": template, "variables": plain, "date": date, "answer": answer}, missing, name
            )
            texts.update(zip(missing, made, strict=True))
            if len(_texts) > _KEPT:
                _texts.clear()
            _texts.update(texts)
    return [texts[key] for key in keys]


def _characters(messages: Messages) -> int:
    """Return a conversation's length; content is text, or parts with text."""
    parts = (message["content"] for message in messages)
    return sum(len(said) if isinstance(said, str) else sum(len(part["text"]) for part in said) for said in parts)


def _render_missing(asked: Mapping[str, Any], missing: Mapping[str, Messages], name: str) -> list[str]:
    template, conversations = asked["template"], list(missing.values())
    if template in _hostile:
        raise _exceeded(name, _hostile[template])
    length = sum(map(_characters, conversations))
    seconds = SECONDS + int(SECONDS_EACH * len(conversations))
    task: dict[str, Any] = {
        **asked,
        "conversations": conversations,
        "memory": MEMORY_BYTES + 64 * (length + len(template)),
        "seconds": seconds,
        "characters": CHARACTERS + CHARACTERS_EACH * len(conversations) + CHARACTERS_PER_CHARACTER * length,
    }
    answer = _answer(task)
    if "refused" not in answer:
        return list(map(str, answer["texts"]))
    if answer["refused"] == "error":
        refused = f"the chat template of {name} refuses a conversation: {answer['why']}"
        if any(message["role"] == "system" for messages in conversations for message in messages):
            raise ImpossibleJobError(refused, remedy="leave out the system prompt if the template does not support one")
        raise ImpossibleJobError(refused, remedy=_ANOTHER)
    limits = {
        "memory": f"takes more than {task['memory'] >> 20} MiB of memory",
        "recursion": "recurses without end",
        "size": f"writes more than {task['characters']} characters ({answer.get('why')})",
    }
    _hostile[template] = limits.get(answer["refused"], answer["refused"])
    raise _exceeded(name, _hostile[template])


def _answer(task: Mapping[str, Any]) -> dict[str, Any]:
    """Return the child's response, or the limit that ended it. Raises MachineError if it cannot be started."""
    # Modules come from where this process has them, none from the working folder.
    command = [sys.executable, "-I", "-S", "-c", _START, json.dumps([path for path in sys.path if path]), str(_CHILD)]
    environment = {name: value for name, value in os.environ.items() if name in _PASSED}
    try:
        done = subprocess.run(
            command,
            input=json.dumps(task).encode(),
            capture_output=True,
            env=environment,
            start_new_session=True,  # Ctrl-C is for this process, which then waits for it no longer
            timeout=_PATIENCE * task["seconds"],
        )
    except subprocess.TimeoutExpired:
        return {"refused": f"takes more than {_PATIENCE * task['seconds']} s"}
    except OSError as error:
        raise MachineError(
            f"no process can be started for the chat template: {error.strerror or error}",
            remedy="raise the limit on processes (ulimit -u) or the memory",
        ) from error
    if done.returncode == -signal.SIGXCPU:
        return {"refused": f"takes more than {task['seconds']} s of processor time"}
    if done.returncode == -signal.SIGKILL:
        return {"refused": "takes more memory than this machine has free"}
    if done.returncode < 0:
        return {"refused": f"crashes its interpreter ({signal.Signals(-done.returncode).name})"}
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise MachineError(
            f"the process for the chat template fails: {lines[-1] if lines else f'exit code {done.returncode}'}",
            remedy="install the version of jinja2 that this package requires",
        )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _exceeded(name: str, what: str) -> ImpossibleJobError:
    return ImpossibleJobError(
        f"the chat template of {name} {what}",
        remedy=_ANOTHER,
    )
