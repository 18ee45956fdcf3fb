"""What a run folder holds that a newer snapshot from elsewhere lacks."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from job.mirror.records import CACHES, STUDY
from job.mirror.snapshot import mirrored_files
from job.storage.atomic import sha256_file
from job.storage.study_file import connected

_EVENTS, _FIGURES = "events.jsonl", "figures"
# Each start writes these anew.
_REWRITTEN = frozenset(
    ("job.json", "state.json", "meter.json", "uploads.json", "preflight.json", "report.md", "report.html")
)
# The one table that is no record: it holds the plan of the batch that is being searched.
_PLAN = "study_user_attributes"
# All that `abliterate export` logs, which no mirror receives. The export itself stays in the run folder.
_OF_EXPORTS = frozenset(
    ("architecture", "loading", "loaded", "export_started", "export_proven", "exported", "doubt", "message")
)


def unique_records(folder: Path, newer: Path, files: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the records that a newer snapshot does not continue, and figures that it has no file for.

    `newer` holds the snapshot, `files` its paths. Raises MachineError if the study is in use.
    """
    differing, figures = [], []
    for file in mirrored_files(folder):
        path = file.relative_to(folder).as_posix()
        top = path.partition("/")[0]
        if top in CACHES or path in _REWRITTEN:
            continue
        if top == _FIGURES:
            # Others were there when the job was continued, which the event log proves.
            figures += [] if path in files else [path]
        elif path not in files or not _is_continued(path, file, newer / path):
            differing.append(path)
    return differing, figures


def _is_continued(path: str, file: Path, newer: Path) -> bool:
    if path == STUDY:
        return _study_is_within(file, newer)
    if path == _EVENTS:
        return _log_is_continued(file, newer)
    return sha256_file(file) == sha256_file(newer)


def _study_is_within(file: Path, newer: Path) -> bool:
    """Return whether a newer study has all trials of an older one."""
    try:
        with connected(file) as db:
            db.execute("ATTACH ? AS newer", (f"file:{quote(str(newer.resolve()))}?mode=ro",))
            tables = [name for (name,) in db.execute("SELECT name FROM main.sqlite_master WHERE type = 'table'")]
            rows = 'SELECT 1 FROM (SELECT * FROM main."{0}" EXCEPT SELECT * FROM newer."{0}") LIMIT 1'
            return not any(db.execute(rows.format(table)).fetchone() for table in tables if table != _PLAN)
    except sqlite3.Error:
        return False


def _log_is_continued(file: Path, newer: Path) -> bool:
    """Return whether a newer event log begins with this one, exports at its end aside."""
    with file.open("rb") as log, newer.open("rb") as longer:
        for line in log:
            if line != longer.readline():
                return all(map(_is_of_export, (line, *log)))
    return True


def _is_of_export(line: bytes) -> bool:
    try:
        return json.loads(line).get("event") in _OF_EXPORTS
    except (ValueError, AttributeError, RecursionError):
        return False
