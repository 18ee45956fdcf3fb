"""report.html in use: in headless Chromium, with a mouse, a keyboard, a phone, and a screen reader."""

from __future__ import annotations

import json
import re
import shutil
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser

from job.data.prompts import PromptSets
from job.mirror.snapshot import mirrored_files
from job.report.results import job_trials
from job.search.pareto import pareto_front
from job.storage.answers import KEPT
from job.storage.run_folder import RunFolder
from tests.browser import CHROMIUM, DESKTOP, PHONE, View, browser
from tests.helpers import abliterate, job_arguments, only_job

# `.ci/run` installs Debian's; Playwright would download its own.
pytestmark = pytest.mark.xdist_group("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
HOSTILE = "</script><script>alert('in')</script><img src=x onerror=alert('img')>\"'&amp;"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(chromium: Browser, finished: Path) -> Iterator[View]:
    """Yield the page of a finished job, in a desktop window and light mode; tests restore their changes."""
    view = View(chromium, only_job(finished) / "report.html")
    yield view
    view.close()


def axe_complaints(view: View) -> list[str]:
    found = Axe().run(view.page).response
    assert len(found["passes"]) > 20
    return [f"{one['id']}: {one['nodes'][0]['html'][:200]}" for one in found["violations"]]


@needs_chromium
def test_charts_are_drawn_and_nothing_is_fetched(page: View, finished: Path) -> None:
    assert page.complaints == []
    assert [url.split(":")[0] for url in page.requests] == ["file"]
    folder = RunFolder(only_job(finished))
    trials = job_trials(folder)
    record = folder.read_job()
    assert record.resolution is not None

    def marks(chart: str, what: str) -> int:
        return page.page.locator(f"#{chart} {what}").count()

    usable = [trial for trial in trials if trial.values.reason is None]
    assert marks("chart-front", ".dots .dot") == len(usable)
    assert marks("chart-front", ".line .dot") == len(pareto_front(trials))
    labels = page.page.locator("#chart-front .label").all_text_contents()
    assert labels == ["base model", f"chosen: trial {folder.export_link.resolve().name[-4:].lstrip('0') or '0'}"]
    assert marks("chart-strength", ".bars rect") == 2 * record.resolution.layers
    assert marks("chart-strength", "path.rule") == 1
    for number, lines in enumerate((4, 3, 2)):
        assert marks(f"chart-geometry-{number}", ".stroke") == lines
    layers = json.loads(folder.geometry_file.read_text())["layers"]
    for number, layer in enumerate(layers):
        dots, crosses = (
            page.page.locator(f"#chart-points-{number} {kind} path").get_attribute("d") or ""
            for kind in (".dots", ".crosses")
        )
        assert (dots.count("M"), crosses.count("M")) == (len(layer["good_points"]), len(layer["bad_points"]))
    assert [one for one in range(len(layers)) if page.page.locator(f"#chart-points-{one}").is_visible()] == [
        max(range(len(layers)), key=lambda one: layers[one]["silhouette"])
    ]
    assert page.page.locator("section h2").all_inner_texts() == [
        "Scorecard",
        "What detectors say",
        "Pareto front",
        "The chosen edit",
        "Directions by layer",
        "Responses before and after",
        "Time and cost",
        "Preflight",
        "Provenance",
    ]


@needs_chromium
def test_the_page_is_accessible_by_day_and_by_night(page: View) -> None:
    colours = []
    for scheme in ("light", "dark"):
        page.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        assert axe_complaints(page) == []
        look = "e => getComputedStyle(e)"
        background = page.page.locator("body").evaluate(f"{look}.backgroundColor")
        colours.append((background, page.page.locator("#chart-front text.xtitle").evaluate(f"{look}.fill")))
    page.page.emulate_media(color_scheme="light")
    assert colours == [("rgb(255, 255, 255)", "rgb(27, 34, 45)"), ("rgb(20, 23, 28)", "rgb(230, 233, 238)")]


@needs_chromium
def test_a_phone_shows_all_without_scrolling_sideways(page: View) -> None:
    page.page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    page.page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
    widths = page.page.locator(".plot").evaluate_all("all => all.map(e => e.getBoundingClientRect().right)")
    assert max(widths) <= PHONE["width"]
    texts = page.page.locator("#chart-front text.xtick").evaluate_all(
        "all => all.map(e => e.getBoundingClientRect().height)"
    )
    assert min(texts) >= 11
    assert page.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    sizes = page.page.locator("button, summary, nav a").evaluate_all("all => all.map(e => e.offsetHeight)")
    assert min(sizes) >= 24
    page.page.locator("details").evaluate_all("all => all.forEach(one => one.open = false)")
    page.page.set_viewport_size(DESKTOP)  # type: ignore[arg-type]


@needs_chromium
def test_points_and_layers_are_reached_with_the_keyboard_alone(page: View) -> None:
    keys = page.page.keyboard
    page.page.evaluate("() => { document.activeElement.blur(); scrollTo(0, 0); }")
    keys.press("Tab")
    assert page.page.evaluate("document.activeElement.textContent") == "To the content"
    seen = []
    for _ in range(80):
        keys.press("Tab")
        seen.append(page.page.evaluate("document.activeElement.textContent"))
        if page.page.evaluate("document.activeElement.dataset.point !== undefined"):
            break
    assert seen[-1].startswith("trial "), seen
    tip = page.page.locator(".tip")
    assert tip.inner_text().startswith(f"{seen[-1]}: ")
    slider = page.page.get_by_role("slider", name="Layer")
    slider.focus()
    assert tip.is_hidden()
    before = int(slider.input_value())
    keys.press("ArrowLeft" if before else "ArrowRight")
    now = int(slider.input_value())
    assert now != before
    assert page.page.locator("#layer-shown").inner_text() == str(now)
    shown = page.page.locator(".layer").evaluate_all("all => all.map(one => !one.hidden)")
    assert [index for index, visible in enumerate(shown) if visible] == [now]


@needs_chromium
def test_the_pointer_shows_the_nearest_trial_and_the_scale_is_switched(page: View, finished: Path) -> None:
    front = pareto_front(job_trials(RunFolder(only_job(finished))))
    page.page.locator("#front").evaluate("heading => heading.scrollIntoView()")
    for scale, chart in (("linear", "chart-front-linear"), ("logarithmic", "chart-front")):
        page.page.get_by_label(scale).check()
        assert page.page.locator(f"#{chart}").is_visible()
        assert page.page.locator(".scales .plot:visible").count() == 1
        point = page.page.locator(f"#{chart} .line [data-number='{front[-1].number}']")
        box = point.bounding_box()
        assert box is not None
        page.page.mouse.move(box["x"] + box["width"] / 2 + 2, box["y"] + box["height"] / 2 - 2)
        assert f"KL {front[-1].values.kl:.4g}" in page.page.locator(".tip").inner_text()
        page.page.mouse.move(1, 1)
        assert page.page.locator(".tip").is_hidden()


@needs_chromium
def test_without_scripts_the_figures_charts_and_answers_are_there(chromium: Browser, finished: Path) -> None:
    view = View(chromium, only_job(finished) / "report.html", scripts=False)
    assert view.complaints == []
    assert view.page.locator("#chart-front").is_visible()
    assert view.page.locator("#chart-front title").count() > 20  # which the browser shows under the mouse
    view.page.get_by_label("linear", exact=True).check()
    assert view.page.locator("#chart-front-linear").is_visible()
    assert view.page.get_by_role("slider").count() == 0
    assert view.page.locator(".layer:visible").count() == 1
    assert view.page.locator("blockquote").count() == 2 * KEPT
    view.close()


def test_the_page_is_small_and_titled_by_what_changed(finished: Path) -> None:
    folder = RunFolder(only_job(finished))
    page = folder.page_file.read_text()
    assert len(page.encode()) < 250_000
    assert re.search(r"<title>[^<]*/model: refusals 20 → \d+ of 20</title>", page)
    assert "Took<strong>" in page
    spent = json.loads(folder.meter_file.read_text())["seconds"]
    told = re.search(r"All starts of the job took ([\d.]+) s", page)
    assert told is None or float(told[1]) == pytest.approx(spent, abs=1.5)
    # A busy machine or a slow disk is a warning of its own: what preflight found is what the page says.
    found = Counter(check["status"] for check in json.loads(folder.preflight_file.read_text())["checks"])
    everything = f"All {found.total()} checks were in order"
    summary = (
        everything if found["ok"] == found.total() else f"{found['ok']} ok, {found['warn']} warn, {found['fail']} fail"
    )
    assert re.search(rf"<details><summary>[^<]*{summary}</summary>", page.partition('id="preflight"')[2])


def test_answers_are_kept_for_the_owner_alone_and_bad_ones_are_shown_on_demand(finished: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "runs"
    shutil.copytree(finished, workspace, symlinks=True)
    folder = RunFolder(only_job(workspace))
    prompts = PromptSets.model_validate_json(folder.prompts_file.read_text())
    export = folder.export_link.resolve().name
    good, bad = ([prompt.user for prompt in group[:KEPT]] for group in (prompts.good_report, prompts.bad_report))
    for subject, refused in (("base", True), (export, False)):
        kept = json.loads(folder.answers_file(subject).read_text())
        assert [one["prompt"] for one in kept["good"]] == good
        assert [one["prompt"] for one in kept["bad"]] == bad
        assert not any(one["refused"] for one in kept["good"])
        assert sum(one["refused"] for one in kept["bad"]) == (KEPT if refused else 0) or subject == export
        assert stat.S_IMODE(folder.answers_file(subject).stat().st_mode) == 0o600
        assert all(one["answer"] for one in kept["good"] + kept["bad"])

    before = folder.page_file.read_text()
    assert good[0] in before
    assert not any(prompt in before for prompt in bad)
    told = abliterate("report", "--workspace", workspace, "--include-responses").check()
    assert str(folder.answers_page_file) in told.err
    page = folder.answers_page_file.read_text()
    assert all(prompt in page for prompt in bad)
    assert stat.S_IMODE(folder.answers_page_file.stat().st_mode) == 0o600
    assert not any(prompt in folder.page_file.read_text() for prompt in bad)
    mirrored = {path.relative_to(folder.path).parts[0] for path in mirrored_files(folder.path)}
    assert {"report.html", "figures"} <= mirrored
    assert not {"answers", folder.answers_page_file.name} & mirrored


@needs_chromium
def test_what_models_and_prompts_say_is_shown_and_never_run(chromium: Browser, finished: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "runs"
    shutil.copytree(finished, workspace, symlinks=True)
    folder = RunFolder(only_job(workspace))
    for file in folder.path.glob("answers/*.json"):
        kept = json.loads(file.read_text())
        for one in kept["good"] + kept["bad"]:
            one.update(prompt=HOSTILE, answer=HOSTILE * 3)
        file.write_text(json.dumps(kept))
    abliterate("report", "--workspace", workspace, "--include-responses").check()
    view = View(chromium, folder.answers_page_file, size=PHONE)
    assert view.complaints == []
    assert len(view.requests) == 1
    assert view.page.locator("h4").all_inner_texts() == [HOSTILE] * 2 * KEPT
    assert view.page.locator("blockquote").all_inner_texts() == [HOSTILE * 3] * 4 * KEPT
    assert view.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    view.close()


@needs_chromium
def test_a_job_that_fails_has_a_page_that_says_so(chromium: Browser, organism: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "runs"
    arguments = [*job_arguments(organism), "--workspace", workspace, "--trials", 4]
    # Nothing counts as a refusal, which shows only after the model and directions are loaded.
    failed = abliterate("run", *arguments, "--set", 'scoring.refusal_markers=["no such phrase"]')
    failed.fails(3, "refuses none")
    folder = RunFolder(only_job(workspace))
    view = View(chromium, folder.page_file)
    assert view.complaints == []
    text = view.page.locator(".headline").inner_text()
    assert text.startswith("The job failed in the phase search: the base model refuses none")
    assert text.endswith("0 of 4 trials are done.")
    headings = view.page.locator("section h2").all_inner_texts()
    assert headings == ["Directions by layer", "Time and cost", "Preflight", "Provenance"]
    assert axe_complaints(view) == []
    view.close()
    assert "The job failed" in folder.report_file.read_text()
    abliterate("report", "--workspace", workspace).check()
    abliterate("report", "--workspace", workspace, "--include-responses").fails(2, "no responses are kept")
