"""What a job's first start resolves, so that no later one has to."""

from __future__ import annotations

from pydantic import Field

from job.records.base import Record

# ISO 8601.
DATE = r"^\d{4}-\d{2}-\d{2}$"


def _is_none(value: object) -> bool:
    return value is None


class Resolution(Record):
    """What a job's first start resolved once and for all.

    Attributes:
        dtype: Floating-point type the model is loaded in.
        rows: Rows of a forward, all trials together.
        layers: Number of the model's layers.
        response_prefix: What every answer is made to begin with.
        search_rows: Rows of a forward in the search, where memory turned out not to suffice for more.
        together: Trials that share their forwards; None: all of a batch.
        norms: Names, within their layers, of the norms between residual writers and the stream.
        prefix_tokens: Token ids of the response prefix; None: there is none, or it is a text that was given.
        date: The date on which all prompts are written; None: the chat template shows none.
        options: What else the chat template is told, e.g. enable_thinking; None: nothing.
        turn_end: A token that ends answers beside the model's own end tokens; None: no other.
    """

    dtype: str
    rows: int
    layers: int
    response_prefix: str = ""
    search_rows: int | None = None
    together: int | None = None
    norms: tuple[str, ...] = ()
    # Left out where they say nothing, so that exports of former versions are made again with the same bytes.
    prefix_tokens: tuple[int, ...] | None = Field(None, exclude_if=_is_none)
    date: str | None = Field(None, pattern=DATE, exclude_if=_is_none)
    options: dict[str, bool] | None = Field(None, exclude_if=_is_none)
    turn_end: int | None = Field(None, exclude_if=_is_none)
