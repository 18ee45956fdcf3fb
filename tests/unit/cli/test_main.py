"""The command's end where a question is not answered."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest
import typer

from job.cli import main


def test_a_question_that_is_interrupted_ends_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(**_: Any) -> NoReturn:
        raise typer.Abort

    monkeypatch.setattr(main, "app", ask)
    with pytest.raises(SystemExit) as end:
        main._call(["cloud", "vast", "destroy"])
    assert end.value.code == 1
    assert capsys.readouterr().err == "aborted\n"
