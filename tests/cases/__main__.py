"""Print the cases that stand in docs/lab-notes/data-and-models.md with what is said of them now.

    python -m tests.cases ORGANISM

ORGANISM is a folder as `abliterate demo-model` writes it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.cases import verdicts, write_brief
from tests.cases.models import MODELS
from tests.cases.prompts import PROMPTS
from tests.cases.settings import OTHERS


def main() -> None:
    listed = {name: case for name, case in {**MODELS, **PROMPTS, **OTHERS}.items() if case.row is not None}
    with TemporaryDirectory() as place:
        brief = Path(place) / "brief"
        brief.mkdir()
        write_brief(Path(sys.argv[1]), brief)
        for number, (name, case) in enumerate(sorted(listed.items(), key=lambda item: item[1].row or 0)):
            found = verdicts([case], brief, Path(place) / str(number))
            lines = found.said(case.check or "model").splitlines()
            said = (
                found.refusal if case.code else next((line for line in lines for told in case.told if told in line), "")
            )
            print(f"| {case.row} | {name} | {found.checked.code}, {found.ran.code} | {said.replace(place, '')} |")


if __name__ == "__main__":
    main()
