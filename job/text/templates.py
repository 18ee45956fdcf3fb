"""Templates of HTML and Markdown, into which every value comes redacted and escaped."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template, pass_eval_context, select_autoescape
from jinja2.nodes import EvalContext

from job.text.markup import markdown
from job.text.redaction import redact


@pass_eval_context
def _prepared(context: EvalContext, value: Any) -> Any:
    if hasattr(value, "__html__"):  # a macro's HTML, or a value marked `safe`
        return value
    return redact(str(value)) if context.autoescape else markdown(value)


def template(package: str, name: str) -> Template:
    """Return a template in a package's folder: of HTML by its suffix, else of Markdown."""
    return _environment(package).get_template(name)


@cache  # an environment keeps its compiled templates
def _environment(package: str) -> Environment:
    return Environment(
        loader=PackageLoader(package, "."),
        autoescape=select_autoescape(),
        finalize=_prepared,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
