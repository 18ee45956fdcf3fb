"""The truth test: does projecting all discovered writers' weights keep a direction out of the stream?

It runs on a small random twin of the model, built from the configuration alone with random norm gains and biases,
before any weight is read. The converse shows that every writer is necessary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from job.architectures.discovery import decoder_of
from job.architectures.spec import Architecture, Writer, require_editable
from job.architectures.structure import determined_by, discover
from job.architectures.tiny_model import empty_model, twin_of
from job.edits.hooks import Intervention
from job.errors import UnsupportedArchitectureError, refusing
from job.model.files import fetch_model, headers_if_quantised, list_model, parse_model
from job.model.loading import read_config
from job.model.quantization import quantisation_in
from job.model.weight_files import Headers
from job.numerics.basis import Basis
from job.records import COMPONENTS, EditParameters, KernelParameters, PullBack

TOLERANCE = 1e-4
# Least share that a layer writes along the direction when a writer is omitted: far above rounding.
_NOTICED = 100 * TOLERANCE
_ROWS, _TOKENS = 4, 12
# Models whose proof has passed in this process: a job asks before and after its model is downloaded.
_supported: set[tuple[type, tuple[type, str]]] = set()


def largest_leak(
    model: PreTrainedModel,
    architecture: Architecture,
    writers: Collection[Writer] | None = None,
    seed: int = 0,
) -> tuple[int, float]:
    """Ablate a random direction from the writers (None: all); return the layer with the largest leak, and its share.

    The direction is one of the last layer's output (`Architecture.at`). Every layer gets an input h_in without it. The
    share is |v·h_out| / |h_out - h_in|, the largest over all positions and streams. A layer may thus scale what it is
    given, and mix several streams, but nothing else. Parameters are restored afterwards.
    """
    shares = leaks(model, architecture, architecture.writers if writers is None else writers, seed)
    worst = max(range(len(shares)), key=shares.__getitem__)
    return worst, shares[worst]


def leaks(
    model: PreTrainedModel, architecture: Architecture, writers: Collection[Writer], seed: int = 0
) -> list[float]:
    """Return each layer's share (`largest_leak`) with these writers ablated."""
    direction = random_direction(model, seed)
    with _ablated(model, writers, direction):
        return _shares(model, architecture, direction.expand(_ROWS, -1), torch.Generator().manual_seed(seed))


def random_direction(model: PreTrainedModel, seed: int = 0) -> Tensor:
    """Return the unit direction of `leaks`, [d], float64."""
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(_width(model), generator=generator, dtype=torch.float64), dim=0)


def hooked_leaks(model: PreTrainedModel, architecture: Architecture, seed: int = 0) -> list[float]:
    """Return each layer's share when hooks ablate a different direction in every row."""
    generator = torch.Generator().manual_seed(seed)
    count = architecture.layer_count
    directions = nn.functional.normalize(torch.randn(count, _width(model), generator=generator), dim=1)
    everywhere = KernelParameters(max_weight=1, max_weight_position=0, min_weight=1, min_weight_distance=count)
    chosen = [row % count for row in range(_ROWS)]
    edits = [
        EditParameters(direction_index=float(index), kernels=dict.fromkeys(COMPONENTS, everywhere)) for index in chosen
    ]
    with (
        Intervention(model, architecture, Basis.single(directions), "none") as intervention,
        intervention.activate(edits).bind(torch.arange(_ROWS)),
    ):
        return _shares(model, architecture, directions[chosen].to(torch.float64), generator)


def _width(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config(decoder=True).hidden_size)


