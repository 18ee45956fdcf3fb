"""The parts of `benchmarks.gpu`, computed in a process of their own.

python -m benchmarks.gpu_parts SUBJECT DEVICE PART ...

Writes a line of JSON about each part; everything else that is printed goes to standard error.
"""

from __future__ import annotations

import json
import lzma
import os
import random
import sys
import tarfile
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_job, gpu_speed
from benchmarks.measuring import machine
from benchmarks.random_models import SHAPES, Shape, build, filled_tokenizer, shape
from benchmarks.roofline import measured_ceilings
from benchmarks.shapes import some_edits
from job.config.load import default_values
from job.config.sections import LoadingSettings
from job.edits.compile import PreparedWriter, compile_edit
from job.edits.hooks import Intervention
from job.errors import JobError, first_line
from job.generation.answer import Answer
from job.generation.batching import BatchingSupport
from job.generation.forward import RowTrials, first_logits, shared_prefix
from job.generation.greedy import greedy_answers
from job.generation.kv_cache import writable_slots
from job.model.attention import disable_cudnn_attention, proven_batching
from job.model.devices import resolve_device
from job.model.loading import LoadedModel, load_model
from job.numerics.ablation import edit_weight
from job.numerics.basis import Basis

ORGANISM = Path(__file__).parents[1] / "tests" / "fixtures" / "organisms" / "llama.tar.xz"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Lengths of prompts in tokens: padding of one token, and beyond the blocks of kernels.
LENGTHS = {"cuda": (8, 9, 40, 72, 137, 264, 400), "cpu": (3, 4, 9, 20, 33)}
TOKENS = {"cuda": 24, "cpu": 6}
SHARED = 16  # tokens that prompts have in common, for a shared prefix
# Root mean square differences of logits that are no longer rounding, in standard deviations.
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.03}
# Responses may differ from where the best token led by less, in logits.
TIES = {torch.float32: 1e-2, torch.bfloat16: 0.5, torch.float16: 0.1}


@cache
def organism() -> Path:
    """Return the folder of the trained organism with its prompts."""
    folder = Path(tempfile.mkdtemp(prefix="organism-"))
    with lzma.open(ORGANISM) as stream, tarfile.open(fileobj=stream) as archive:
        archive.extractall(folder, filter="data")
    return next(path.parent for path in sorted(folder.rglob("model")) if path.is_dir())


class Subject:
    """A model to examine on a device."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self._loaded: dict[torch.dtype, LoadedModel] = {}

    def loaded(self, dtype: torch.dtype) -> LoadedModel:
        """Return the model in a dtype; the organism from its files, a shape with random weights."""
        if dtype not in self._loaded:
            self._loaded.clear()
            self._loaded[dtype] = self._made(dtype)
        return self._loaded[dtype]

    def _made(self, dtype: torch.dtype) -> LoadedModel:
        if self.name == "organism":
            given = {"device": str(self.device), "response_prefix": ""}
            loading = LoadingSettings.model_validate({**default_values()["loading"], **given})
            name = str(dtype).removeprefix("torch.")
            return load_model(organism() / "model", loading, print, dtype=name)
        return build(self.shape_in(dtype), self.tokenizer, self.device)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of a shape."""
        return filled_tokenizer(SHAPES[self.name]["vocab_size"])

    def shape_in(self, dtype: torch.dtype) -> Shape:
        """Return the shape in a dtype."""
        return shape(self.name, self.tokenizer, dtype, None)

    def prompts(self, loaded: LoadedModel, shared: int = 0) -> list[list[int]]:
        """Return random prompts of many lengths, the first `shared` tokens of all being the same."""
        chance = random.Random(0)
        vocabulary = min(len(loaded.tokenizer), 1000)
        prefix = [chance.randrange(3, vocabulary) for _ in range(shared)]
        return [
            prefix + [chance.randrange(3, vocabulary) for _ in range(length)] for length in LENGTHS[self.device.type]
        ]


