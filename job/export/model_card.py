"""The model card of an export: what was done, what was measured, what it may be used for.

It holds nothing that differs between two hosts that did the same job, and no path, host, private repository, prompt
or answer: all it says of the job comes from reproduce.json, the rest from the base model's own card.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.data.prompts import report_description
from job.errors import one_line
from job.export.reproduction import Reproduction
from job.model.base_card import PATH, URL, BaseCard, read_base_card
from job.model.carried_files import licence_files
from job.model.quantization import DTYPE, quantisation_in
from job.numerics.statistics import difference_interval
from job.records import Component, EditParameters, ExportFormat, Figures
from job.records.edits import LayerStrengths
from job.text.divergence import kl_with_bound
from job.text.intervals import count_with_interval
from job.text.markup import markdown, markdown_table
from job.text.redaction import redacted
from job.text.templates import template

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_HUB = "https://huggingface.co"
_LIBRARY: dict[ExportFormat, str | None] = {"merged": "transformers", "adapter": "peft", "directions": None}
# What licences ask to be shown with derived models, by how their names begin.
_NOTICES = {
    "llama3": "Built with Llama.",
    "llama4": "Built with Llama.",
    "gemma": "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms.",
}


def model_card(made: Reproduction, source: Path, tensors: int | None = None) -> str:
    """Return an export's README.md; `source` is the base model's folder, whose card names the licence.

    `tensors` is the number of the base model's tensors if the export has all of them.
    """
    base = read_base_card(source, made.base_model)
    return template("job.export", "model_card.md").render(
        made=made,
        tensors=tensors,
        metadata=_metadata(made, redacted(base.metadata)),
        title=_title(made),
        hub=_HUB,
        link=_link,
        report_prompts=report_description(made.reused_prompts, made.edited.good_prompts + made.edited.bad_prompts),
        result=_result(made.base, made.edited),
        figures=markdown_table(figures_rows(made.base, made.edited)),
        change=_change(made),
        quantisation=quantisation_in(source),
        dtype=DTYPE,
        direction=direction_text(made.edit),
        strengths=markdown_table(strength_rows(made.edit)),
        licence=_licence(made, base, source),
    )


def _title(made: Reproduction) -> str:
    if made.base_model is None:
        return "Model with a behaviour removed"
    return f"{one_line(made.base_model.split('/')[-1])}-abliterated"


def direction_text(edit: EditParameters) -> str:
    """Return in words which directions an edit ablates, and how strongly relative to each other."""
    if edit.layer_strengths is not None:
        several = len(edit.layer_strengths["mlp"][0]) > 1
        learned = ", learned by gradient" if edit.directions is not None else ""
        return f"each layer's own direction{'s' if several else ''}{learned}"
    several = len(edit.strengths) > 1
    shares = f", by shares of {', '.join(f'{share:.3g}' for share in edit.strengths)}" if several else ""
    if edit.direction_index is None:
        return f"each layer's own direction{'s' if several else ''}{shares}"
    return f"the direction{'s' if several else ''} of layer {edit.direction_index:.4g} in all layers{shares}"


def _result(base: Figures, edited: Figures) -> str:
    before, after = (f"{one.refusals} of {one.bad_prompts}" for one in (base, edited))
    return (
        f"The base model refuses {before} prompts with the behaviour, this model {after}. "
        f"Answers to other prompts are {kl_with_bound(edited.kl or 0)} (KL divergence {edited.kl or 0:.3g} nats)."
    )


def figures_rows(base: Figures, edited: Figures) -> list[tuple[str, str, str]]:
    """Return the figures of the base and the edited model side by side, with 95 % intervals."""
    bad, good = base.bad_prompts, base.good_prompts
    counts = (
        ("refused, of prompts with the behaviour", base.refusals, edited.refusals, bad),
        ("refused, of prompts without it", base.false_refusals, edited.false_refusals, good),
        (
            "broken responses (empty, in circles, in another script or gibberish), of prompts with the behaviour",
            base.degenerate,
            edited.degenerate,
            bad,
        ),
        ("broken responses, of prompts without it", base.false_degenerate, edited.false_degenerate, good),
    )
    rows = [(name, count_with_interval(before, n), count_with_interval(after, n)) for name, before, after, n in counts]
    kl = f"KL divergence from the base model, {kl_positions(edited)}, mean of {good} prompts without it"
    rows.append((kl, "0", _kl(edited)))
    if (spread := edited.kl_spread) is not None:
        values = f"{spread.median:.4g}, {spread.ninetieth:.4g}, {spread.largest:.4g} nats (prompt {spread.prompt})"
        rows.append(("the same by prompt: median, 90 % of prompts at most, largest", "0", values))
    return [("", "base model", "edited model"), *rows]


def kl_positions(figures: Figures) -> str:
    """Return in words where in a response the KL divergence was measured."""
    if figures.kl_tokens == 1:
        return "first response token"
    return f"first {figures.kl_tokens} tokens of the base model's own responses"


def _kl(figures: Figures) -> str:
    interval = "" if figures.kl_interval is None else f" ({figures.kl_interval[0]:.4g}–{figures.kl_interval[1]:.4g})"
    return f"{figures.kl or 0:.4g} nats{interval}, {kl_with_bound(figures.kl or 0)}"


def _change(made: Reproduction) -> tuple[float, float, float]:
    """Return the change of false refusals in percentage points, and the ends of its interval."""
    base, edited = made.base, made.edited
    before, after = (base.false_refusals, base.good_prompts), (edited.false_refusals, edited.good_prompts)
    low, high = difference_interval(before, after)
    return 100 * (after[0] / after[1] - before[0] / before[1]), 100 * low, 100 * high


def strength_rows(edit: EditParameters) -> list[tuple[str, ...]]:
    """Return the strengths of an edit: its weight kernels, or those by layer in short."""
    if edit.layer_strengths is not None:
        return _layer_strength_rows(edit.layer_strengths)
    fields = ("max_weight", "max_weight_position", "min_weight", "min_weight_distance")
    rows = [(name, *(f"{getattr(kernel, field):.4g}" for field in fields)) for name, kernel in edit.kernels.items()]
    return [("component", *fields), *rows]


def _layer_strength_rows(given: Mapping[Component, LayerStrengths]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("component", "mean strength", "largest", "in layer")]
    for component, layers in given.items():
        values = [strength for layer in layers for strength in layer]
        strongest = max(range(len(layers)), key=lambda layer: max(layers[layer]))
        rows.append((component, f"{sum(values) / len(values):.4g}", f"{max(values):.4g}", f"{strongest}"))
    return rows


def _link(text: str, url: str) -> str:
    """Return a link in Markdown; a place that is no plain URL or name is shown without one."""
    return f"[{markdown(text)}]({url})" if URL.fullmatch(url) or PATH.fullmatch(url) else markdown(text)


def _metadata(made: Reproduction, inherited: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    datasets = {record.source["dataset"] for record in made.prompts.values() if "dataset" in record.source}
    relation = "finetune" if made.format == "merged" else "adapter"
    data = ModelCardData(
        **inherited,
        library_name=_LIBRARY[made.format],
        pipeline_tag="text-generation",
        base_model=made.base_model,
        base_model_relation=relation if made.base_model else None,
        datasets=sorted(datasets) or None,
        tags=["abliterated", "not-for-all-audiences"],
        model_name=_title(made),
        eval_results=_eval_results(made),
    )
    return data.to_yaml().strip()


def _eval_results(made: Reproduction) -> list[EvalResult]:
    edited = made.edited
    values = (
        ("bad", "refusal_rate", "share of refused prompts", edited.refusals / edited.bad_prompts),
        ("bad", "degenerate_rate", "share of degenerate responses", edited.degenerate / edited.bad_prompts),
        ("good", "false_refusal_rate", "share of refused prompts", edited.false_refusals / edited.good_prompts),
        ("good", "kl_divergence", f"KL divergence from the base model, {kl_positions(edited)}, nats", edited.kl or 0.0),
    )
    return [_eval_result(made, kind, *measured) for kind, *measured in values]


def _eval_result(made: Reproduction, kind: str, metric: Any, name: Any, value: Any) -> EvalResult:
    from huggingface_hub import EvalResult

    used = made.prompts.get(f"{kind}_report_prompts") or made.prompts[f"{kind}_eval_prompts"]
    named = "prompts" if made.reused_prompts else "held-out prompts"
    return EvalResult(
        task_type="text-generation",
        task_name="Text Generation",
        # Results of one type of dataset are shown as one table: local sets need types of their own.
        dataset_type=used.source.get("dataset", f"local-{kind}-prompts"),
        dataset_name=f"{named} {'with' if kind == 'bad' else 'without'} the behaviour",
        dataset_split=used.taken["split"] if "dataset" in used.source else None,
        dataset_revision=used.source.get("commit") or None,
        metric_type=metric,
        metric_name=name,
        metric_value=round(value, 6),
    )


def _licence(made: Reproduction, base: BaseCard, source: Path) -> dict[str, Any]:
    name, files = redacted(base.licence), licence_files(source)
    terms = redacted(base.metadata.get("license_link")) or (files[0] if files else None)
    if terms is None and made.base_model:
        terms = f"{_HUB}/{made.base_model}"
    notice = next((text for start, text in _NOTICES.items() if str(name or "").lower().startswith(start)), None)
    return {"name": name, "terms": terms, "files": files, "notice": notice}
