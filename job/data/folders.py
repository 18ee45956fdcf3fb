"""Folders of prompts: plain files, clones of dataset repositories, and datasets saved by `datasets`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from job.data.files import PLAIN, SUFFIXES, TABLES, Row, file_rows
from job.errors import ImpossibleJobError, explaining, in_one_line
from job.text.card_header import require_plain_header

_CARD = "README.md"
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")
# Descriptions in dataset repositories, which are not prompts.
_DESCRIPTIONS = frozenset({"dataset_infos.json", "config.json", "dummy_data.zip"})
_MESSAGE_CHARACTERS = 300


def is_saved(folder: Path) -> bool:
    """Return whether a folder was saved by `datasets`."""
    return any((folder / name).exists() for name in _SAVED)


def link_out(folder: Path, paths: Iterable[Path]) -> Path | None:
    """Return the first of a folder's paths that a link leads out of it, except to the Hub cache's own blobs."""
    root = folder.resolve()
    snapshot = next((place for place in (root, *root.parents) if place.parent.name == "snapshots"), None)
    inside = [root] if snapshot is None else [root, (snapshot.parent.parent / "blobs").resolve()]
    return next((path for path in paths if not any(path.resolve().is_relative_to(place) for place in inside)), None)


def folder_files(folder: Path, split: str, config: str | None) -> list[Path]:
    """Return the prompt files of a folder, or of a clone's split and config.

    Raises ImpossibleJobError without any, or for a link out of the folder: clones of others may hold links.
    """
    files = _folder_files(folder, split, config)
    if link := link_out(folder, files):
        raise ImpossibleJobError(
            f"{link} is a link to a place outside the folder of prompts",
            remedy="replace the link by the file, or give the folder that holds the file",
        )
    return files


def _folder_files(folder: Path, split: str, config: str | None) -> list[Path]:
    if is_saved(folder):
        return sorted(path for path in folder.rglob("*") if path.is_file())
    if config is not None or _is_repository(folder):
        return _split_files(folder, split, config)
    for suffixes in (PLAIN, TABLES):
        if files := [path for path in _visible(folder) if path.suffix.lower() in suffixes]:
            return files
    if any(path.suffix.lower() in SUFFIXES for path in folder.rglob("*") if path.is_file()):
        return _split_files(folder, split, None)
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
    raise ImpossibleJobError(
        f"the folder {folder} holds no prompts (it holds {there})", remedy=f"give {', '.join(SUFFIXES)} files"
    )


def _visible(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.name not in _DESCRIPTIONS and not path.name.startswith(".")
    )


def left_out(folder: Path) -> list[str]:
    """Return the names of unread tables, ignored because the folder also holds plain files."""
    if is_saved(folder) or _is_repository(folder):
        return []
    kinds = [{path.name for path in _visible(folder) if path.suffix.lower() in kind} for kind in (PLAIN, TABLES)]
    return sorted(kinds[1]) if kinds[0] else []


def _is_repository(folder: Path) -> bool:
    """Return whether a folder is a clone of a dataset repository, whose files belong to splits."""
    cloned = all((folder / name).is_file() for name in (_CARD, ".gitattributes"))
    return cloned or bool(_card_configs(folder))


def _card_configs(folder: Path) -> dict[str, object]:
    card = folder / _CARD
    remedy = "correct its first block, or name the files themselves as prompts"
    with _explained(f"the card {card} cannot be read", remedy):  # the libraries may raise anything for a card
        if not card.is_file() or link_out(folder, [card]):
            return {}
        require_plain_header(card)
        if b"configs:" not in card.read_bytes():
            return {}
        return _declared(card)


def _declared(card: Path) -> dict[str, object]:
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCardData
    from huggingface_hub.repocard import RepoCard

    data = RepoCard.load(card, ignore_metadata_errors=False).data.to_dict()
    configs = MetadataConfigs.from_dataset_card_data(DatasetCardData(**{"configs": data.get("configs")}))
    return {name: found.get("data_files") for name, found in configs.items()}


def _split_files(folder: Path, split: str, config: str | None) -> list[Path]:
    """Return the files of a split of a cloned dataset repository, as `datasets` would find them."""
    import datasets
    from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns

    datasets.disable_progress_bars()
    root = folder.resolve()
    declared = _card_configs(folder)
    # The library may raise anything for a card's patterns.
    with _explained(f"the files of the dataset in {folder} cannot be found", "name the files themselves as prompts"):
        patterns = sanitize_patterns(_chosen(folder, declared, config) or get_data_patterns(str(root)))
        _refuse_patterns_out(folder, itertools.chain.from_iterable(patterns.values()))
        found = DataFilesDict.from_patterns(patterns, base_path=str(root))
    by_split = {name: [path for path in map(str, paths) if _is_data(path)] for name, paths in found.items()}
    names = [str(name) for name, paths in by_split.items() if paths]
    if split not in names:
        raise ImpossibleJobError(
            f"the dataset in {folder} has no split {split}",
            remedy=f"choose from {', '.join(names)} as #SPLIT" if names else f"give {', '.join(SUFFIXES)} files",
        )
    return [Path(path) for path in by_split[split]]


def _refuse_patterns_out(folder: Path, patterns: Iterable[object]) -> None:
    """Raise ImpossibleJobError for a card's pattern of other places: finding its files would reach or search them."""
    for pattern in map(str, patterns):
        if pattern.startswith(("/", "~")) or "::" in pattern or "://" in pattern or ".." in Path(pattern).parts:
            raise ImpossibleJobError(
                f"the card of {folder} names {pattern}, which is outside that folder",
                remedy="give the prompt files themselves",
            )


