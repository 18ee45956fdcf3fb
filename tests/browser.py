"""Pages in headless Chromium: console messages, network requests and layout."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@contextmanager
def browser() -> Iterator[Browser]:
    """Yield the system's Chromium, without its sandbox, which root in a container cannot use."""
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield opened
        opened.close()


class View:
    """A file shown in a window, and the errors it caused."""

    def __init__(
        self,
        chromium: Browser,
        file: Path,
        *,
        dark: bool = False,
        size: dict[str, int] | None = None,
        scripts: bool = True,
    ) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        context = chromium.new_context(
            viewport=size or DESKTOP, color_scheme="dark" if dark else "light", java_script_enabled=scripts
        )
        context.set_default_timeout(180_000)  # other workers need the cores, too
        self.page: Page = context.new_page()
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type != "log" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def close(self) -> None:
        self.page.context.close()
