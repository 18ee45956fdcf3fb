"""Load a model in a working dtype, with its tokenizer."""

from __future__ import annotations

import atexit
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from job.architectures.spec import Architecture
from job.architectures.structure import discover
from job.architectures.tiny_model import auto_class, empty_model
from job.config.sections import LoadingSettings
from job.data.prompts import Prompt
from job.errors import ImpossibleJobError, JobError, UsageError, in_one_line
from job.generation.batching import BatchingSupport
from job.generation.forward import first_logits, input_device
from job.generation.greedy import greedy_answers
from job.model.attention import disable_cudnn_attention, probe_prompts, proven_batching
from job.model.bnb import bitsandbytes_config
from job.model.config_file import CONFIG, GENERATION, model_config
from job.model.dequantization import plain_loading_config
from job.model.device_faults import Shortage, within_memory
from job.model.devices import resolve_device
from job.model.finite_weights import infinite_parameter, require_finite
from job.model.fit import require_fit, unloadable, untied
from job.model.memory import keep_freed_memory
from job.model.output_head import make_head_inputs_contiguous
from job.model.placement import spread
from job.model.rendering import PLAIN, Rendering, conversations, end_of_turn, reading_tokenizer, token_ids
from job.model.user_files import damaged, reading
from job.model.weight_files import checkpoint_files
from job.records import LARGE_BYTES
from job.system.tempdirs import scratch
from job.text.decoding import decoded

TEMPLATE_FILE = "chat_template.json"
# What a model that has just been loaded is asked.
GREETING = Prompt(user="Hello, how are you?")
# What a config.json may choose of attention and experts: code that transformers itself holds.
_KERNELS = {"_attn_implementation": ("eager", "sdpa"), "_experts_implementation": ("eager", "batched_mm", "grouped_mm")}
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_PLACE = re.compile(r"cpu|mps|disk|cuda(:\d+)?")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to measure and edit.

    Attributes:
        dtype: Floating-point type of its weights, e.g. "bfloat16".
        prefix_tokens: Its token ids; None: tokenized with the prompt, as a given text is.
        turn_end: End token beyond the model's own; None without one.
    """

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    architecture: Architecture
    dtype: str
    response_prefix: str = ""
    prefix_tokens: tuple[int, ...] | None = None
    rendering: Rendering = PLAIN
    turn_end: int | None = None

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""
        return input_device(self.model)

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a response in generation."""
        configured = self.model.generation_config.eos_token_id if self.model.generation_config else None
        listed = configured if isinstance(configured, list) else [configured]
        return frozenset(int(t) for t in (*listed, self.tokenizer.eos_token_id, self.turn_end) if isinstance(t, int))

    def ending_its_turn(self) -> LoadedModel:
        """Add the template's end-of-turn token to the end tokens."""
        token = end_of_turn(self.tokenizer, self.rendering)
        return self if token is None or token in self.end_tokens else replace(self, turn_end=token)

    def tokenize(self, prompts: Iterable[Prompt]) -> list[list[int]]:
        """Return each prompt's token ids, up to the response. Raises ImpossibleJobError."""
        given, tokens = (self.response_prefix, ()) if self.prefix_tokens is None else ("", self.prefix_tokens)
        texts = [text + given for text in conversations(self.tokenizer, prompts, self.rendering)]
        # The template has written the special tokens already.
        return [[*ids, *tokens] for ids in token_ids(self.tokenizer, texts)]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return a response's text."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


def load_model(
    folder: Path,
    settings: LoadingSettings,
    report: Callable[[str], None],
    dtype: str | None = None,
    rendering: Rendering = PLAIN,
) -> LoadedModel:
    """Load a model in the first working dtype, or only `dtype`. Raises ImpossibleJobError or MachineError."""
    model_config(folder)  # both refuse what could not be loaded
    checkpoint_files(folder)
    device = resolve_device(settings.device)

    def load(candidate: str) -> PreTrainedModel:
        return _load_weights(folder, candidate, device, settings)

    prepare_transformers()
    tokenizer = load_tokenizer(folder, settings.trust_remote_code)
    candidates = [dtype] if dtype else list(dict.fromkeys(settings.dtypes))
    loaded = first_working(folder, tokenizer, candidates, load, report, rendering)
    for name in untied(loaded.model):
        report(
            f"warning: {CONFIG} ties {name} to the embedding, but the files hold different values, which are used. "
            "Other programs may use the embedding: set tie_word_embeddings to false"
        )
    return loaded


def prepare_transformers() -> None:
    """Set transformers and torch up for loading models."""
    quieten_transformers()
    disable_cudnn_attention()