def _apart(logits: Tensor, others: Tensor) -> float:
    """Return the largest root mean square difference of a row of logits, in standard deviations."""
    return float(((logits - others).square().mean(-1).sqrt() / others.std(-1)).max())


def _each_dtype(subject: Subject, compare: Callable[[LoadedModel, torch.dtype], dict[str, Any]]) -> dict[str, Any]:
    """Return the comparison in each dtype, with a summary; `wrong` names the dtypes beyond their bound."""
    found = {str(dtype).removeprefix("torch."): compare(subject.loaded(dtype), dtype) for dtype in DTYPES}
    summary = "; ".join(f"{name} {one['summary']}" for name, one in found.items())
    return {"dtypes": found, "wrong": [name for name, one in found.items() if one["wrong"]], "summary": summary}


def padding(subject: Subject) -> dict[str, Any]:
    """Compare logits of padded batches with those of each prompt alone."""

    def compare(loaded: LoadedModel, dtype: torch.dtype) -> dict[str, Any]:
        prompts, model, told = subject.prompts(loaded), loaded.model, list[str]()
        alone = torch.cat([first_logits(model, [prompt]) for prompt in prompts])
        batching = proven_batching(model, loaded.architecture.batching, prompts, alone, told.append)
        together = torch.cat([first_logits(model, batch) for batch in batching.chunks(prompts, len(prompts))])
        pairs = torch.cat([first_logits(model, [prompt, prompts[-1]])[:1] for prompt in prompts[:-1]])
        apart = {"batch": _apart(together, alone), "pairs": _apart(pairs, alone[:-1])}
        finite = bool(together.isfinite().all() and pairs.isfinite().all())
        return {
            **{"padded": batching.padded, "said": told, "finite": finite, "apart": apart},
            "same_token": float((together.argmax(-1) == alone.argmax(-1)).float().mean()),
            "wrong": not finite or max(apart.values()) > BOUNDS[dtype],
            "summary": f"{max(apart.values()):.1e} apart{', ' + ', '.join(told) if told else ''}",
        }

    return _each_dtype(subject, compare)


def caches(subject: Subject) -> dict[str, Any]:
    """Compare responses by caches with those of whole rows recomputed for every token."""

    def compare(loaded: LoadedModel, dtype: torch.dtype) -> dict[str, Any]:
        prompts, model = subject.prompts(loaded, SHARED), loaded.model
        limit = TOKENS[subject.device.type]

        def answers(batching: BatchingSupport, rows: RowTrials | None = None) -> list[Answer]:
            return greedy_answers(model, prompts, limit=limit, end_tokens=(), batching=batching, rows=rows)

        again = answers(BatchingSupport(cached=False))
        found = {"cached": answers(BatchingSupport())}
        if writable_slots(model) >= SHARED:
            trials = torch.zeros(len(prompts), dtype=torch.long, device=subject.device)
            prefix = shared_prefix(model, prompts[0][:SHARED], 1, None)
            found["shared"] = answers(BatchingSupport(), RowTrials(trials, prefix=prefix))
        agreed = {name: agreement(again, others) for name, others in found.items()}
        worst = max(one["largest_margin"] for one in agreed.values())
        shown = ", ".join(f"{name} {one['same']} of {len(prompts)}" for name, one in agreed.items())
        return {**agreed, "wrong": worst > TIES[dtype], "summary": f"{shown} the same, ties below {worst:.2g}"}

    return _each_dtype(subject, compare)


def agreement(answers: Sequence[Answer], others: Sequence[Answer]) -> dict[str, Any]:
    """Return how many responses are the same, and the largest lead of the best token where two diverge."""
    same, largest = 0, 0.0
    for one, other in zip(answers, others, strict=True):
        pairs = enumerate(zip(one.tokens, other.tokens, strict=True))
        step = next((index for index, (a, b) in pairs if a != b), None)
        same += step is None
        largest = max(largest, 0.0 if step is None else min(one.margins[step], other.margins[step]))
    return {"same": same, "largest_margin": largest}


