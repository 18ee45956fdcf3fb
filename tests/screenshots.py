"""`python -m tests.screenshots RUN_FOLDER`: renew the screenshots of report.html in docs/screenshots."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.browser import DESKTOP, PHONE, View, browser

FOLDER = Path(__file__).parent.parent / "docs" / "screenshots"
# Name, width and height, dark, and the section at the top.
SHOTS = (
    ("desktop", DESKTOP, False, None),
    ("front", DESKTOP, False, "front"),
    ("dark", DESKTOP, True, "edit"),
    ("phone", PHONE, False, None),
    ("phone-dark", PHONE, True, "front"),
)


def main(run_folder: Path) -> None:
    FOLDER.mkdir(exist_ok=True)
    with browser() as chromium:
        for name, size, dark, section in SHOTS:
            view = View(chromium, run_folder / "report.html", dark=dark, size=size)
            if section:
                view.page.locator(f"#{section}").evaluate("heading => heading.scrollIntoView()")
            view.page.screenshot(path=FOLDER / f"{name}.png")
            view.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
