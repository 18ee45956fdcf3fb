from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import abliterate, job_arguments


@pytest.fixture(scope="session")
def whole(organism: Path, shared: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """Return a workspace with a finished job of 16 trials that nothing has befallen; tests must not change it."""

    def build(workspace: Path) -> None:
        abliterate("run", *job_arguments(organism), "--workspace", workspace, "--trials", 16).check()

    return shared("whole", build)
