"""The command's end where a question is not answered."""

from __future__ import annotations

import importlib
from typing import Any, NoReturn

import pytest
import typer

MAIN = importlib.import_module("job.cli.main")  # its function of that name hides it in the package


def test_a_question_that_is_interrupted_ends_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(**_: Any) -> NoReturn:
        raise typer.Abort

    monkeypatch.setattr(MAIN, "_commands", lambda: ask)
    with pytest.raises(SystemExit) as end:
        MAIN._call(["cloud", "vast", "destroy"])
    assert end.value.code == 1
    assert capsys.readouterr().err == "aborted\n"
