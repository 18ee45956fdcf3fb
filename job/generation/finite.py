"""Logits that are not finite never become tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from job.errors import ImpossibleJobError

_NAMED = 5


def require_finite(logits: Tensor) -> Tensor:
    """Return logits [rows, ...] unchanged. Raises ImpossibleJobError that names the rows that are not finite."""
    rows = rows_not_finite(logits)
    if rows:
        raise not_finite(rows, len(logits))
    return logits


def rows_not_finite(values: Tensor) -> list[int]:
    """Return the rows of [rows, ...] with a value that is NaN or infinite."""
    rows: list[int] = (~values.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    return rows


def not_finite(rows: Sequence[int], count: int) -> ImpossibleJobError:
    """Return the error for some rows of a batch of `count`."""
    return ImpossibleJobError(
        f"the logits of rows {named(rows)} of a batch of {count} are not finite",
        remedy="try --set loading.dtypes='[\"float32\"]'",
    )


def named(rows: Sequence[int]) -> str:
    """Return row numbers as text, the first few of many."""
    more = len(rows) - _NAMED
    return ", ".join(map(str, rows[:_NAMED])) + (f" and {more} more" if more > 0 else "")