def _is_data(path: str) -> bool:
    return Path(path).suffix.lower() in SUFFIXES and Path(path).name not in _DESCRIPTIONS


def _chosen(folder: Path, declared: dict[str, object], config: str | None) -> object:
    if not declared and config is None:
        return None
    name = config or ("default" if "default" in declared else next(iter(declared)) if len(declared) == 1 else None)
    if name not in declared:
        has = f"has no configuration {name}" if name else "needs a configuration"
        raise ImpossibleJobError(
            f"the dataset in {folder} {has} ({', '.join(declared) or 'its card declares none'})",
            remedy=f"name it: {folder.absolute()}:CONFIG#SPLIT" if declared else "leave it out",
        )
    return declared[name]


def folder_rows(folder: Path, split: str, config: str | None) -> Iterator[Row]:
    """Yield a folder's rows. Raises ImpossibleJobError if it holds no prompts, or a file cannot be read."""
    files = folder_files(folder, split, config)
    if is_saved(folder):
        return _saved_rows(folder, split)
    return itertools.chain.from_iterable(map(file_rows, files))


def _saved_rows(folder: Path, split: str) -> Iterator[Row]:
    import datasets

    what = f"the dataset saved in {folder} cannot be read"
    remedy = "save it again with this version of `datasets`, or give its rows as .jsonl"
    with _explained(what, remedy, named=True):
        saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ImpossibleJobError(
                f"{folder} has no split {split}", remedy=f"choose from {', '.join(saved)} as #SPLIT"
            )
        saved = saved[split]
    with _explained(what, remedy, named=True):
        for number, cells in enumerate(saved):
            yield Row(f"row {number}", cells)


def _explained(what: str, remedy: str, *, named: bool = False) -> AbstractContextManager[None]:
    """Turn errors of `datasets` into one line, with their type if `named`."""

    def explain(error: BaseException) -> ImpossibleJobError:
        kind = f"{type(error).__name__}: " if named else ""
        return ImpossibleJobError(f"{what}: {kind}{in_one_line(error, _MESSAGE_CHARACTERS)}", remedy=remedy)

    return explaining(explain)
