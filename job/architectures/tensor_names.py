"""Stored forms of a model's parameters: often under other names, and experts separately.

transformers fuses experts' weights and renames parameters on loading, and reverts both on saving. This is inferred from
what it would save of a small twin, without a table of names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

# Placeholder for an expert's number in a name.
_NUMBER = "{}"


@dataclass(frozen=True)
class Form:
    """The stored form of a parameter.

    Attributes:
        name: Its stored name; "{}" stands for the expert's number if every expert has its own tensor.
        turned: Experts' weights are transposed relative to the loaded model.
    """

    name: str
    turned: bool = False

    @property
    def apart(self) -> bool:
        """Whether every expert has its own tensor."""
        return _NUMBER in self.name


def stored_forms(twin: PreTrainedModel, names: Collection[str]) -> dict[str, Form]:
    """Return the form in which each parameter is stored, by name, omitting unknown ones.

    Contents tell the parameters apart, so all of the twin's must differ.
    """
    state = twin.state_dict()
    files = revert_weight_conversion(twin, dict(state))
    places = {_content(tensor): name for name, tensor in files.items() if isinstance(tensor, Tensor)}
    found = ((name, _form(state[name], places)) for name in names)
    return {name: form for name, form in found if form is not None}


def _content(tensor: Tensor) -> tuple[tuple[int, ...], bytes]:
    return tuple(tensor.shape), tensor.detach().contiguous().numpy().tobytes()


def _form(tensor: Tensor, places: Mapping[tuple[tuple[int, ...], bytes], str]) -> Form | None:
    whole = places.get(_content(tensor))
    if whole is not None:
        return Form(whole)
    if tensor.ndim < 2:
        return None
    for turned in (False, True) if tensor.ndim == 3 else (False,):
        parts = [places.get(_content(part.T if turned else part)) for part in tensor]
        name = _numbered(parts)
        if name is not None:
            return Form(name, turned)
    return None


def _numbered(names: Iterable[str | None]) -> str | None:
    parts = [name.split(".") if name is not None else [] for name in names]
    width = len(parts[0])
    if not width or any(len(part) != width for part in parts):
        return None
    counting = [i for i in range(width) if all(part[i] == str(number) for number, part in enumerate(parts))]
    if len(parts) == 1:
        counting = counting[-1:]  # others may be the layer's number, which comes first
    if len(counting) != 1:
        return None
    template = [*parts[0][: counting[0]], _NUMBER, *parts[0][counting[0] + 1 :]]
    return ".".join(template) if all(_filled(template, e) == part for e, part in enumerate(parts)) else None


def _filled(template: list[str], number: int) -> list[str]:
    return [str(number) if part == _NUMBER else part for part in template]
