"""Files of a model in a folder or Hub repository, downloading only what is needed."""

from __future__ import annotations

import glob
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from job.data.folders import link_out
from job.errors import ImpossibleJobError, MachineError
from job.model.config_file import model_config
from job.model.quantization import is_called_quantised
from job.model.safetensors_header import read_header
from job.model.weight_files import (
    ADAPTER,
    INDEX,
    WEIGHTS,
    Headers,
    loaded_weights,
    read_adapter,
    refuse_adapter,
    require_loadable,
)
from job.records import Record
from job.system.hub_client import REPOSITORY, is_offline, with_retries

# Weights in formats that are not used, and the folders that some repositories keep them in.
_LEFT_OUT = frozenset(
    {
        *(".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".tflite", ".mlmodel"),
        *(".pkl", ".pickle", ".joblib", ".npy", ".npz", ".zip", ".gz", ".tar", ".exe", ".so"),
    }
)


@dataclass(frozen=True)
class ModelSource:
    """A parsed MODEL; `revision` is a repository's branch, tag or commit, None for its main branch."""

    kind: Literal["folder", "hub"]
    name: str
    revision: str | None = None

    def describe(self) -> str:
        """Describe the model in words."""
        return (
            f"the Hub's {self.name}" + (f" at {self.revision}" if self.revision else "")
            if self.kind == "hub"
            else self.name
        )


class ModelFile(Record):
    """A file of a model: path within it, and bytes."""

    name: str
    size: int


class ModelListing(Record):
    """What a model consists of.

    Attributes:
        commit: The commit of a repository; None for a folder.
        files: The files that a job needs: all but weights in other formats and what lies in folders.
        gated: Access to a repository has to be granted.
        public: A repository that everybody may see, so that it may be named; False if that cannot be checked.
    """

    commit: str | None = None
    files: tuple[ModelFile, ...]
    gated: bool = False
    public: bool = False

    @property
    def weights(self) -> tuple[ModelFile, ...]:
        """The safetensors files."""
        return tuple(file for file in self.files if file.name.endswith(WEIGHTS))

    @property
    def others(self) -> tuple[ModelFile, ...]:
        """All other files: configuration, tokenizer, template, licence."""
        return tuple(file for file in self.files if not file.name.endswith(WEIGHTS))

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def parse_model(text: str) -> ModelSource:
    """Parse MODEL: an existing folder, or a GGUF file, else ``user/name[@revision]`` on the Hub."""
    matched = REPOSITORY.fullmatch(text)
    if Path(text).exists() or matched is None or text.startswith((".", "/", "~")) or text.endswith(".gguf"):
        return ModelSource("folder", str(Path(text).expanduser()))
    return ModelSource("hub", matched["name"], matched["revision"])


def no_model_folder(source: ModelSource) -> ImpossibleJobError:
    """Return the error for a folder that is not there."""
    return ImpossibleJobError(
        f"there is no model folder {source.name}",
        remedy="give the folder of a model in Hugging Face format, or its name on the Hub",
    )


def refuse_links_out(folder: Path) -> None:
    """Raise ImpossibleJobError for links out of a model folder, except to the Hub cache's own blobs."""
    if not folder.is_dir():
        return
    files = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".") and path.is_file()]
    if link := link_out(folder, files):
        raise ImpossibleJobError(
            f"{link} is a link to a place outside the model folder",
            remedy="replace the link by the file, or give the folder that holds the file",
        )


def list_model(source: ModelSource, commit: str | None, report: Callable[[str], None]) -> ModelListing:
    """List a model's files, at the pinned or current commit. Raises ImpossibleJobError or MachineError."""
    if source.kind == "folder":
        folder = Path(source.name)
        if not folder.is_dir():
            raise no_model_folder(source)
        refuse_links_out(folder)
        return ModelListing(files=_in_folder(folder))
    if is_offline():
        return _cached_listing(source, commit)
    from huggingface_hub import HfApi

    def call() -> Any:
        return HfApi().model_info(source.name, revision=commit or source.revision, files_metadata=True)

    info = with_retries(call, f"model {source.name}", report)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    refuse_adapter(f"model {source.name}", sizes, {} if ADAPTER in sizes else None)

    def index() -> bytes:
        from huggingface_hub import HfFileSystem

        return with_retries(
            lambda: bytes(HfFileSystem().read_bytes(f"{source.name}@{info.sha}/{INDEX}")),
            f"model {source.name}",
            report,
        )

    return ModelListing(
        commit=str(info.sha),
        files=_needed(sizes, loaded_weights(sizes, index)),
        gated=bool(info.gated),
        public=info.private is False,
    )


def is_in_history(source: ModelSource, commit: str, report: Callable[[str], None]) -> bool:
    """Return whether a commit is in the history of a repository's revision.

    Commits of anybody's pull request can be loaded as revisions too, but are in no other history. Raises
    ImpossibleJobError or MachineError.
    """
    from huggingface_hub import HfApi

    commits = with_retries(
        lambda: HfApi().list_repo_commits(source.name, revision=source.revision),
        f"the history of model {source.name}",
        report,
    )
    return any(known.commit_id == commit for known in commits)


