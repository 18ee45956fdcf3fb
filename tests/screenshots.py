"""`python -m tests.screenshots WORKSPACE` (`make pictures`): renew screenshots, card and result.png in docs/."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from job.report.picture import write_picture
from job.storage.exports import PICTURE
from job.storage.run_folder import RunFolder
from tests.browser import DESKTOP, PHONE, View, browser
from tests.helpers import only_job

DOCS = Path(__file__).parent.parent / "docs"
FOLDER, CARD = DOCS / "screenshots", DOCS / "cards" / "llama.md"
# Name, width and height, dark, and the section at the top.
SHOTS = (
    ("desktop", DESKTOP, False, None),
    ("front", DESKTOP, False, "front"),
    ("dark", DESKTOP, True, "edit"),
    ("phone", PHONE, False, None),
    ("phone-dark", PHONE, True, "front"),
)


def main(workspace: Path) -> None:
    run_folder = only_job(workspace)
    for name, file in (("README.md", CARD), (PICTURE, CARD.with_name(PICTURE))):
        shutil.copy(run_folder / "export" / name, file)
    write_picture(RunFolder(run_folder), DOCS / "pictures" / "result.png")
    with browser() as chromium:
        for name, size, dark, section in SHOTS:
            view = View(chromium, run_folder / "report.html", dark=dark, size=size)
            if section:
                view.page.locator(f"#{section}").evaluate("heading => heading.scrollIntoView()")
            view.page.screenshot(path=FOLDER / f"{name}.png")
            view.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
