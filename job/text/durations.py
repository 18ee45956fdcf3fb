"""Durations and rates as text."""

from __future__ import annotations


def duration_text(seconds: float) -> str:
    """Format a duration in at most two units: "2 min 5 s"."""
    if seconds < 60:
        return f"{int(seconds)} s" if seconds >= 10 else f"{seconds:.1f} s"
    whole = int(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def elapsed_text(seconds: float) -> str:
    """Format the time since a start as a clock: "1:02:03", or "2:03" within the first hour."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def rate_text(steps: float, seconds: float) -> str:
    """Format the rate of steps: "12 a second", or "3.1 s each" where they are slow."""
    if seconds >= steps:
        return f"{duration_text(seconds / steps)} each"
    rate = steps / max(seconds, 1e-9)
    return f"{rate / 1e6:.3g} million a second" if rate >= 1e6 else f"{rate:.3g} a second"
