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
from job.export.benchmarks import benchmark_rows
from job.export.reproduction import Reproduction
from job.export.scorecard import agreement_line, group_rows, how, positions, scorecard_rows, thinking_rows
from job.model.base_card import PATH, URL, BaseCard, read_base_card
from job.model.carried_files import licence_files
from job.model.quantization import DTYPE, quantisation_in
from job.numerics.statistics import difference_interval
from job.records import Component, DetectorReport, EditParameters, ExportFormat, Figures
from job.records.edits import LayerStrengths
from job.records.evaluation import Benchmarks
from job.storage.exports import PICTURE
from job.text.behaviour import HARMLESS, HARMLESS_REFUSAL, BehaviourWords, words_of
from job.text.divergence import kl_with_bound
from job.text.markup import escaped, markdown, markdown_table
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


def model_card(
    made: Reproduction,
    source: Path,
    tensors: int | None = None,
    benchmarks: Benchmarks | None = None,
    detectors: DetectorReport | None = None,
) -> str:
    """Return an export's README.md; `source` is the base model's folder, whose card names the licence.

    `tensors` is the number of the base model's tensors if the export has all of them, `benchmarks` what was measured
    of its trial, `detectors` what they found in both models' responses.
    """
    base, words = read_base_card(source, made.base_model), words_of(made.behaviour)
    result = _result(made.base, made.edited, words)
    return template("job.export", "model_card.md").render(
        made=made,
        words=words,
        harmless=made.behaviour in HARMLESS,
        only_harmless=made.behaviour == HARMLESS_REFUSAL,
        tensors=tensors,
        metadata=_metadata(made, redacted(base.metadata)),
        title=title(made),
        picture=PICTURE,
        alternative=markdown(result),
        hub=_HUB,
        link=_link,
        report_prompts=report_description(made.reused_prompts, made.edited.good_prompts + made.edited.bad_prompts),
        result=result,
        figures=markdown_table(scorecard_rows(made.base, made.edited, words)),
        groups=markdown_table(escaped(groups)) if (groups := group_rows(made.base, made.edited, words)) else "",
        thoughts=markdown_table(thoughts) if (thoughts := thinking_rows(made.base, made.edited, words)) else "",
        how=how(words),
        agreement=agreement_line(detectors, words) if detectors else "",
        change=_change(made),
        benchmarks=benchmarks,
        scores=markdown_table(benchmark_rows(benchmarks.scores)) if benchmarks else "",
        quantisation=quantisation_in(source),
        dtype=DTYPE,
        direction=direction_text(made.edit),
        strengths=markdown_table(strength_rows(made.edit)),
        licence=_licence(made, base, source),
    )


def title(made: Reproduction) -> str:
    """Return what a card calls the model."""
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


def _result(base: Figures, edited: Figures, words: BehaviourWords) -> str:
    before, after = (f"{one.refusals} of {one.bad_prompts}" for one in (base, edited))
    outcomes = edited.outcomes_of_all("bad")
    empty = f", {outcomes.empty} of them by an empty response" if outcomes and outcomes.empty else ""
    return (
        f"The base model {words.shows} {before} prompts with the behaviour, this model {after}{empty}. "
        f"Answers to other prompts are {kl_with_bound(edited.kl or 0)} (KL divergence {edited.kl or 0:.3g} nats)."
    )


def _change(made: Reproduction) -> tuple[float, float, float]:
    """Return the change of false refusals, or of another behaviour, in percentage points with its interval."""
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
        tags=["abliterated", *(["not-for-all-audiences"] if made.behaviour not in HARMLESS else [])],
        model_name=title(made),
        eval_results=_eval_results(made),
    )
    return data.to_yaml().strip()


def _eval_results(made: Reproduction) -> list[EvalResult]:
    edited, words = made.edited, words_of(made.behaviour)
    rate = "refusal_rate" if words.refuses else "behaviour_rate"
    share = "share of refused prompts" if words.refuses else f"share of responses {words.shown}"
    values = (
        ("bad", rate, share, edited.refusals / edited.bad_prompts),
        ("bad", "degenerate_rate", "share of degenerate responses", edited.degenerate / edited.bad_prompts),
        ("good", f"false_{rate}", share, edited.false_refusals / edited.good_prompts),
        (
            "good",
            "kl_divergence",
            f"KL divergence from the base model, {positions(edited.kl_tokens)}, nats",
            edited.kl or 0.0,
        ),
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
