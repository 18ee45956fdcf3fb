"""Durations among the settings: plain numbers in the setting's unit, or text with units."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from pydantic import BeforeValidator

from job.text.durations import duration

Seconds = Annotated[float, BeforeValidator(partial(duration, unit="s"))]
Minutes = Annotated[float, BeforeValidator(partial(duration, unit="m"))]
Hours = Annotated[float, BeforeValidator(partial(duration, unit="h"))]
