"""Discover which parameters write into the residual stream, by function and not by name.

The loss is a fixed vector c times a layer's output, each position with its own weight. The gradient of a weight W whose
product Wx is added to the stream is then c ⊗ (a mixture of its inputs): rank one, with c itself along the stream's
axis. For weights further inside, c is transformed by what lies between. A writer hides earlier ones that feed its
inputs, so found writers are set to zero and the search is repeated. A gain multiplied elementwise belongs to a norm
between writers and the stream; its writers are found in the same way, at the norm's input instead of the layer's
output.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from job.errors import UnsupportedArchitectureError

_ROWS, _TOKENS = 4, 12
_SAME = 1e-3  # relative; gradients are float32, and anything merely similar to c differs by more than half
_ROUNDS = 12
_Call = tuple[int, Tensor, Tensor]


@dataclass(frozen=True)
class FoundNorm:
    """A gain multiplied elementwise into the stream; `norm` is the next norm on its way there, or "".

    A layer's own parameter has no module that multiplies it; its name stands for one.
    """

    module: str
    gain: str
    norm: str

    @property
    def bare(self) -> bool:
        """Whether the gain is a layer's own parameter."""
        return self.module == self.gain


@dataclass(frozen=True)
class Found:
    """A writing parameter.

    Attributes:
        axis: The stream's axis.
        norm: Name of the first norm after it, "" for none.
        mixes: Whether its output at a position depends on other positions.
    """

    layer: int
    parameter: str
    axis: int
    norm: str
    mixes: bool = False


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Return a model without its head."""
    decoder = model.get_decoder()
    # BERT's relatives call the head decoder; there the model itself is meant.
    found: nn.Module = decoder if isinstance(decoder, PreTrainedModel) else model.base_model
    return found


def find_layers(model: PreTrainedModel) -> str:
    """Return the name of the list of decoder layers, called in order on the previous output.

    Raises UnsupportedArchitectureError if there is none, or the stream is changed between layers.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    calls: dict[str, list[_Call]] = {name: [] for name in lists}
    handles = [
        child.register_forward_hook(_record(calls[name], index), with_kwargs=True)
        for name, module in lists.items()
        for index, child in enumerate(module)
    ]
    tokens = torch.arange(3, 3 + 2 * 5).view(2, 5)
    try:
        with torch.no_grad():
            decoder_of(model)(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    chained = [name for name, found in calls.items() if found and _is_chain(found, len(lists[name]), len(tokens))]
    if not chained:
        raise UnsupportedArchitectureError(
            str(model.config.model_type), "it has no list of layers that each run once and pass on the residual stream"
        )
    # The longest one: lists within layers are as numerous as layers, but shorter.
    return max(chained, key=lambda name: (len(lists[name]), -name.count(".")))


def _record(calls: list[_Call], index: int) -> Callable[..., None]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        entered = inputs[0] if inputs else named.get("hidden_states")
        left = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(entered, Tensor) and isinstance(left, Tensor):
            calls.append((index, entered, left))

    return hook


def _is_chain(calls: list[_Call], count: int, rows: int) -> bool:
    """Return whether all modules were called once, in order, each with the previous output.

    It is [rows, t, d], or [rows, t, streams, d] where layers mix several streams.
    """
    if [index for index, _, _ in calls] != list(range(count)):
        return False
    if any(x.ndim not in (3, 4) or len(x) != rows or x.shape != y.shape for _, x, y in calls):
        return False
    return all(torch.equal(x[2], y[1]) for x, y in itertools.pairwise(calls))


class WriterSearch:
    """Finds writers in a small random model, whose parameters it zeroes on the way.

    Attributes:
        carriers: Gains of the norms found that the stream itself passes through.
    """

    def __init__(self, model: PreTrainedModel, layers: str, seed: int = 0) -> None:
        """Prepare the search; `seed` is for the inputs and c."""
        self.writers: list[Found] = []
        self.norms: list[FoundNorm] = []
        self.carriers: set[str] = set()
        self.width = int(model.config.get_text_config(decoder=True).hidden_size)
        self._model, self._layers, self._seed = model, layers, seed
        self._list = list(model.get_submodule(layers).children())
        self._generator = torch.Generator().manual_seed(seed)
        self._inputs: list[Tensor] = []
        self._called: set[str] = set()
        self._parameters: list[tuple[int, str, nn.Parameter]] = []
        known: set[int] = set()  # layers may share parameters
        for index, layer in enumerate(self._list):
            for name, parameter in layer.named_parameters():
                if parameter.requires_grad and id(parameter) not in known:
                    known.add(id(parameter))
                    self._parameters.append((index, f"{layers}.{index}.{name}", parameter))

    def run(self) -> None:
        """Search until nothing more is found."""
        self._call_once()
        self._fix_mixing_of_streams()
        targets = [""]
        for _ in range(_ROUNDS):
            writers, norms = len(self.writers), len(self.norms)
            for target in targets:
                self._find_writers_into(target)
            for found in self.writers[writers:]:
                self._model.get_parameter(found.parameter).data.zero_()
            if (writers, norms) == (len(self.writers), len(self.norms)):
                break
            targets = self._targets()
        for target in self._targets():
            self._tell_mixing(target)
        self._tell_carriers()

    def _call_once(self) -> None:
        """Find which modules a forward calls."""

        def enter(name: str) -> Callable[..., None]:
            return lambda *_: self._called.add(name)

        named = [(name, module) for name, module in self._model.named_modules() if name.startswith(self._layers)]
        handles = [module.register_forward_pre_hook(enter(name)) for name, module in named]
        try:
            self._forward("")
        finally:
            for handle in handles:
                handle.remove()

    def _fix_mixing_of_streams(self) -> None:
        """Zero what reads all of several streams: weights for mixing them would otherwise transform c too."""
        if self._inputs[0].ndim == 4:
            size = self._inputs[0].shape[2] * self.width
            for _, _, parameter in self._parameters:
                if size in parameter.shape:
                    parameter.data.zero_()

    def _targets(self) -> list[str]:
        """Return where to search: the stream, and before norms, by name within a layer."""
        return ["", *dict.fromkeys(self._relative(norm.module) for norm in self.norms if not norm.bare)]

    def _relative(self, name: str) -> str:
        return name.removeprefix(f"{self._layers}.").partition(".")[2]

    def _find_writers_into(self, target: str) -> None:
        """Find writers into the stream or into the inputs of norms with this name."""
        hidden = self._forward(target)
        if not target and all(torch.equal(x, y) for x, y in zip(self._inputs, hidden, strict=True)):
            return  # nothing is written any more
        one, two = (torch.randn(self.width, generator=self._generator) for _ in range(2))
        ones, twos = self._gradients(hidden, one), self._gradients(hidden, two)
        known = {found.parameter for found in self.writers} | {norm.gain for norm in self.norms}
        for index, name, _ in self._parameters:
            if name in known or name not in ones or name not in twos:
                continue
            norm = f"{self._layers}.{index}.{target}" if target else ""
            left, right = ones[name], twos[name]
            for behind, gain in self._gains_before(index, norm):
                axis = _axis(left, gain * one)
                if axis is not None and _axis(right, gain * two) == axis:
                    self.writers.append(Found(index, name, axis, behind))
                    break
            else:
                shape = (self.width, *[1] * (left.ndim - 1))
                scales = left.ndim == 1 or (left.ndim == 3 and left.shape[1] == 1)
                if scales and len(left) == self.width and _close(left / one.view(shape), right / two.view(shape)):
                    self.norms.append(FoundNorm(self._module_of(name), name, norm))

    def _module_of(self, gain: str) -> str:
        """Return the innermost module around a gain whose forward is called, or the gain if that is a layer."""
        name = gain
        while self._relative(name).count("."):
            name = name.rpartition(".")[0]
            if name in self._called:
                return name
        return gain

    def _gains_before(self, index: int, norm: str) -> list[tuple[str, Tensor]]:
        """Return what may scale writers before a norm or the stream: nothing, or a gain of the layer's own."""
        own = [one.gain for one in self.norms if one.bare and one.norm == norm]
        own = [name for name in own if name.startswith(f"{self._layers}.{index}.")]
        return [(norm, torch.ones(())), *((name, self._model.get_parameter(name).detach()) for name in own)]

    def _tell_mixing(self, target: str) -> None:
        """Determine which zeroed writers' last position depends on their layer's input at other positions."""
        c = torch.randn(self.width, generator=self._generator)
        before = self._gradients(self._forward(target), c, last=True)
        after = self._gradients(self._forward(target, changed=True), c, last=True)
        after_gain = {norm.gain: norm.norm for norm in self.norms if norm.bare}
        for index, found in enumerate(self.writers):
            here = f"{self._layers}.{found.layer}.{target}" if target else ""
            in_both = found.parameter in before and found.parameter in after
            if after_gain.get(found.norm, found.norm) == here and in_both:
                mixes = not _close(before[found.parameter], after[found.parameter])
                self.writers[index] = replace(found, mixes=mixes)

    def _tell_carriers(self) -> None:
        """Find the gains that something passes through although all writers are zero: the stream."""
        c = torch.randn(self.width, generator=self._generator)
        self.carriers = {norm.gain for norm in self.norms} & self._gradients(self._forward(""), c).keys()

    def _forward(self, target: str, *, changed: bool = False) -> list[Tensor]:
        """Return the layers' outputs, or their norms' inputs; `changed` varies all positions but the last."""
        tokens = torch.full((_ROWS, _TOKENS), 5)
        with self._cut(changed) as outputs, self._before_norms(target) as normed:
            decoder_of(self._model)(input_ids=tokens, use_cache=False)
        return normed or outputs

    def _gradients(self, values: list[Tensor], c: Tensor, *, last: bool = False) -> dict[str, Tensor]:
        """Return the nonzero gradients of c [d] times one tensor per layer; `last` uses the last position only."""
        weigh = torch.Generator().manual_seed(self._seed)  # the same for every c
        losses = []
        for hidden in values:
            along = hidden.reshape(_ROWS, -1, self.width) @ c
            weights = torch.randn(along.shape, generator=weigh)
            losses.append((along * weights)[:, -1 if last else 0 :].sum())
        loss = torch.stack(losses).sum()
        if not loss.requires_grad:  # everything before this norm is zero by now
            return {}
        parameters = [parameter for _, _, parameter in self._parameters]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        named = zip(self._parameters, gradients, strict=True)
        return {name: gradient for (_, name, _), gradient in named if gradient is not None and gradient.any()}

    @contextmanager
    def _cut(self, changed: bool) -> Iterator[list[Tensor]]:
        """Within the block, give every layer its own random input, and collect the layers' outputs."""
        generator = torch.Generator().manual_seed(self._seed + 1)
        outputs: list[Tensor] = []
        self._inputs = []

        def enter(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
            hidden = inputs[0] if inputs else named["hidden_states"]
            fresh = torch.randn(hidden.shape, generator=generator)
            other = torch.randn(hidden.shape, generator=generator)
            if changed:
                fresh[:, :-1] = other[:, :-1]
            self._inputs.append(fresh)
            return ((fresh, *inputs[1:]), named) if inputs else (inputs, {**named, "hidden_states": fresh})

        def leave(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs.append(output if isinstance(output, Tensor) else output[0])

        handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in self._list]
        handles += [layer.register_forward_hook(leave) for layer in self._list]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _before_norms(self, target: str) -> Iterator[list[Tensor]]:
        """Within the block, collect the inputs of norms by name within their layers; none for ""."""
        inputs: list[Tensor] = []

        def enter(_module: nn.Module, given: tuple[Any, ...]) -> None:
            inputs.append(given[0])

        named = {norm.module for norm in self.norms if target and self._relative(norm.module) == target}
        handles = [self._model.get_submodule(name).register_forward_pre_hook(enter) for name in sorted(named)]
        try:
            yield inputs
        finally:
            for handle in handles:
                handle.remove()


def _axis(gradient: Tensor, c: Tensor) -> int | None:
    """Return the axis along which every line of a gradient is a multiple of c, or None."""
    for axis in range(gradient.ndim):
        if gradient.shape[axis] != len(c):
            continue
        lines = gradient.movedim(axis, 0).reshape(len(c), -1)
        rest = lines - c[:, None] * (c @ lines / c.square().sum())
        if rest.norm() < _SAME * lines.norm():
            return axis
    return None


def _close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() < _SAME * one.norm())
