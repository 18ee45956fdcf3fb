"""Values resolved by a job's first start, and fixed for later ones."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from job.records.base import Record

# ISO 8601.
DATE = r"^\d{4}-\d{2}-\d{2}$"
# How an edit before a norm removes a direction v behind it, g being the gain: "dual" reads g∘v and writes v/g, "gain"
# does both along g∘v (docs/decisions/0033-dual-pull-back.md).
PullBack = Literal["dual", "gain"]
SearchMethod = Literal["gradient", "tpe"]


def _is_none(value: object) -> bool:
    return value is None


class Resolution(Record):
    """Values resolved by a job's first start.

    Attributes:
        search_rows: Smaller rows per forward in the search after memory ran out.
        batch: Trials of a batch; None in jobs of former versions.
        ahead: Batches sampled before the results of the preceding one; None in jobs of former versions.
        together: Trials that share a forward; None: the whole batch.
        norms: Names, within their layers, of norms between residual writers and the stream.
        prefix_tokens: Token ids of the response prefix; None without one, or for a given text.
        options: Options of the chat template, e.g. enable_thinking; None without any.
        turn_end: End token beyond the model's own; None without one.
        racing: Bad prompts that a trial answers before it may lose its race; 0 without races; None: without, as in jobs
            of former versions.
        topic_words: Refusal markers that a prompt holds as words of its topic do not count in responses; None: they
            count, as in jobs of former versions.
        evasions: Whether evasive responses count as refusals in the search; None: they do not, as in jobs of former
            versions.
        pull_back: How directions are pulled back through `norms`; None: "gain", as in jobs of former versions.
        method: How the search begins if `search.method` is "auto"; None: "tpe", as in jobs of former versions.
        choice_rows: Rows per forward for measuring finalists, if those of the search did not fit the memory.
        choice: How the exported trial is chosen: by upper confidence bounds, or None: by the search's counts, as former
            versions did.
        scorers: Commits of the search's scorers that are models on the Hub, by scorer; None without any.
    """

    dtype: str
    rows: int
    layers: int
    response_prefix: str = ""
    search_rows: int | None = None
    together: int | None = None
    norms: tuple[str, ...] = ()
    # Omitted if None, so that exports of former versions are reproduced with the same bytes.
    prefix_tokens: tuple[int, ...] | None = Field(None, exclude_if=_is_none)
    date: str | None = Field(None, pattern=DATE, exclude_if=_is_none)
    options: dict[str, bool] | None = Field(None, exclude_if=_is_none)
    turn_end: int | None = Field(None, exclude_if=_is_none)
    batch: int | None = Field(None, exclude_if=_is_none)
    ahead: int | None = Field(None, exclude_if=_is_none)
    racing: int | None = Field(None, exclude_if=_is_none)
    topic_words: bool | None = Field(None, exclude_if=_is_none)
    evasions: bool | None = Field(None, exclude_if=_is_none)
    pull_back: PullBack | None = Field(None, exclude_if=_is_none)
    choice: Literal["bounds"] | None = Field(None, exclude_if=_is_none)
    method: SearchMethod | None = Field(None, exclude_if=_is_none)
    choice_rows: int | None = Field(None, exclude_if=_is_none)
    scorers: dict[str, str] | None = Field(None, exclude_if=_is_none)
