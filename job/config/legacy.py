"""Flat TOML settings of comparable tools: accepted, renamed or dropped, each with a reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_NOTHING_TO_CACHE = (
    "an edit is a hook on module outputs: no weight is changed, so none has to be kept, restored or decomposed"
)
_SMALL_RESIDUALS = "only the residual at the last prompt position of each layer is stored"
_IN_REPORT = "the report shows the geometry of every layer"
_BY_RULE = "the batch size follows from the model and the device's memory; batching.rows sets it, tune measures it"

# Old name: new name.
RENAMED = {
    "n_trials": "trials",
    "n_startup_trials": "startup_trials",
    "batch_size": "batching.rows",
    "good_evaluation_prompts": "good_eval_prompts",
    "bad_evaluation_prompts": "bad_eval_prompts",
    "dtypes": "loading.dtypes",
    "device_map": "loading.device_map",
    "max_memory": "loading.max_memory",
    "response_prefix": "loading.response_prefix",
    "refusal_markers": "scoring.refusal_markers",
    "refusal_check_tokens": "scoring.answer_tokens",
    "max_response_length": "scoring.answer_tokens",
    "row_normalization": "ablation.row_normalization",
    "orthogonalize_direction": "directions.orthogonalize_direction",
    "orthogonalize_directions": "directions.orthogonalize_directions",
    "winsorization_quantile": "directions.winsorization_quantile",
    "pca_method": "directions.pca_method",
    "pca_alpha": "directions.alpha",
    "n_components": "directions.n_components",
    "n_refusal_directions": "directions.n_components",
}
# Old name: why it is no longer needed.
OBSOLETE = {
    "max_batch_size": _BY_RULE,
    "use_binary_search_batch_tuning": _BY_RULE,
    "cache_weights": _NOTHING_TO_CACHE,
    "enable_svd_cache": _NOTHING_TO_CACHE,
    "max_svd_cache_size": _NOTHING_TO_CACHE,
    "use_incremental_adapter_updates": _NOTHING_TO_CACHE,
    "use_amp_for_residuals": _SMALL_RESIDUALS,
    "offload_residuals_to_cpu": _SMALL_RESIDUALS,
    "cache_residuals_in_memory": _SMALL_RESIDUALS,
    "cache_clear_frequency": _SMALL_RESIDUALS,
    "enable_residual_cache": "residuals are always kept in the run folder",
    "residual_cache_dir": "residuals are always kept in the run folder",
    "storage": "the study is study.db in the run folder",
    "study_name": "the study is study.db in the run folder",
    "auto_select": "the best trial is chosen without a question; `abliterate export --trial N` exports another",
    "auto_select_path": "the export is in the run folder; --upload file:///dir delivers it elsewhere",
    "use_global_warmup": "trials need no warm-up",
    "use_efficient_refusal_detection": "refusals are always detected during decoding",
    "compile": "edits do not touch the model's code",
    "offload_outputs_to_cpu": _SMALL_RESIDUALS,
    "evaluate_model": "`abliterate evaluate MODEL --against BASE` compares two models",
    "collect_reproducibles": "results are not collected",
    "reproduce": "`abliterate run --reproduce FILE` reproduces an export",
    "chain_of_thought_skips": "loading.response_prefix = auto finds and closes chains of thought",
    "print_responses": "`abliterate report --include-responses` shows responses",
    "print_residual_geometry": _IN_REPORT,
    "plot_residuals": _IN_REPORT,
    "residual_plot_path": _IN_REPORT,
    "residual_plot_title": _IN_REPORT,
    "residual_plot_style": _IN_REPORT,
    "kl_divergence_scale": "refusals and KL divergence are separate objectives without scaling",
    "kl_divergence_target": "refusals and KL divergence are separate objectives without scaling",
    "full_normalization_lora_rank": "norms are preserved exactly, not approximately by a low-rank matrix",
    "study_checkpoint_dir": "the study is study.db in the run folder",
    "benchmarks": "`abliterate evaluate --tasks` runs benchmarks",
    "max_shard_size": "an export has the base model's shards",
    "database": "other machines evaluate trials through Ray: --engine ray --address HOST:PORT",
}
# Old name: conversion of its value.
CONVERTED: dict[str, Callable[[Any], tuple[str, Any]]] = {
    "use_pca_extraction": lambda value: ("directions.method", "contrastive-pca" if value else "mean-difference"),
    "quantization": lambda value: ("loading.quantization", str(value).replace("_", "-")),
    "export_strategy": lambda value: ("export_format", {"merge": "merged"}.get(value, value)),
    # There 0 meant nothing after the first extraction.
    "iterative_rounds": lambda value: ("directions.iterative_rounds", max(int(value), 0) + 1),
}
# New names of fields of prompt tables; the others were for pictures.
_PROMPT_FIELDS = {"dataset": "spec", "commit": "revision"}
_PICTURES = ("residual_plot_label", "residual_plot_color")
_PROMPT_TABLES = ("good_prompts", "bad_prompts", "good_eval_prompts", "bad_eval_prompts", "helpfulness_prompts",
                  "unhelpfulness_prompts")  # fmt: skip


def translated(table: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a settings table with current names as dotted keys, and a line for every old one."""
    found: dict[str, Any] = {}
    notes = []
    for key, value in table.items():
        if key in OBSOLETE:
            notes.append(f"{key} is no longer needed: {OBSOLETE[key]}")
        elif key in CONVERTED:
            name, converted = CONVERTED[key](value)
            found[name] = converted
            notes.append(f"{key} = {_toml(value)} is {name} = {_toml(converted)} now")
        elif key in RENAMED:
            found[RENAMED[key]] = value
            notes.append(f"{key} is {RENAMED[key]} now")
        else:
            found[key] = value
    for name in _PROMPT_TABLES:
        if isinstance(found.get(name), Mapping) and "dataset" in found[name]:
            fields = {key: value for key, value in found[name].items() if key not in _PICTURES}
            found[name] = {_PROMPT_FIELDS.get(key, key): value for key, value in fields.items()}
            notes.append(f"{name}.dataset is {name}.spec now")
    if "system_prompt" in found:
        _give_every_set(found, found.pop("system_prompt"))
        notes.append("system_prompt is now a field of every table of prompts")
    if "model" in found and "model_commit" in found:
        found["model"] = f"{found['model']}@{found.pop('model_commit')}"
        notes.append("model_commit is now part of model, as NAME@COMMIT")
    return found, notes


def _give_every_set(found: dict[str, Any], system_prompt: Any) -> None:
    """Add a system prompt to all prompt tables without one."""
    for name in _PROMPT_TABLES[:4]:
        table = found.get(name, {})
        if isinstance(table, str):
            table = {"spec": table}
        found[name] = {"system_prompt": system_prompt, **table}


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)
