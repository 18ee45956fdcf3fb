"""A model to measure, loaded as people will run it: plain, GGUF, quantised files, or quantised while it is loaded."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoConfig, GgufConfig, PreTrainedModel

from job.architectures.spec import Architecture
from job.architectures.structure import architecture_of
from job.config.sections import LoadingSettings
from job.errors import ImpossibleJobError, UsageError
from job.generation.forward import first_logits
from job.model.bnb import LoadIn, bitsandbytes_config
from job.model.config_file import model_config
from job.model.dequantization import forget_quantisation
from job.model.devices import resolve_device
from job.model.files import ModelListing, ModelSource, fetch_model, list_model, parse_model
from job.model.gguf_files import GGUF, gguf_tokenizer, gguf_types, reading_gguf
from job.model.loading import (
    LoadedModel,
    first_working,
    load_model,
    load_tokenizer,
    prepare_transformers,
    read_config,
    read_weights,
)
from job.model.quantization import METHODS, method_of
from job.model.weight_files import checkpoint_files, stored_tensors
from job.records.evaluation import Reading
from job.storage.atomic import sha256_file
from job.system.extras import require_extra

_BITSANDBYTES, _COMPRESSED = "bitsandbytes", "compressed-tensors"
# The package by which transformers reads the files of a method.
_READERS = {_BITSANDBYTES: "bitsandbytes", _COMPRESSED: "compressed_tensors"}
_NOTES: dict[str, str] = {
    _BITSANDBYTES: "bitsandbytes computed with the weights as they are stored",
    _COMPRESSED: "weights and activations were rounded as the files say, and multiplied in {dtype}: kernels for such "
    "types may round otherwise",
    "bnb-4bit": "bitsandbytes rounded the weights to 4 bits (NF4) while they were loaded",
    "bnb-8bit": "bitsandbytes rounded the weights to 8 bits while they were loaded",
    "gguf": "transformers dequantised the weights to {dtype}: this is not llama.cpp's arithmetic, whose figures may "
    "differ",
    **dict.fromkeys(
        METHODS,
        "the weights were dequantised to {dtype}: kernels for such types, which may also round activations, were not "
        "used",
    ),
}


@dataclass(frozen=True)
class Subject:
    """A model's folder or GGUF file, and how it is quantised.

    Attributes:
        form: "" for plain weights, "gguf", a bitsandbytes type, or the method that config.json names.
        repository: Its public repository on the Hub; None for folders and private ones.
    """

    path: Path
    form: str = ""
    load_in: LoadIn | None = None
    repository: str | None = None

    @property
    def files(self) -> list[Path]:
        """The weight files."""
        return [self.path] if self.form == "gguf" else checkpoint_files(self.path)

    def load(self, settings: LoadingSettings, report: Callable[[str], None], dtype: str | None = None) -> LoadedModel:
        """Load it; a quantised one computes in `dtype`, if given. Raises ImpossibleJobError or MachineError."""
        report(f"loading {self.path}")
        if self.form in ("", *METHODS):
            return load_model(self.path, settings, report, dtype=dtype if self.form else None)
        prepare_transformers()
        dtypes: list[str] = [dtype] if dtype else list(dict.fromkeys(settings.dtypes))
        load = _load_gguf if self.form == "gguf" else self._load_quantised
        return load(self.path, settings, dtypes, report)

    def _load_quantised(
        self, folder: Path, settings: LoadingSettings, dtypes: list[str], report: Callable[[str], None]
    ) -> LoadedModel:
        if package := _READERS.get(self.form):
            require_extra(package, f"reading {self.form} weights")
        device, trusted = resolve_device(settings.device), settings.trust_remote_code

        def weights(dtype: str) -> PreTrainedModel:
            config = read_config(folder, trusted)
            how = {"config": config, "quantization_config": bitsandbytes_config(self.load_in or "none")}
            with contextlib.redirect_stderr(io.StringIO()):  # compressed-tensors draws bars that cannot be disabled
                model = read_weights(folder, [file.name for file in self.files], dtype, device, settings, how)
                if getattr(model, "hf_quantizer", None) is None:  # it took quantised values for weights
                    raise ImpossibleJobError(
                        f"transformers cannot read {folder}, quantised with {self.form}",
                        remedy="measure a file in another form, or use a version of transformers that knows this one",
                    )
                if self.form == _COMPRESSED:
                    first_logits(model, [[0]])  # it unpacks its weights in the first forward
            return model

        def structure(_: PreTrainedModel) -> Architecture:
            # Of plain weights: quantised modules have other parameters.
            config = read_config(folder, trusted)
            forget_quantisation(config)
            return architecture_of(config)

        tokenizer = load_tokenizer(folder, trusted)
        return first_working(folder, tokenizer, dtypes, weights, report, structure=structure)

    def reading(self, dtype: str) -> Reading | None:
        """Return how it was stored and read, None for plain weights; `dtype` is that of its arithmetic."""
        if not self.form:
            return None
        if self.form == "gguf":
            types = gguf_types(self.path)
        else:
            types = dict(Counter(kind for kind, _ in stored_tensors(self.path).values()).most_common())
        note = _NOTES.get(self.form, "transformers read the files with its own reader for this form")
        return Reading(
            form=self.form,
            types=types,
            sha256={file.name: sha256_file(file) for file in self.files},
            note=note.format(dtype=dtype),
        )


@dataclass(frozen=True)
class LocatedModel:
    """A model that is known to be there and is not downloaded yet; `listing` is None for a GGUF file."""

    name: str
    source: ModelSource
    listing: ModelListing | None


def locate(name: str, report: Callable[[str], None]) -> LocatedModel:
    """Find the model of a folder, a GGUF file or a Hub name. Raises ImpossibleJobError or MachineError."""
    source = parse_model(name)
    if source.name.endswith(GGUF) and source.kind == "folder":
        if not Path(source.name).is_file():
            raise ImpossibleJobError(f"there is no file {source.name}", remedy="give the path of a GGUF file")
        return LocatedModel(name, source, None)
    return LocatedModel(name, source, list_model(source, None, report))


def fetch_subject(located: LocatedModel, load_in: LoadIn | None, report: Callable[[str], None]) -> Subject:
    """Return a located model, downloaded if needed.

    Raises UsageError if it cannot be quantised while it is loaded, ImpossibleJobError or MachineError.
    """
    source, listing = located.source, located.listing
    if listing is None:
        found = Subject(Path(source.name), "gguf")
    else:
        folder = fetch_model(source, listing, report)
        public = source.name if source.kind == "hub" and listing.public else None
        form = method_of(model_config(folder), stored_tensors(folder)) or ""
        found = Subject(folder, form, repository=public)
    if load_in is None:
        return found
    if found.form:
        raise UsageError(f"{located.name} is quantised already ({found.form})", remedy="leave out --load-in")
    return replace(found, form=load_in, load_in=load_in)


def _load_gguf(file: Path, settings: LoadingSettings, dtypes: list[str], report: Callable[[str], None]) -> LoadedModel:
    tokenizer, device = gguf_tokenizer(file), resolve_device(settings.device)
    with reading_gguf(file) as source:
        config = AutoConfig.from_pretrained(file.parent, **source)

    def weights(dtype: str) -> PreTrainedModel:
        with reading_gguf(file) as source:
            # Nothing else that transformers could do computes as llama.cpp does.
            how = {"config": config, "quantization_config": GgufConfig(dequantize=True), "use_safetensors": None}
            how["gguf_file"] = source["gguf_file"]
            return read_weights(file.parent, [file.name], dtype, device, settings, how)

    return first_working(file, tokenizer, dtypes, weights, report)