def _in_folder(folder: Path) -> tuple[ModelFile, ...]:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    refuse_adapter(str(folder), sizes, read_adapter(folder))
    return _needed(sizes, loaded_weights(sizes, (folder / INDEX).read_bytes))


def _needed(sizes: dict[str, int], weights: Collection[str]) -> tuple[ModelFile, ...]:
    return tuple(
        ModelFile(name=name, size=size)
        for name, size in sorted(sizes.items())
        if "/" not in name
        and not name.startswith(".")
        and (name in weights if name.endswith(WEIGHTS) else Path(name).suffix not in _LEFT_OUT)
    )


def _cached_listing(source: ModelSource, commit: str | None) -> ModelListing:
    folder = _snapshot(source, commit, None, offline=True)
    return ModelListing(commit=folder.name, files=_in_folder(folder))


def fetch_model(
    source: ModelSource,
    listing: ModelListing,
    report: Callable[[str], None],
    *,
    weights: bool = True,
    cache: Path | None = None,
) -> Path:
    """Return a folder with a model's files, downloading missing ones into the Hub's cache, resumably.

    Without `weights` only descriptive files are downloaded. Raises ImpossibleJobError or MachineError.
    """
    if source.kind == "folder":
        refuse_links_out(Path(source.name))
        return Path(source.name)
    names = [file.name for file in (listing.files if weights else listing.others)]
    try:
        return with_retries(
            lambda: _snapshot(source, listing.commit, names, cache=cache), f"model {source.name}", report
        )
    except OSError as error:
        raise MachineError(
            f"cannot write the files of {source.name}: {error.strerror or error}",
            remedy="free disk space, or set HF_HOME to a folder on a larger disk",
        ) from error


def _snapshot(
    source: ModelSource,
    commit: str | None,
    names: Sequence[str] | None,
    *,
    cache: Path | None = None,
    offline: bool = False,
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    found = snapshot_download(
        source.name,
        revision=commit or source.revision,
        allow_patterns=list(map(glob.escape, names)) if names is not None else None,  # a file may be called "*"
        cache_dir=cache,
        local_files_only=offline,
    )
    return Path(found)


def line_speed(source: ModelSource, listing: ModelListing, seconds: float = 2.0, most: int = 8 << 20) -> float | None:
    """Measure the Hub's rate in bytes per second on up to `most` bytes; None for smaller files."""
    largest = max(listing.weights, key=lambda file: file.size, default=None)
    if source.kind == "folder" or largest is None or largest.size < most or is_offline():
        return None
    import httpx2
    from huggingface_hub import HfFileSystem

    path = f"{source.name}@{listing.commit}/{largest.name}"
    begin, got = time.perf_counter(), 0
    try:
        with HfFileSystem().open(path, "rb", block_size=0) as stream:
            begin = time.perf_counter()
            while got < most and (block := stream.read(1 << 18)):
                got += len(block)
                if time.perf_counter() - begin >= seconds:
                    break
    except (OSError, httpx2.HTTPError):
        # A line that broke off has been timed as far as it went; fetching the files will tell what is wrong with it.
        pass
    return got / max(time.perf_counter() - begin, 1e-9) if got else None


def missing_bytes(source: ModelSource, listing: ModelListing) -> int:
    """Return the bytes of a repository's files missing from the Hub's cache; partial files count as present."""
    if source.kind == "folder":
        return 0
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.file_download import repo_folder_name

    missing = sum(
        file.size
        for file in listing.files
        if not isinstance(try_to_load_from_cache(source.name, file.name, revision=listing.commit), str)
    )
    blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=source.name, repo_type="model") / "blobs"
    partial = sum(path.stat().st_size for path in blobs.glob("*.incomplete")) if blobs.is_dir() else 0
    return max(missing - partial, 0)


def headers_if_quantised(
    source: ModelSource, listing: ModelListing, folder: Path, report: Callable[[str], None]
) -> Headers:
    """Return the tensors of a model that config.json calls quantised; none of others, which need no proof.

    `folder` holds config.json; `report` receives every retry. Raises ImpossibleJobError as `tensor_shapes` does.
    """
    return tensor_shapes(source, listing, report) if is_called_quantised(model_config(folder)) else {}


def tensor_shapes(source: ModelSource, listing: ModelListing, report: Callable[[str], None]) -> Headers:
    """Return every tensor's type and shape from safetensors headers. Raises ImpossibleJobError."""
    require_loadable(source.describe(), {file.name for file in listing.files})
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in listing.weights:
        local = source.kind == "folder"
        found |= _header(Path(source.name) / file.name) if local else _remote_header(source, listing, file, report)
    return found


def _header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (entry.dtype, entry.shape) for name, entry in read_header(path).items()}


def _remote_header(
    source: ModelSource, listing: ModelListing, file: ModelFile, report: Callable[[str], None]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return a remote file's tensors, from the cache if it is there and by range requests if not."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    cached = try_to_load_from_cache(source.name, file.name, revision=listing.commit)
    if isinstance(cached, str):
        return _header(Path(cached))

    def call() -> Any:
        return HfApi().parse_safetensors_file_metadata(source.name, file.name, revision=listing.commit)

    metadata = with_retries(call, f"{file.name} of {source.name}", report)
    return {name: (str(info.dtype), tuple(info.shape)) for name, info in metadata.tensors.items()}
