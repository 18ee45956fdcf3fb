"""Script that renders chat templates in a limited process without model libraries.

Standard input is a JSON object: `template`, `variables`, `conversations` (lists of messages), the clock's `date`,
whether the conversations await an `answer`, and the limits `memory`, `seconds` and `characters`. Standard output is one
too: `texts` of all conversations, or what was `refused` and why. Templates are untrusted code; their environment equals
that of transformers' `apply_chat_template`, which a test ensures.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

_MESSAGE_CHARACTERS = 300


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks the assistant's messages and has no effect."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Return the block as a call that returns its content."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_plain"), [], [], body).set_lineno(line)

    def _plain(self, caller: jinja2.runtime.Macro) -> str:
        return str(caller())


class _Dict:
    """`dict` without access to attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _require_plain(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_plain(name)
        super().__setitem__(name, value)


def _require_plain(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _clock(date: str | None) -> Callable[[str], str]:
    """Return `strftime_now` at noon of a date, so that output is independent of time and zone."""
    now = datetime.now() if date is None else datetime.fromisoformat(date).replace(hour=12)
    return now.strftime


def compiled(template: str, date: str | None = None) -> jinja2.Template:
    """Compile a template in the environment of chat templates; `date` is the clock's, by default now."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _clock(date)}
    environment.globals |= {"dict": _Dict(), "namespace": _Namespace}
    return environment.from_string(template)


def _bounded(memory: int, seconds: int) -> None:
    for limit, wanted in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(limit)[1]
        bound = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        # The soft limit on time ends the process with a signal that tells why.
        resource.setrlimit(limit, (bound, bound + 2 if hard == resource.RLIM_INFINITY else hard))


def _rendered(task: dict[str, Any]) -> dict[str, Any]:
    texts: list[str] = []
    left = task["characters"]
    try:
        template = compiled(task["template"], task["date"])
        for messages in task["conversations"]:
            text = template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=task["answer"],
                **task["variables"],
            )
            left -= len(text)
            if left < 0:
                return {"refused": "size", "why": f"conversation {len(texts)} of {len(task['conversations'])}"}
            texts.append(text)
    except MemoryError:
        return {"refused": "memory", "why": ""}
    except RecursionError:
        return {"refused": "recursion", "why": ""}
    except jinja2.exceptions.TemplateError as error:
        return {"refused": "error", "why": str(error)[:_MESSAGE_CHARACTERS]}
    except Exception as error:  # a template can make anything be raised
        return {"refused": "error", "why": f"{type(error).__name__}: {str(error)[:_MESSAGE_CHARACTERS]}"}
    return {"texts": texts}


def main() -> None:
    """Render the conversations from standard input."""
    task = json.loads(sys.stdin.buffer.read())
    _bounded(task["memory"], task["seconds"])
    answer = _rendered(task)
    try:
        data = json.dumps(answer).encode()
    except MemoryError:
        data = b'{"refused": "memory", "why": ""}'
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
    # What a template has made need not be taken apart.
    os._exit(0)


if __name__ == "__main__":
    main()