def first_working(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    dtypes: Sequence[str],
    load: Callable[[str], PreTrainedModel],
    report: Callable[[str], None],
    rendering: Rendering = PLAIN,
    structure: Callable[[PreTrainedModel], Architecture] = discover,
) -> LoadedModel:
    """Return the model that `load` makes in the first dtype in which it generates.

    Raises ImpossibleJobError or MachineError.
    """
    for dtype in dtypes:
        model = load(dtype).eval()
        model.requires_grad_(False)
        name = str(model.dtype).removeprefix("torch.")
        loaded = LoadedModel(folder, model, tokenizer, structure(model), name, rendering=rendering)
        try:
            loaded = _proven(loaded, report)
        except _DtypeFault as fault:
            if "not finite" in str(fault) and folder.is_dir():
                require_finite(folder)  # they may be finite in the files, and not in this dtype
            report(f"dtype {dtype} does not work: {fault}")
            continue
        if loaded.device.type == "cpu" and model.get_memory_footprint() < LARGE_BYTES:
            keep_freed_memory()
        return loaded
    raise ImpossibleJobError(
        f"{folder} does not generate in any of the dtypes {', '.join(dtypes)}",
        remedy="allow others with --set loading.dtypes='[\"float32\"]'",
    )


def quieten_transformers() -> None:
    """Hide transformers' progress bars and advice; its errors remain exceptions."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("accelerate.big_modeling", "bitsandbytes"):  # the latter advises to install code from the Hub
        logging.getLogger(name).setLevel(logging.ERROR)


def read_config(folder: Path, trusted: bool = False) -> PretrainedConfig:
    """Return the configuration of a model folder, as transformers understands it.

    `trusted` allows the model's own code. Raises ImpossibleJobError if the folder is no model, or transformers does not
    know its family or refuses a value.
    """
    quieten_transformers()
    known = str(model_config(folder).get("model_type")) in CONFIG_MAPPING
    remedy = f"correct {CONFIG}" if known else "use a model of a family that the installed transformers supports"
    with reading(folder, (CONFIG,), "cannot be used", f"{remedy}, or obtain an undamaged copy"):
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted)
        except Exception as error:
            if "trust_remote_code" not in str(error):
                raise
            raise ImpossibleJobError(
                f"{folder} belongs to a family that needs the model's own code",
                remedy="read that code and, if you trust it, give --set loading.trust_remote_code=true",
            ) from error
    if (folder / GENERATION).is_file():
        with reading(
            folder, (GENERATION,), "cannot be used", f"obtain an undamaged copy of {GENERATION}, or delete it"
        ):
            GenerationConfig.from_pretrained(folder, local_files_only=True)
    if not trusted:
        _use_own_kernels(config)
    return config


def _use_own_kernels(config: PretrainedConfig) -> None:
    """Reset implementations beyond PyTorch's own: transformers would fetch and run code that a file names."""
    for name, known in _KERNELS.items():
        if getattr(config, name, None) not in (None, *known):
            setattr(config, name, None)  # the default of the family
    for key in config.sub_configs:
        if isinstance(below := getattr(config, key, None), PretrainedConfig):
            _use_own_kernels(below)


