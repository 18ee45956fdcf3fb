"""Documentation pages generated from the code."""

from __future__ import annotations

import argparse
from pathlib import Path


def write_or_print(page: str) -> None:
    """Write a page to the file of `--write`, else print it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", type=Path)
    file = parser.parse_args().write
    file.write_text(page) if file else print(page)
