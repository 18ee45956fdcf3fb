"""The model card of an export: what was done, what was measured, what it may be used for.

It holds nothing that differs between two hosts that did the same job, and no path, host, private repository, prompt
or answer: all it says of the job comes from reproduce.json, the rest from the base model's own card.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.data.prompts import report_description
from job.export.reproduction import PromptsRecord, Reproduction
from job.model.base_card import PATH, URL, BaseCard, read_base_card
from job.model.carried_files import licence_files
from job.model.quantization import DTYPE, quantisation_in
from job.numerics.statistics import difference_interval
from job.records import Component, EditParameters, ExportFormat, Figures
from job.records.edits import LayerStrengths
from job.text.intervals import count_with_interval
from job.text.markup import markdown, one_line
from job.text.redaction import redacted

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_WARNING = """\
> [!WARNING]
> Safety refusals were deliberately removed from this model. It may comply with harmful requests, and whoever deploys
> it needs safeguards of their own."""
_HUB = "https://huggingface.co"
_LIBRARY: dict[ExportFormat, str | None] = {"merged": "transformers", "adapter": "peft", "directions": None}
_USES: dict[ExportFormat, str] = {
    "merged": "",
    "adapter": "\n\nThis is a LoRA adapter: load the base model and put it on with `peft.PeftModel.from_pretrained`.",
    "directions": "\n\n`edit.safetensors` holds directions and parameters only; `abliterate apply MODEL "
    "edit.safetensors OUT`\nmakes the edited model from the base model.",
}
# What licences ask to be shown with derived models, by how their names begin.
_NOTICES = {
    "llama3": "Built with Llama.",
    "llama4": "Built with Llama.",
    "gemma": "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms.",
}


def model_card(made: Reproduction, source: Path) -> str:
    """Return the README.md of an export.

    Args:
        made: Its reproduce.json.
        source: Folder of the base model, whose card names the licence.
    """
    base = read_base_card(source, made.base_model)
    sections = {
        "Figures": _figures(made),
        "What was done": _method(made, source),
        "Limits": _limits(made),
        "Licence": _licence(made, base, source),
        "Reproduction": _reproduction(made),
    }
    blocks = [
        f"---\n{_metadata(made, redacted(base.metadata))}\n---",
        f"# {markdown(_title(made))}",
        _WARNING,
        _opening(made),
    ]
    blocks += [f"## {title}\n\n{text}" for title, text in sections.items()]
    return "\n\n".join(blocks) + "\n"


def _opening(made: Reproduction) -> str:
    named = f" of {_link(made.base_model, f'{_HUB}/{made.base_model}')}" if made.base_model else ""
    return f"An edit{named} from which this behaviour was removed: {markdown(made.behaviour)}.{_USES[made.format]}"


def _figures(made: Reproduction) -> str:
    return f"""\
Measured on what is published here, on {_report_prompts(made)}. Intervals are of
95 %: Wilson's for counts, the percentile bootstrap for the mean.

{figures_table(made.base, made.edited)}

{_changes(made)}"""


def _method(made: Reproduction, source: Path) -> str:
    return f"""\
The direction that mediates the behaviour in the residual stream was found from two sets of prompts and projected out
of the weights that write into the stream (Arditi et al. 2024, arXiv:2406.11717). How strongly in which layer was
searched for with {made.trials} trials, of which this is number {made.trial.number}.

- base model: {_base_model(made)}{_dequantised(source)}
- removed: {markdown(made.behaviour)}
- direction: {markdown(made.settings["directions"]["method"])}, {direction_text(made.edit)}
- norms of the weights that are preserved: {markdown(made.settings["ablation"]["row_normalization"])}
- computed in {markdown(made.resolution.dtype)}, seed {markdown(made.settings["seed"])}{_prefix(made)}

{strength_table(made.edit)}

{_prompts_table(made.prompts)}"""


def _limits(made: Reproduction) -> str:
    return f"""\
- Refusals are counted by phrases in answers of up to {markdown(made.settings["scoring"]["answer_tokens"])} tokens: an \
evasion without them goes unnoticed, and an answer that is no refusal need not be a good one.
- The figures hold for prompts like those of the sets above; other kinds of requests may still be refused.
- What the base model knows, gets wrong or is biased to, so does this one."""


def _reproduction(made: Reproduction) -> str:
    return f"""\
`reproduce.json` holds all settings, commits, versions and hashes. `abliterate run --reproduce reproduce.json` makes
the same edit again and compares the hashes; model and prompts that lie in local files have to be given as well.
`sha256sum -c SHA256SUMS` checks the files.