def _shares(
    model: PreTrainedModel, architecture: Architecture, directions: Tensor, generator: torch.Generator
) -> list[float]:
    """Return each layer's largest share along its row's direction, [rows, d]."""
    tokens = torch.randint(3, model.get_input_embeddings().num_embeddings, (_ROWS, _TOKENS), generator=generator)
    shares: list[float] = []
    entered: list[Tensor] = []

    def along(layer: int, hidden: Tensor) -> Tensor:
        own = architecture.at(layer, directions, model.get_parameter)
        own = own.view(_ROWS, *[1] * (hidden.ndim - 2), -1).to(hidden)
        return (hidden * own).sum(-1, keepdim=True) * own

    def enter(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        hidden = inputs[0] if inputs else named["hidden_states"]
        hidden = hidden - along(len(shares), hidden)
        entered.append(hidden)
        return ((hidden, *inputs[1:]), named) if inputs else (inputs, {**named, "hidden_states": hidden})

    def leave(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = (output if isinstance(output, Tensor) else output[0]).to(torch.float64)
        share = along(len(shares) + 1, hidden).norm(dim=-1) / (hidden - entered.pop()).norm(dim=-1)
        shares.append(float(share.nan_to_num(1.0).max()))

    layers = model.get_submodule(architecture.layers).children()
    handles = [
        handle
        for layer in layers
        for handle in (
            layer.register_forward_pre_hook(enter, with_kwargs=True),
            layer.register_forward_hook(leave),
        )
    ]
    try:
        with torch.inference_mode():
            decoder_of(model)(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return shares


@contextmanager
def _ablated(model: PreTrainedModel, writers: Collection[Writer], direction: Tensor) -> Iterator[None]:
    """Within the block, project a direction [d] out of the parameters of writers and of their norms' biases."""
    before: dict[str, Tensor] = {}

    def project(name: str, axis: int, vectors: Tensor) -> None:
        parameter = model.get_parameter(name)
        if name in before:
            return
        before[name] = parameter.data.clone()
        moved = parameter.data.to(torch.float64).movedim(axis, -1)
        span = torch.linalg.qr(vectors.mT).Q
        edited = moved - (moved @ span) @ span.mT
        parameter.data.copy_(edited.movedim(-1, axis))

    try:
        for writer in writers:
            vectors = direction[None]
            for norm in reversed(writer.post_norms):
                if norm.bias is not None:
                    project(norm.bias, -1, vectors)
                vectors = norm.pull_back(model.get_parameter(norm.parameter).data, vectors)
                vectors = nn.functional.normalize(vectors, dim=-1)
            project(writer.parameter, writer.axis, vectors)
            if writer.bias is not None:
                project(writer.bias, -1, vectors)
        yield
    finally:
        for name, data in before.items():
            model.get_parameter(name).data.copy_(data)


def without_each_role(architecture: Architecture) -> Iterator[tuple[str, list[Writer], set[int]]]:
    """Yield, per writer name within a layer, all writers without those of that name, and the layers concerned."""
    roles: dict[str, set[int]] = {}
    prefix = f"{architecture.layers}."
    names = [writer.parameter.removeprefix(prefix).partition(".")[2] for writer in architecture.writers]
    for writer, name in zip(architecture.writers, names, strict=True):
        roles.setdefault(name, set()).add(writer.layer)
    for role, layers in roles.items():
        rest = [w for w, name in zip(architecture.writers, names, strict=True) if name != role]
        yield role, rest, layers


def prove(model: PreTrainedModel, architecture: Architecture) -> None:
    """Prove that no writer is missing and none is superfluous. Raises UnsupportedArchitectureError."""
    layer, share = largest_leak(model, architecture)
    if not share < TOLERANCE:
        raise UnsupportedArchitectureError(
            architecture.model_type,
            f"after ablating a direction from all known residual writers, layer {layer} "
            f"still writes {share:.1e} of its output along it",
        )
    for role, rest, layers in without_each_role(architecture):
        shares = leaks(model, architecture, rest)
        idle = sorted(layer for layer in layers if shares[layer] < _NOTICED)
        if idle:
            raise UnsupportedArchitectureError(
                architecture.model_type, f"{role} of layer {idle[0]} does not write into the stream"
            )


def proven(config: PretrainedConfig) -> Architecture:
    """Return a model's structure, proven on a small twin. Raises UnsupportedArchitectureError."""
    with _quiet_twins():
        return _proven_on_twin(empty_model(config))[0]


def _proven_on_twin(model: PreTrainedModel) -> tuple[Architecture, PreTrainedModel]:
    """Return a model's structure and the twin on which it is proven, which is left as it was built."""
    architecture, twin = discover(model), twin_of(model)
    prove(twin, architecture)
    return architecture, twin


@contextmanager
def _quiet_twins() -> Iterator[None]:
    """Ignore warnings about optional kernels, which are irrelevant in a twin."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def inspect_model(folder: Path, trusted: bool = False, stored: Headers | None = None) -> Architecture:
    """Return the structure of a model that can be edited, from its configuration alone, proven by the truth test.

    `folder` holds config.json, `stored` are the tensors in the model's files (None: those of the folder), and `trusted`
    allows the model's own code. Raises ImpossibleJobError if the folder is no model, or UnsupportedArchitectureError if
    the family cannot be edited completely or the files cannot be dequantised.
    """
    config = read_config(folder, trusted)
    quantisation_in(folder, stored)
    # A family's own code may raise anything for numbers that do not go together.
    with refusing(str(config.model_type), "a small test copy built from config.json fails"):
        return supported(config)


def supported(config: PretrainedConfig) -> Architecture:
    """Return a proven structure that can be loaded, edited and exported. Raises UnsupportedArchitectureError."""
    with _quiet_twins():
        model = empty_model(config)
        # Two kinds of configuration may have the same model: one of them with image parts beside it.
        key = type(config), determined_by(model)
        if key in _supported:
            return discover(model)
        architecture, twin = _proven_on_twin(model)
    require_supported(config, architecture, twin)
    _supported.add(key)
    return architecture


def require_supported(config: PretrainedConfig, architecture: Architecture, twin: PreTrainedModel) -> None:
    """Raise UnsupportedArchitectureError for a proven structure that cannot be loaded, edited or exported.

    `twin` is a small twin of the configuration's model.
    """
    require_editable(architecture)
    # The whole configuration is loaded, possibly with image parts, not only its text part.
    if type(twin.config) is not type(config):
        raise UnsupportedArchitectureError(
            architecture.model_type, "its files hold tensors that transformers does not load"
        )
    for how in get_args(PullBack) if architecture.norms else ("gain",):
        shares = hooked_leaks(twin, architecture.pulled_back(how))
        worst = max(range(len(shares)), key=shares.__getitem__)
        if not shares[worst] < TOLERANCE:
            raise UnsupportedArchitectureError(
                architecture.model_type,
                f"after ablating a direction from the outputs of all writers, layer {worst} "
                f"still writes {shares[worst]:.1e} of its output along it",
            )


def inspection(folder: Path, trusted: bool = False, stored: Headers | None = None) -> dict[str, Any]:
    """Return what `abliterate inspect --json` prints (`inspect_model`)."""
    config = read_config(folder, trusted)
    found: dict[str, Any] = {
        "supported": False,
        "reason": None,
        "model_type": str(config.model_type),
        "layers": int(config.get_text_config(decoder=True).num_hidden_layers),
        "writers": [],
    }
    try:
        architecture = inspect_model(folder, trusted, stored)
    except UnsupportedArchitectureError as error:
        return {**found, "reason": error.reason}
    writers: list[dict[str, Any]] = [
        {
            "layer": writer.layer,
            "component": writer.component,
            "parameter": writer.parameter,
            "bias": writer.bias,
            "axis": writer.axis,
            "post_norm": [norm.parameter for norm in writer.post_norms],
            "post_norm_bias": next((norm.bias for norm in writer.post_norms if norm.bias), None),
        }
        for writer in architecture.writers
    ]
    return {**found, "supported": True, "layers": architecture.layer_count, "writers": writers}


def inspection_of(model: str, trusted: bool, report: Callable[[str], None]) -> dict[str, Any]:
    """Inspect a folder, or NAME[@REVISION] on the Hub, without reading weights."""
    source, folder, stored = parse_model(model), Path(model), None
    if source.kind == "hub" or folder.is_dir():
        listing = list_model(source, None, report)
        folder = fetch_model(source, listing, report, weights=False)
        stored = headers_if_quantised(source, listing, folder, report) if source.kind == "hub" else None
    return inspection(folder, trusted, stored)
