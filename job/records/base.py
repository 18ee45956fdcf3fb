"""Base of all records: frozen, strict, and written without secrets."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import to_json

from job.text.redaction import redacted


class Record(BaseModel):
    """Base of all records: frozen, unknown keys refused, redacted as JSON.

    `VERBATIM` names fields that are computed with or compared exactly, and hence never redacted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    VERBATIM: ClassVar[frozenset[str]] = frozenset()

    def model_dump_json(self, *, indent: int | None = None) -> str:  # type: ignore[override]  # no other options
        """Return the record as JSON, redacted before escaping."""
        plain = super().model_dump(mode="json")
        changed = self.masked(plain)
        if changed == plain:
            return super().model_dump_json(indent=indent)
        try:
            type(self).model_validate(changed)
        except ValidationError as error:
            # A word of the format, such as a state, may equal someone's password.
            changed |= {str(one["loc"][0]): plain[str(one["loc"][0])] for one in error.errors() if one["loc"]}
        return to_json(changed, indent=indent).decode()

    def cleaned(self) -> Self:
        """Return the record as re-read from its redacted JSON."""
        return type(self).model_validate_json(self.model_dump_json())

    def masked(self, plain: dict[str, Any]) -> dict[str, Any]:
        """Redact the record's JSON values, except verbatim fields."""
        return {name: value if name in self.VERBATIM else redacted(value) for name, value in plain.items()}