Made with abliteration-job {markdown(made.versions["abliteration-job"])}."""


def _report_prompts(made: Reproduction) -> str:
    return report_description(made.reused_prompts, made.edited.good_prompts + made.edited.bad_prompts)


def _title(made: Reproduction) -> str:
    if made.base_model is None:
        return "Model with a behaviour removed"
    return f"{one_line(made.base_model.split('/')[-1])}-abliterated"


def _base_model(made: Reproduction) -> str:
    if "repository" in made.model:
        return f"{markdown(made.model['repository'])} at commit {markdown(made.model['commit'])}"
    name = markdown(made.base_model or "not named")
    return f"{name}, sha256 {markdown(made.model['sha256'])} over its files" if "sha256" in made.model else name


def _dequantised(source: Path) -> str:
    found = quantisation_in(source)
    return f"; its files, quantised with {found.method}, were dequantised to {DTYPE}" if found else ""


def _prefix(made: Reproduction) -> str:
    prefix = made.resolution.response_prefix
    return f"; answers were made to begin with {markdown(repr(prefix))}" if prefix else ""


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


def figures_table(base: Figures, edited: Figures) -> str:
    """Return the figures of the base and the edited model side by side, with 95 % intervals."""
    bad, good = base.bad_prompts, base.good_prompts
    counts = (
        ("refused, of prompts with the behaviour", base.refusals, edited.refusals, bad),
        ("refused, of prompts without it", base.false_refusals, edited.false_refusals, good),
        (
            "broken answers (empty, in circles, in another script or gibberish), of prompts with the behaviour",
            base.degenerate,
            edited.degenerate,
            bad,
        ),
        ("likewise, of prompts without it", base.false_degenerate, edited.false_degenerate, good),
    )
    rows = [(name, count_with_interval(before, n), count_with_interval(after, n)) for name, before, after, n in counts]
    kl = f"KL divergence from the base model, {kl_positions(edited)}, mean of {good} prompts without it"
    table = [("", "base model", "edited model"), ("---",) * 3, *rows, (kl, "0", _kl(edited))]
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def kl_positions(figures: Figures) -> str:
    """Return in words where in an answer the KL divergence was measured."""
    if figures.kl_tokens == 1:
        return "first answer token"
    return f"first {figures.kl_tokens} tokens of the base model's own answers"


def _kl(figures: Figures) -> str:
    if figures.kl_interval is None:
        return f"{figures.kl or 0:.4g} nats"
    return f"{figures.kl or 0:.4g} nats ({figures.kl_interval[0]:.4g}–{figures.kl_interval[1]:.4g})"


def _changes(made: Reproduction) -> str:
    base, edited = made.base, made.edited
    before, after = (base.false_refusals, base.good_prompts), (edited.false_refusals, edited.good_prompts)
    low, high = difference_interval(before, after)
    change = 100 * (after[0] / after[1] - before[0] / before[1])
    return (
        f"Change of false refusals: {change:+.1f} percentage points ({100 * low:+.1f} to {100 * high:+.1f}). "
        "Change of capability on benchmarks: not measured."
    )


def strength_table(edit: EditParameters) -> str:
    """Return the strengths of an edit: its weight kernels, or those by layer in short."""
    if edit.layer_strengths is not None:
        return _layer_strength_table(edit.layer_strengths)
    rows = "\n".join(
        f"| {component} | {kernel.max_weight:.4g} | {kernel.max_weight_position:.4g} "
        f"| {kernel.min_weight:.4g} | {kernel.min_weight_distance:.4g} |"
        for component, kernel in edit.kernels.items()
    )
    return f"""\
| component | max_weight | max_weight_position | min_weight | min_weight_distance |
|---|---|---|---|---|
{rows}"""


def _layer_strength_table(given: Mapping[Component, LayerStrengths]) -> str:
    rows = []
    for component, layers in given.items():
        values = [strength for layer in layers for strength in layer]
        strongest = max(range(len(layers)), key=lambda layer: max(layers[layer]))
        rows.append(f"| {component} | {sum(values) / len(values):.4g} | {max(values):.4g} | {strongest} |")
    return "\n".join(["| component | mean strength | largest | in layer |", "|---|---|---|---|", *rows])


def _prompts_table(prompts: Mapping[str, PromptsRecord]) -> str:
    lines = ["| prompts | from | number |", "|---|---|---|"]
    for name, record in prompts.items():
        lines.append(
            f"| {markdown(name.removesuffix('_prompts').replace('_', ' '))} | {_origin(record)} | {record.count} |"
        )
    return "\n".join(lines)


def _origin(record: PromptsRecord) -> str:
    if "dataset" in record.source:
        named, commit, split = record.source["dataset"], record.source["commit"], record.taken["split"]
        return markdown(f"{named} at commit {commit}, split {split}")
    if "sha256" in record.source:
        return f"local files with sha256 {markdown(record.source['sha256'])}"
    return "a dataset that is not named"


# --- metadata and licence ---------------------------------------------------------------------------------


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
        ("bad", "degenerate_rate", "share of degenerate answers", edited.degenerate / edited.bad_prompts),
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


def _licence(made: Reproduction, base: BaseCard, source: Path) -> str:
    name, files = redacted(base.licence), licence_files(source)
    terms = redacted(base.metadata.get("license_link")) or (files[0] if files else None)
    if terms is None and made.base_model:
        terms = f"{_HUB}/{made.base_model}"
    if name is None and terms is None:
        return "The base model's files state no licence; whatever holds for the base model holds for this one."
    text = f"That of the base model: {markdown(name or 'see its terms')}"
    text += f" ({_link('terms', terms)})." if terms else "."
    notice = next((text for start, text in _NOTICES.items() if str(name or "").lower().startswith(start)), None)
    listed = f" Its files are included: {markdown(', '.join(files))}." if files and made.format == "merged" else ""
    return text + listed + (f"\n\n{notice}" if notice else "")
