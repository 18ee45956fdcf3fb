"""Compute the directions that edits ablate, and cache them in the run folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor

from job.config.sections import DirectionSettings
from job.directions.prompt_residuals import PromptResiduals
from job.directions.residuals import digest, read_tensors, write_tensors
from job.edits.hooks import Intervention
from job.errors import ImpossibleJobError
from job.model.device_faults import on_device_or_cpu
from job.numerics.basis import Basis, eigenvalue_weights, orthogonalize, orthonormal_basis
from job.numerics.directions import Directions, contrastive_pca, mean_difference, probe
from job.numerics.geometry import geometry, projections
from job.records import COMPONENTS, EditParameters, GeometryRecord, KernelParameters, LayerGeometry
from job.storage.atomic import ensure_folder, read_record, write_record
from job.storage.events import Events
from job.storage.run_folder import RunFolder

# Points per class in the report's charts.
_POINTS = 100


def find_directions(residuals: PromptResiduals, settings: DirectionSettings) -> Basis:
    """Return the cached or computed bases. Raises ImpossibleJobError if residuals are equal or not finite."""
    folder, events = residuals.folder, residuals.events
    key = digest({"residuals": residuals.keys(), "method": settings.model_dump(mode="json")})
    file = folder.path / "directions" / f"{settings.method}-{key[:16]}.safetensors"
    cached = read_tensors(file, key)
    if cached is not None and _has_geometry(folder, key):
        return Basis(cached["directions"], cached["weights"])
    events.emit("residuals_started", "extracting residuals")
    sets = {name: residuals.of(name) for name in residuals.tokens}
    basis = _compute_basis(sets, residuals, settings)
    ensure_folder(file.parent)
    geometry_record = on_device_or_cpu(lambda sets: _geometry(key, sets["good"], sets["bad"], basis), sets, events.say)
    write_record(folder.geometry_file, geometry_record)
    write_tensors(file, key, {"directions": basis.directions, "weights": basis.weights})
    events.emit("directions", f"computed the directions of {basis.layers} layers by {settings.method}", k=basis.size)
    return basis


def _has_geometry(folder: RunFolder, key: str) -> bool:
    file = folder.geometry_file
    return file.exists() and read_record(file, GeometryRecord).key == key


def _compute_basis(sets: Mapping[str, Tensor], residuals: PromptResiduals, settings: DirectionSettings) -> Basis:
    events = residuals.events

    def solve(sets: Mapping[str, Tensor]) -> Basis:
        directions, weights = _solve(sets["good"], sets["bad"], settings, events)
        return orthonormal_basis(_orthogonalized(directions, sets, events), weights)

    try:
        basis = on_device_or_cpu(solve, sets, events.say)
    except ValueError as error:
        raise ImpossibleJobError(str(error), remedy="check that good_prompts and bad_prompts differ") from error
    for number in range(2, settings.iterative_rounds + 1):
        basis = _add_round(number, basis, sets, residuals)
    return basis


def _solve(good: Tensor, bad: Tensor, settings: DirectionSettings, events: Events) -> tuple[Tensor, Tensor]:
    """Return directions [layers, k, d] and their weights [layers, k]."""
    if settings.method == "probe":
        solution = probe(good, bad, regularization=settings.probe_regularization)
        _report_fallbacks(solution, settings, events)
        return solution.directions, torch.ones(solution.directions.shape[:2])
    mean = mean_difference(good, bad, orthogonalize=settings.orthogonalize_direction)
    ones = torch.ones(len(mean), 1)
    if settings.method == "mean-difference":
        return mean[:, None], ones
    solution = contrastive_pca(
        good, bad, n_components=settings.n_components, alpha=settings.alpha, method=settings.pca_method
    )
    _report_fallbacks(solution, settings, events)
    # Covariances exclude both class means, so these directions add to the mean difference.
    weights = eigenvalue_weights(solution.eigenvalues, settings.eigenvalue_weighting)
    return torch.cat([mean[:, None], solution.directions], dim=1), torch.cat([ones, weights.cpu()], dim=1)


def _report_fallbacks(solution: Directions, settings: DirectionSettings, events: Events) -> None:
    if solution.fallbacks:
        layers = ", ".join(map(str, solution.fallbacks))
        events.emit(
            "fallback",
            f"warning: {settings.method} found no direction in layers {layers}; the mean difference is used there",
            layers=solution.fallbacks,
        )


def _orthogonalized(directions: Tensor, sets: Mapping[str, Tensor], events: Events) -> Tensor:
    """Project the reference directions out, where reference prompts are set."""
    if "unhelpfulness" not in sets:
        return directions
    web = sets["unhelpfulness"]
    references = [mean_difference(web, sets[name]) for name in ("helpfulness", "capability") if name in sets]
    orthogonal, unchanged_layers = orthogonalize(directions, torch.stack(references, dim=1))
    if unchanged_layers:
        layers = ", ".join(map(str, unchanged_layers))
        events.say(
            f"warning: in layers {layers} a direction lies within the reference directions and is not orthogonalised"
        )
    return orthogonal


def _add_round(number: int, basis: Basis, sets: Mapping[str, Tensor], residuals: PromptResiduals) -> Basis:
    """Add the mean difference that remains while the basis is ablated."""
    constant_kernel = KernelParameters(max_weight=1, max_weight_position=0, min_weight=1, min_weight_distance=math.inf)
    edit = EditParameters(
        direction_index=None,
        kernels=dict.fromkeys(COMPONENTS, constant_kernel),
        strengths=(1.0,) * basis.size,
    )
    unweighted = Basis(basis.directions, torch.ones_like(basis.weights))
    key, model = digest(basis.directions.flatten().tolist()), residuals.model
    with Intervention(model.model, model.architecture, unweighted, "none") as intervention:
        edits = intervention.activate([edit])
        ablated = {
            f"{name} again": residuals.of(name, edits=edits, edit=key, label=f"{name}-round-{number}")
            for name in ("good", "bad")
        }

    def remaining(sets: Mapping[str, Tensor]) -> Tensor:
        difference = mean_difference(sets["good again"], sets["bad again"])[:, None]
        return _orthogonalized(difference, sets, residuals.events)

    try:
        difference = on_device_or_cpu(remaining, {**sets, **ablated}, residuals.events.say)
    except ValueError:
        residuals.events.say(f"round {number}: good and bad residuals no longer differ")
        return basis
    directions = torch.cat([basis.directions, difference.cpu()], dim=1)
    return orthonormal_basis(directions, torch.cat([basis.weights, torch.ones(basis.layers, 1)], dim=1))


def _geometry(key: str, good: Tensor, bad: Tensor, basis: Basis) -> GeometryRecord:
    first = basis.directions[:, 0]
    measures = geometry(good, bad, first)
    layers = []
    for layer in range(basis.layers):
        figures = {}
        for field in fields(measures):
            value = float(getattr(measures, field.name)[layer])
            figures[field.name] = round(value, 6) if math.isfinite(value) else None
        planes = projections(good[:, layer], bad[:, layer], first[layer])
        points = [[[round(x, 4), round(y, 4)] for x, y in plane[:_POINTS].tolist()] for plane in planes]
        layers.append(LayerGeometry(**figures, good_points=points[0], bad_points=points[1]))
    return GeometryRecord(key=key, layers=layers)
