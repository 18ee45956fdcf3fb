"""From prompts to the directions that edits ablate: residuals, a method, and what follows it; all of it kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from job.config.schema import DirectionSettings
from job.data.prompts import Prompt, PromptSets
from job.directions.residuals import digest, extract_residuals, read_tensors, write_tensors
from job.edits.hooks import ActiveEdits, Intervention
from job.errors import ImpossibleJobError, MachineError
from job.generation.forward import read_tokens
from job.model.device_faults import halving
from job.model.loading import LoadedModel
from job.numerics.basis import Basis, eigenvalue_weights, orthogonalize, orthonormal_basis
from job.numerics.directions import Directions, contrastive_pca, mean_difference, probe, winsorize
from job.numerics.geometry import geometry, projections
from job.records import COMPONENTS, EditParameters, GeometryRecord, JobRecord, KernelParameters, LayerGeometry
from job.storage.atomic import make_folder, read_record, write_record
from job.storage.events import Events
from job.storage.run_folder import RunFolder

# Points of each class in the report's pictures.
_POINTS = 100


@dataclass(frozen=True)
class DirectionFinder:
    """Finds a job's directions once; an interrupted or later start takes up what was kept.

    Attributes:
        folder: The run folder.
        record: Its job.json.
        settings: How directions are found.
        loaded: The model.
        rows: Rows of a forward.
        tokens: Tokens of a forward, padding included.
        events: Where progress goes.
    """

    folder: RunFolder
    record: JobRecord
    settings: DirectionSettings
    loaded: LoadedModel
    rows: int
    tokens: int
    events: Events

    def find(self, prompts: PromptSets) -> Basis:
        """Return the bases of all layers.

        Raises:
            ImpossibleJobError: The residuals of good and bad prompts do not differ, or are not finite.
        """
        sets = {"good": prompts.good, "bad": prompts.bad}
        references = ("helpfulness", "unhelpfulness", "capability")
        sets |= {name: found for name in references if (found := getattr(prompts, name))}
        tokens = {name: self.loaded.tokenize(found) for name, found in sets.items()}
        residual_keys = {name: self._residual_key(found, None) for name, found in tokens.items()}
        key = digest({"residuals": residual_keys, "method": self.settings.model_dump(mode="json")})
        file = self.folder.path / "directions" / f"{self.settings.method}-{key[:16]}.safetensors"
        kept = read_tensors(file, key)
        if kept is not None and self._geometry_is(key):
            return Basis(kept["directions"], kept["weights"])
        self.events.emit("residuals_started", "extracting residuals")
        residuals = {name: self._residuals(name, found) for name, found in tokens.items()}
        basis = self._basis(residuals, tokens)
        make_folder(file.parent)
        write_record(self.folder.geometry_file, _geometry(key, residuals["good"], residuals["bad"], basis))
        write_tensors(file, key, {"directions": basis.directions, "weights": basis.weights})
        self.events.emit(
            "directions", f"found the directions of {basis.layers} layers by {self.settings.method}", k=basis.size
        )
        return basis

    def _geometry_is(self, key: str) -> bool:
        file = self.folder.geometry_file
        return file.exists() and read_record(file, GeometryRecord).key == key

    def _residual_key(self, tokens: Sequence[list[int]], edit: str | None) -> str:
        """Return a key over all that residuals follow from; token ids stand for prompts, template and prefixes."""
        return digest(
            {
                "model": self.record.identity["model"],
                "commit": self.record.model_commit,
                "dtype": self.loaded.dtype,
                "versions": self.record.versions,
                "batching": [self.rows, self.tokens],
                "tokens": tokens,
                "edit": edit,
            }
        )

    def _residuals(
        self,
        name: str,
        tokens: Sequence[list[int]],
        edit: str | None = None,
        edits: ActiveEdits | None = None,
    ) -> Tensor:
        """Return winsorised residuals of all layers' outputs [n, layers, d], where the arithmetic is to be done."""
        key = self._residual_key(tokens, edit)
        file = self.folder.path / "residuals" / f"{name}-{key[:16]}.safetensors"
        kept = read_tensors(file, key)
        if kept is not None:
            found = kept["residuals"]
        else:
            found = self._extracted(name, tokens, edits)
            try:
                write_tensors(file, key, {"residuals": found})
            except MachineError as error:
                # They are a convenience for later starts; this one has them.
                self.events.say(f"warning: residuals are not kept: {error.line}")
        if not bool(found.isfinite().all()):
            raise ImpossibleJobError(
                f"residuals of the {name} prompts are not finite in {self.loaded.dtype}",
                remedy="try --set loading.dtypes='[\"float32\"]'",
            )
        return winsorize(self._near_model(found[:, 1:]), self.settings.winsorization_quantile)

    def _extracted(self, name: str, tokens: Sequence[list[int]], edits: ActiveEdits | None) -> Tensor:
        """Return residuals [n, layers + 1, d], with smaller forwards where memory does not suffice."""

        def extract(rows: int) -> Tensor:
            with self.events.progress(f"{name} residuals", len(tokens)) as advance:
                tokens_of_forward = max(self.tokens * rows // self.rows, 1)
                return extract_residuals(self.loaded, tokens, rows, advance, tokens=tokens_of_forward, edits=edits)

        return halving(self.rows, extract, self.events.say)[0]

    def _near_model(self, residuals: Tensor) -> Tensor:
        """Return residuals on the model's device if they fit there."""
        try:
            return residuals.to(self.loaded.device)
        except torch.OutOfMemoryError:
            return residuals

    def _basis(self, residuals: dict[str, Tensor], tokens: dict[str, list[list[int]]]) -> Basis:
        good, bad = residuals["good"], residuals["bad"]
        try:
            directions, weights = self._found(good, bad)
        except ValueError as error:
            raise ImpossibleJobError(str(error), remedy="check that good_prompts and bad_prompts differ") from error
        directions = self._orthogonalized(directions, residuals)
        basis = orthonormal_basis(directions, weights)
        for number in range(2, self.settings.iterative_rounds + 1):
            basis = self._another_round(number, basis, residuals, tokens)
        return basis

    def _found(self, good: Tensor, bad: Tensor) -> tuple[Tensor, Tensor]:
        """Return directions [layers, k, d] and their weights [layers, k]."""
        settings = self.settings
        if settings.method == "probe":
            found = probe(good, bad, regularization=settings.probe_regularization)
            self._report_fallbacks(found)
            return found.directions, torch.ones(found.directions.shape[:2])
        mean = mean_difference(good, bad, orthogonalize=settings.orthogonalize_direction)
        ones = torch.ones(len(mean), 1)
        if settings.method == "mean-difference":
            return mean[:, None], ones
        found = contrastive_pca(
            good, bad, n_components=settings.n_components, alpha=settings.alpha, method=settings.pca_method
        )
        self._report_fallbacks(found)
        # Both class means are out of the covariances, so these directions add to the mean difference.
        weights = eigenvalue_weights(found.eigenvalues, settings.eigenvalue_weighting)
        return torch.cat([mean[:, None], found.directions], dim=1), torch.cat([ones, weights.cpu()], dim=1)

    def _report_fallbacks(self, found: Directions) -> None:
        if found.fallbacks:
            layers = ", ".join(map(str, found.fallbacks))
            self.events.emit(
                "fallback",
                f"warning: {self.settings.method} found nothing in layers {layers}; the mean difference stands there",
                layers=found.fallbacks,
            )

    def _orthogonalized(self, directions: Tensor, residuals: dict[str, Tensor]) -> Tensor:
        """Return directions without the references that the settings want left alone."""
        if "unhelpfulness" not in residuals:
            return directions
        web = residuals["unhelpfulness"]
        references = [
            mean_difference(web, residuals[name]) for name in ("helpfulness", "capability") if name in residuals
        ]
        found, kept = orthogonalize(directions, torch.stack(references, dim=1))
        if kept:
            layers = ", ".join(map(str, kept))
            self.events.say(f"warning: in layers {layers} a direction is a reference's own and is left as it was")
        return found

    def _another_round(
        self, number: int, basis: Basis, residuals: dict[str, Tensor], tokens: dict[str, list[list[int]]]
    ) -> Basis:
        """Return the basis with the mean difference that is left while its directions are ablated."""
        everywhere = KernelParameters(max_weight=1, max_weight_position=0, min_weight=1, min_weight_distance=math.inf)
        edit = EditParameters(
            direction_index=None,
            kernels=dict.fromkeys(COMPONENTS, everywhere),
            strengths=(1.0,) * basis.size,
        )
        whole = Basis(basis.directions, torch.ones_like(basis.weights))
        name = digest(basis.directions.flatten().tolist())
        with Intervention(self.loaded.model, self.loaded.architecture, whole, "none") as intervention:
            edits = intervention.activate([edit])
            left = {
                kind: self._residuals(f"{kind}-round-{number}", tokens[kind], name, edits) for kind in ("good", "bad")
            }
        try:
            found = mean_difference(left["good"], left["bad"])[:, None]
        except ValueError:
            self.events.say(f"round {number}: good and bad residuals no longer differ")
            return basis
        found = self._orthogonalized(found, residuals)
        directions = torch.cat([basis.directions, found.cpu()], dim=1)
        return orthonormal_basis(directions, torch.cat([basis.weights, torch.ones(basis.layers, 1)], dim=1))


def _geometry(key: str, good: Tensor, bad: Tensor, basis: Basis) -> GeometryRecord:
    """Return the geometry of all layers with some points of each."""
    first = basis.directions[:, 0]
    found = geometry(good, bad, first)
    layers = []
    for layer in range(basis.layers):
        figures = {}
        for field in fields(found):
            value = float(getattr(found, field.name)[layer])
            figures[field.name] = round(value, 6) if math.isfinite(value) else None
        planes = projections(good[:, layer], bad[:, layer], first[layer])
        points = [[[round(x, 4), round(y, 4)] for x, y in plane[:_POINTS].tolist()] for plane in planes]
        layers.append(LayerGeometry(**figures, good_points=points[0], bad_points=points[1]))
    return GeometryRecord(key=key, layers=layers)


def tokens_of_forward(loaded: LoadedModel, prompts: Sequence[Prompt], rows: int, answer_tokens: int) -> int:
    """Return how many tokens a forward of so many rows was planned to take: the longest prompt with its answer."""
    planned, most = rows * (max(map(len, loaded.tokenize(prompts))) + answer_tokens), read_tokens(loaded.model)
    return planned if most is None else min(planned, most)