def hooks(subject: Subject) -> dict[str, Any]:
    """Compare logits under an edit's hooks with those of edited weights."""

    def compare(loaded: LoadedModel, dtype: torch.dtype) -> dict[str, Any]:
        model, prompts = loaded.model, subject.prompts(loaded)
        basis = random_basis(loaded)
        (edit,) = some_edits(loaded, 1)
        found = {}
        for mode in ("none", "full"):
            plain = first_logits(model, prompts)
            with Intervention(model, loaded.architecture, basis, mode) as intervention:
                active = intervention.activate([edit])
                rows = RowTrials(torch.zeros(len(prompts), dtype=torch.long, device=subject.device), active)
                hooked = first_logits(model, prompts, rows)
            with edited_weights(loaded, basis, edit, mode):
                weights = first_logits(model, prompts)
            found[mode] = {"hooks_weights": _apart(hooked, weights), "edit": _apart(weights, plain)}
        worst = max(one["hooks_weights"] for one in found.values())
        least = min(one["edit"] for one in found.values())
        return {**found, "wrong": worst > BOUNDS[dtype], "summary": f"{worst:.1e} apart under an edit of {least:.1e}"}

    return _each_dtype(subject, compare)


def random_basis(loaded: LoadedModel) -> Basis:
    """Return one random direction per layer."""
    generator = torch.Generator().manual_seed(0)
    shape = loaded.architecture.layer_count, loaded.architecture.width
    return Basis.single(torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=-1))


class edited_weights:  # noqa: N801 - a context manager
    """Within the block, a model's writers have edited weights."""

    def __init__(self, loaded: LoadedModel, basis: Basis, edit: Any, mode: Any) -> None:
        self._model, self._kept = loaded.model, dict[str, Tensor]()
        self._writers, self._given = loaded.architecture.writers, (basis, edit, mode)

    def __enter__(self) -> None:
        basis, edit, mode = self._given
        for writer in self._writers:
            parameter = self._model.get_parameter(writer.parameter)
            self._kept[writer.parameter] = parameter.data.clone()
            matrix = writer.matrix(parameter.data)
            candidates = basis.candidates_of(writer.layer).to(parameter.device, torch.float64)
            compiled = compile_edit(PreparedWriter.of(writer, candidates, matrix, mode), basis, edit)
            parameter.data.copy_(writer.unmatrix(edit_weight(matrix, compiled, mode)))

    def __exit__(self, *_: object) -> None:
        for name, weight in self._kept.items():
            self._model.get_parameter(name).data.copy_(weight)


def ceilings(subject: Subject) -> dict[str, Any]:
    """Measure the device's rates."""
    found = measured_ceilings(subject.shape_in(torch.bfloat16).facts, subject.device, torch.bfloat16)
    about = machine(subject.device)
    return {
        **{"ceilings": asdict(found), "machine": about, "cuda": torch.version.cuda, "hip": torch.version.hip},
        "summary": f"{found.flops / 1e12:.3g} TFLOP/s, {found.bandwidth / 1e9:.3g} GB/s on {about['hardware']}",
    }


PARTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    **{"ceilings": ceilings, "padding": padding, "caches": caches, "hooks": hooks},
    **gpu_speed.PARTS,
    **gpu_job.PARTS,
}


def main() -> None:
    """Compute the parts."""
    name, device, *parts = sys.argv[1:]
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the job's own code prints is not a result
    disable_cudnn_attention()
    place = resolve_device(device)
    subject: Any = gpu_job.Job(organism(), device) if name == "job" else Subject(name, place)
    for part in parts:
        try:
            found = PARTS[part](subject)
        except JobError as error:  # the model does not fit
            found = {"left_out": error.line}
        except Exception as error:  # whatever fails, the other parts are worth their time
            traceback.print_exc()
            # After a fault of the device nothing more can be computed in this process.
            ended = isinstance(error, torch.AcceleratorError)
            found = {"error": f"{type(error).__name__}: {first_line(error)}", "ended": ended}
        lines.write(json.dumps(found) + "\n")
        lines.flush()
        if found.get("ended"):
            break


if __name__ == "__main__":
    main()