def load_tokenizer(folder: Path, trusted: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer; its own code runs only if trusted. Raises ImpossibleJobError without a chat template."""
    with reading_tokenizer(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted)
        _try(tokenizer)
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        raise ImpossibleJobError(
            f"{folder} has several chat templates ({', '.join(tokenizer.chat_template)}), and none is named default",
            remedy="copy the one for conversations into chat_template.jinja",
        )
    if not tokenizer.chat_template:
        tokenizer.chat_template = _template_beside(folder)
    if not tokenizer.chat_template:
        raise ImpossibleJobError(
            f"the tokenizer of {folder} has no chat template",
            remedy="use the chat or instruct version of the model, or add chat_template.jinja",
        )
    return tokenizer


def _try(tokenizer: PreTrainedTokenizerBase) -> None:
    """Use a tokenizer once, to find damaged files now. Raises TypeError if a token or the template is no text."""
    if not all(isinstance(text, str) for text in tokenizer.all_special_tokens):
        raise TypeError("a special token is not text")
    if not isinstance(tokenizer.chat_template, str | dict | None):
        raise TypeError("the chat template is not text")
    known = {*tokenizer.all_special_ids, tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}
    ids = [*tokenizer(GREETING.user)["input_ids"], *(token for token in known if token is not None)]
    tokenizer.decode(ids, skip_special_tokens=True)


def _template_beside(folder: Path) -> str | None:
    """Return the template in chat_template.json, of multimodal processors. Raises ImpossibleJobError."""
    file = folder / TEMPLATE_FILE
    if not file.is_file():
        return None
    try:
        template = json.loads(decoded(file.read_bytes()))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(file, error) from error
    return template if isinstance(template, str) else None


def _load_weights(folder: Path, dtype: str, device: torch.device, settings: LoadingSettings) -> PreTrainedModel:
    config = read_config(folder, settings.trust_remote_code)
    how = {
        "config": plain_loading_config(folder, config, settings.quantization),
        "quantization_config": bitsandbytes_config(settings.quantization),
    }
    return read_weights(folder, [file.name for file in checkpoint_files(folder)], dtype, device, settings, how)


def read_weights(
    folder: Path,
    files: Sequence[str],
    dtype: str,
    device: torch.device,
    settings: LoadingSettings,
    how: Mapping[str, Any],
) -> PreTrainedModel:
    """Load weights onto their devices; `how` are further arguments of `from_pretrained`, among them the config.

    Raises ImpossibleJobError or MachineError.
    """
    config = how["config"]
    # Straight onto the device: by way of the RAM, all weights would have to fit there first.
    places: Any = {"": device} if settings.device_map == "single" else settings.device_map
    if isinstance(settings.device_map, dict):
        places = _adapted_device_map(config, settings.device_map)
    limits = {int(name) if name.isdigit() else name: size for name, size in (settings.max_memory or {}).items()}
    try:
        load = partial(
            (auto_class(config) or AutoModelForCausalLM).from_pretrained,
            folder,
            dtype=dtype,
            device_map=places,
            max_memory=limits or None,
            offload_folder=_offload_folder(settings),
            local_files_only=True,
            trust_remote_code=settings.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with the name
            **{"use_safetensors": True, **how},
        )
        found = within_memory(load)
    except JobError:
        raise
    except Exception as error:  # safetensors, accelerate and families' own code raise what they like
        raise unloadable(folder, error) from error
    if isinstance(found, Shortage):
        raise found.error()
    model, info = found
    require_fit(folder, files, info)
    loaded: PreTrainedModel = model
    if (given := loaded.generation_config) is not None:
        # Beams, penalties and caches that a file names would decide what is measured, and how long it takes.
        loaded.generation_config = GenerationConfig(**{name: getattr(given, name) for name in _SPECIAL_TOKENS})
    make_head_inputs_contiguous(loaded)
    return loaded


def _adapted_device_map(config: PretrainedConfig, places: Mapping[str, int | str]) -> dict[str, int | str]:
    """Adapt a device map to a model. Raises MachineError for missing devices, or UsageError for gaps."""
    for name, place in places.items():
        if isinstance(place, str) and not _PLACE.fullmatch(place):
            raise UsageError(
                f"loading.device_map has {name or 'the model'} on {place!r}, which is not a device",
                remedy='give the number of a GPU, "cpu" or "disk"',
            )
        if place != "disk":
            resolve_device(f"cuda:{place}" if isinstance(place, int) else place)
    found = spread(empty_model(config), places)
    left_out = next((name for name, place in found.items() if place is None), None)
    if left_out is not None:
        raise UsageError(
            f"loading.device_map has no device for {left_out}",
            remedy='name it or a module that contains it; "" stands for all other modules',
        )
    return found


def _offload_folder(settings: LoadingSettings) -> str | None:
    offloads = settings.device_map == "auto" or isinstance(settings.device_map, dict)
    if settings.offload_folder is not None or not offloads:
        return settings.offload_folder
    held = ExitStack()
    folder = held.enter_context(scratch("offload"))
    atexit.register(held.close)
    return str(folder)


class _DtypeFault(Exception):  # noqa: N818 - a reason to try the next dtype
    """What is wrong with a model in its dtype."""


def _proven(loaded: LoadedModel, report: Callable[[str], None]) -> LoadedModel:
    """Return a model that generates in its dtype, with batching. Raises _DtypeFault, or ImpossibleJobError."""
    if any(parameter.is_meta for parameter in loaded.model.parameters()):  # on disk, from where a forward brings it
        require_finite(loaded.folder)
    if name := infinite_parameter(loaded.model):
        raise _DtypeFault(f"weight {name} has values that are not finite")
    try:
        batching = within_memory(partial(_batching, loaded, report))
    except (RuntimeError, ImpossibleJobError) as error:
        raise _DtypeFault(in_one_line(error)) from error
    if isinstance(batching, Shortage):
        raise batching.error()
    return replace(loaded, architecture=replace(loaded.architecture, batching=batching))


def _batching(loaded: LoadedModel, report: Callable[[str], None]) -> BatchingSupport:
    """Generate, and return the batching that is right. Raises _DtypeFault if logits are not finite."""
    model = loaded.model
    (greeting,) = loaded.tokenize([GREETING])
    prompts = probe_prompts(model, greeting)
    alone = torch.cat([first_logits(model, [prompt]) for prompt in prompts])
    if not bool(torch.isfinite(alone).all()):
        raise _DtypeFault("logits are not finite")
    batching = proven_batching(model, loaded.architecture.batching, prompts, alone, report)
    greedy_answers(model, [greeting], limit=2, end_tokens=loaded.end_tokens, batching=batching)
    return batching
