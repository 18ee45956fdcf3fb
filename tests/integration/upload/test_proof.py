"""Whether a target or a mirror still holds its data, checked on servers, including ones that lost data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.config.load import load_settings
from job.config.schema import Settings
from job.mirror import MirrorError
from job.records import Manifest
from job.storage.atomic import read_record, sha256_file, write_record
from job.storage.exports import DONE, MANIFEST
from job.upload.hub import HubOptions
from job.upload.hub import deliver as to_hub
from job.upload.proof import delivery_problem
from job.upload.s3 import deliver as to_s3
from tests.fakes.s3_server import BUCKET, make_export
from tests.mirror_places import TOKEN, file_place, hub_place, place, running, s3_place
from tests.mirrors import JOB, Place, write_folder

__all__ = ["file_place", "hub_place", "place", "running", "s3_place"]

# Warnings of the Hub client's HTTP library about the client's uploads.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

FILES = {"config.json": 300, "tokenizer.json": 5_000, "model.safetensors": 300_000}


def sealed(folder: Path) -> tuple[Path, str]:
    """Return an export and its manifest's sha256."""
    export = make_export(folder, FILES)
    (export / DONE).write_text(sha256_file(export / MANIFEST) + "\n")
    return export, sha256_file(export / MANIFEST)


def settings(**given: Any) -> Settings:
    return load_settings({"model": "cook/soup", **given}).settings


def test_a_delivery_to_a_bucket_is_looked_at_anew(s3_place: Place, tmp_path: Path) -> None:
    export, manifest = sealed(tmp_path / "export")
    target = f"s3://{BUCKET}/mirrors/edited"
    to_s3(export, target, tmp_path / "state", s3_place.s3)
    endpoint = {"s3.endpoint": s3_place.server.url, "s3.addressing_style": "path", "s3.region": "us-east-1"}

    def problem(sha256: str = manifest) -> str:
        return delivery_problem(target, sha256, settings(**endpoint))

    assert problem() == ""
    assert "another export's" in problem("0" * 64)
    whole = s3_place.contents()
    s3_place.put("edited/tokenizer.json", b"x" * 5_000)  # a foreign file of the same size
    assert "tokenizer.json is not what was delivered" in problem()
    s3_place.put("edited/model.safetensors", None)
    s3_place.put("edited/tokenizer.json", None)
    assert "is missing" in problem()
    s3_place.put("edited/manifest.json", None)
    assert "there is no manifest.json" in problem()
    assert len(whole) == 4
    assert "no-such-bucket" in delivery_problem("s3://no-such-bucket/x", manifest, settings(**endpoint))


@pytest.mark.parametrize("pull_request", [False, True])
def test_a_delivery_to_the_hub_is_looked_at_anew(hub_place: Place, tmp_path: Path, pull_request: bool) -> None:
    export, manifest = sealed(tmp_path / "export")
    target = "hf://cook/edited"
    options = HubOptions(token=TOKEN, pull_request=pull_request)
    to_hub(export, target, options, report=print, progress=lambda _: None)
    found = settings(**{"hub.pull_request": pull_request})
    assert delivery_problem(target, manifest, found) == ""
    assert "another export's" in delivery_problem(target, "0" * 64, found)
    said = "not on the Hub" if pull_request else "no such repository"
    assert said in delivery_problem("hf://cook/nothing", manifest, found)
    if pull_request:
        return
    repo = hub_place.server.repo("model", "cook/edited")
    repo.commit({"config.json": b"{}"})
    assert "config.json is not what was delivered" in delivery_problem(target, manifest, found)
    repo.commit({"model.safetensors": None})
    assert "edited: " in delivery_problem(target, manifest, found)
    repo.commit({"manifest.json": None})
    assert "there is no manifest.json" in delivery_problem(target, manifest, found)


def lose_object(place: Place, name: str) -> None:
    place.put(name, None)


def garble_object(place: Place, name: str) -> None:
    place.put(name, place.contents()[name][:-1] + b"?")


@pytest.mark.parametrize("meddle", [lose_object, garble_object])
def test_a_mirror_is_read_back(place: Place, tmp_path: Path, meddle: Callable[[Place, str], None]) -> None:
    run = write_folder(tmp_path / JOB, large=20_000)
    claim = place.claim(run.path)
    claim.start()
    assert claim.close()
    with place.mirror() as mirror:
        assert mirror.shortfall(run) == ""
        assert mirror.other_holder(JOB) is None
        run.report_file.write_text("# later\n")
        assert "lacks the latest report.md" in mirror.shortfall(run)
        run.report_file.write_text("# report\n")
        name = next(name for name, data in sorted(place.contents().items()) if data == run.report_file.read_bytes())
        meddle(place, name)
        try:
            problem = mirror.shortfall(run)
        except MirrorError as error:
            problem = str(error)
        assert "report.md" in problem


def test_a_mirror_that_holds_nothing_says_so(place: Place, tmp_path: Path) -> None:
    run = write_folder(tmp_path / JOB, large=20_000)
    claim = place.claim(run.path)
    claim.start()
    assert claim.close(final=False)
    with place.mirror() as mirror:
        assert "no snapshot" in mirror.shortfall(run)


def test_the_manifest_of_a_delivery_is_written_down(tmp_path: Path) -> None:
    from job.records import Figures
    from job.storage.events import Events
    from job.storage.run_folder import RunFolder
    from job.upload.targets import deliver_to_all

    folder = RunFolder(tmp_path / "job")
    export, manifest = sealed(folder.export_folder(1, "merged"))
    folder.figures_file("x").parent.mkdir()
    figures = Figures(bad_prompts=1, refusals=0, good_prompts=1, false_refusals=0)
    write_record(folder.figures_file(export.name), figures)
    target = (tmp_path / "out").as_uri()
    assert deliver_to_all(folder, export, settings(upload=[target]), Events()) == []
    assert [one.manifest for one in folder.read_uploads()] == [manifest]
    assert delivery_problem(target, manifest, settings()) == ""
    assert read_record(export / MANIFEST, Manifest).files.keys() == FILES.keys()
