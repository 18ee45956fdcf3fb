"""Delivery of a measured model: its very files, with the measurement and a card that states it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from job.config.schema import Settings
from job.errors import DeliveryError, UsageError, one_line
from job.evaluate.compare import MeasuredPair
from job.export.benchmarks import benchmark_rows
from job.export.merged import copy_licences, seal
from job.export.scorecard import agreement_line, how, scorecard_rows
from job.model.base_card import read_base_card
from job.model.carried_files import carried_files
from job.model.files import parse_model
from job.model.weight_files import checkpoint_files
from job.storage.atomic import cannot_write, make_folder
from job.storage.events import Events
from job.storage.exports import CARD, DONE, MANIFEST, PICTURE, REPRODUCE, SUMS
from job.text.behaviour import HARMLESS, HARMLESS_REFUSAL, words_of
from job.text.markup import markdown_table
from job.text.redaction import redacted
from job.text.templates import template
from job.upload.targets import deliver

MEASUREMENT = "measurement.json"
# What quantisers leave beside the weights.
_QUANTISERS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_SECTION = "\n## Measured\n"
# Written anew for each delivery.
_OWN = frozenset({CARD, DONE, MANIFEST, MEASUREMENT, REPRODUCE, SUMS})


def require_deliverable(models: Sequence[str]) -> None:
    """Raise UsageError if models are not one whose files could be delivered."""
    if len(models) > 1:
        raise UsageError("--upload delivers one model", remedy="give one MODEL, or leave out --upload")
    (model,) = models
    if parse_model(model).kind != "folder":
        raise UsageError(f"{model} is on the Hub already", remedy="leave out --upload, or give a folder or file")


def deliver_measured(measured: MeasuredPair, settings: Settings, events: Events) -> None:
    """Deliver the measured files with card and measurement to all targets. Raises DeliveryError or MachineError.

    A folder beside the model holds them meanwhile as hard links, and stays if a delivery fails: another one goes on.
    """
    path = measured.edited.path.absolute()
    folder = path.with_name(f".{path.name}.delivery")
    try:
        _fill(folder, [path] if path.is_file() else _files_of_model(path, settings))
        if measured.base.path.is_dir():
            copy_licences(measured.base.path, folder)
        seal(folder, lambda _: _described(measured, settings))
    except OSError as error:
        raise cannot_write(Path(error.filename or folder), error) from error
    failed = [reason for target in settings.upload if (reason := _failure(folder, target, settings, path.name, events))]
    if failed:
        raise DeliveryError("; ".join(failed), remedy="run the same command again: what has arrived is not sent again")
    shutil.rmtree(folder, ignore_errors=True)


def _failure(folder: Path, target: str, settings: Settings, name: str, events: Events) -> str:
    total = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    try:
        with events.progress(f"bytes to {target}", total) as advance:
            deliver(
                folder,
                target,
                settings,
                state=folder / ".uploads",
                message=f"{name}, measured by abliteration-job",
                report=events.say,
                progress=advance,
            )
    except DeliveryError as error:
        return f"{target}: {error.line}"
    events.say(f"delivered {name} to {target}")
    return ""


def _files_of_model(folder: Path, settings: Settings) -> list[Path]:
    """Return what loading the model needs: other files of the folder may be private."""
    others = carried_files(folder, code=settings.loading.trust_remote_code)
    quantiser = [file for name in _QUANTISERS if (file := folder / name).is_file()]
    return list(dict.fromkeys([*others, *quantiser, *_picture(folder), *checkpoint_files(folder)]))


def _picture(folder: Path) -> list[Path]:
    """Return the picture that the folder's own card shows, if it does."""
    card, picture = folder / CARD, folder / PICTURE
    shown = card.is_file() and f"]({PICTURE})" in card.read_text(encoding="utf-8", errors="replace")
    return [picture] if shown and picture.is_file() else []


def _files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def _fill(folder: Path, files: Sequence[Path]) -> None:
    """Put files into a folder in place of what it holds; records of begun uploads stay."""
    make_folder(folder)
    (folder / DONE).unlink(missing_ok=True)
    for old in _files_of(folder):
        old.unlink()
    for file in files:
        if file.name in _OWN:
            continue
        try:
            os.link(file.resolve(), folder / file.name)
        except OSError:  # another file system, or one without links
            shutil.copyfile(file, folder / file.name)


def _described(measured: MeasuredPair, settings: Settings) -> Mapping[str, bytes]:
    """Return figures and card by file name, without local paths or private names."""
    given, base = measured.comparison, measured.base
    is_local = parse_model(given.against).kind == "folder"
    named: dict[str, Any] = {
        "model": measured.edited.path.name,
        "against": base.repository or (base.path.name if is_local else "a private model"),
    }
    if given.text is not None and measured.own_text:
        named["text"] = given.text.model_copy(update={"source": "a text of the user's"})
    if given.detectors is not None:
        failed = dict.fromkeys(given.detectors.failed, "could not be used")
        named["detectors"] = given.detectors.model_copy(update={"failed": failed})
    found = given.model_copy(update=named)
    texts = {MEASUREMENT: found.model_dump_json(indent=2) + "\n", CARD: _card(measured, settings)}
    return {name: text.encode() for name, text in texts.items()}


def _card(measured: MeasuredPair, settings: Settings) -> str:
    """Return the card: the folder's own one with a section of figures, else a whole one."""
    found, path = measured.comparison, measured.edited.path
    base_model = settings.card.base_model or measured.base.repository
    own, words = path / CARD, words_of(settings.card.behaviour)
    earlier = (
        own.read_text(encoding="utf-8", errors="replace").partition(_SECTION)[0].rstrip() if own.is_file() else None
    )
    section = template("job.evaluate", "measured_card.md").render(
        own=earlier,
        metadata=_metadata(measured, base_model, settings.card.behaviour),
        title=one_line(path.stem if path.is_file() else path.name),
        base_model=base_model,
        behaviour=settings.card.behaviour,
        words=words,
        found=found,
        figures=markdown_table(scorecard_rows(found.base, found.edited, words)),
        scores=markdown_table(benchmark_rows(found.scores)) if found.scores else "",
        measurement=MEASUREMENT,
        how=how(words, likelihood=False),
        agreement=agreement_line(found.detectors, words) if found.detectors else "",
        harmless=settings.card.behaviour in HARMLESS,
        only_harmless=settings.card.behaviour == HARMLESS_REFUSAL,
    )
    return section if earlier is None else f"{earlier}\n{section}"


def _metadata(measured: MeasuredPair, base_model: str | None, behaviour: str) -> str:
    from huggingface_hub import ModelCardData

    inherited: dict[str, Any] = redacted(read_base_card(measured.base.path, base_model).metadata)
    data = ModelCardData(
        **inherited,
        library_name=None if measured.edited.form == "gguf" else "transformers",
        pipeline_tag="text-generation",
        base_model=base_model,
        tags=["abliterated", *(["not-for-all-audiences"] if behaviour not in HARMLESS else [])],
    )
    return data.to_yaml().strip()
