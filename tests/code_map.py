"""Map of the code: all packages in the order of the import contract with their docstrings, and a glossary.

`python -m tests.code_map --write docs/code-map.md` writes it.
"""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

from tests.generated import write_or_print

ROOT = Path(__file__).parents[1]
JOB = ROOT / "job"
_INTRODUCTION = """# Map of the code

A job goes one way: settings → preflight → prompts → model → residuals → directions → search → choice → export →
upload → report. `run` in `job/pipeline.py` is that story. Below are all packages from the top down, in the order of the
import contract in `pyproject.toml`: a package may use those below it, never one above it. `cli` and `api` share a row
of the contract; packages of one row do not use each other. This page is written by
`python -m tests.code_map --write docs/code-map.md`.

| Package | What it holds | Modules |
|---|---|---|
"""
_QUESTIONS = """
## Where is …

| Question | Answer |
|---|---|
"""
# Question, module, names that answer the question.
WHERE = (
    ("Where is a KL divergence measured?", "job/scoring/kl.py", "KLReference"),
    ("Where is the formula of the KL divergence?", "job/numerics/metrics.py", "kl_divergence"),
    ("Where are refusals counted?", "job/scoring/refusals.py", "RefusalCounter"),
    ("Where are the edits of a batch scored?", "job/scoring/trial_scorer.py", "TrialScorer"),
    ("Where are a report's figures measured?", "job/scoring/report_metrics.py", "ReportMetrics"),
    ("Where do a trial's strengths become tables for every writer?", "job/edits/compile.py", "compile_edits"),
    ("Where does a trial's edit become a hook?", "job/edits/hooks.py", "Intervention"),
    ("Where is an unsupported model family refused?", "job/proof/truth_test.py", "inspect_model"),
    ("Where are residual writers discovered?", "job/architectures/discovery.py", "WriterSearch"),
    ("Where is `search.method = auto` resolved?", "job/search/method.py", "first_method"),
    ("Where do scorers among the objectives rule out gradients?", "job/config/sections.py", "asked_method"),
    ("Where is the choice among finalists?", "job/search/bounds.py", "choose_finalist"),
    ("Where is the column of a prompt file found?", "job/data/columns.py", "ColumnTexts"),
    ("Where does a resumed job decide which stages are left?", "job/pipeline.py", "run"),
    ("Where does a finished job find out what remains?", "job/lifecycle/outcome.py", "left_to_do"),
    ("Where does a resumed run decide whether it needs the model?", "job/stages/choice.py", "is_exported"),
    ("Where is it decided whether a job is completed?", "job/lifecycle/outcome.py", "completed"),
    ("Where does a resumed search find its unfinished plans?", "job/search/optimizer.py", "_unfinished_plans"),
    ("Where are tasks given to workers?", "job/workers/executor.py", "Executor"),
    ("Where does a worker evaluate a task?", "job/stages/evaluation.py", "JobEvaluator"),
    ("Where are the workers of this machine started?", "job/workers/local.py", "LocalEngine"),
    ("Where are the workers of other machines started?", "job/workers/ray_engine.py", "RayEngine"),
    ("Where is job.json written?", "job/storage/job_file.py", "JobFile"),
    ("Where are missing parts of an interrupted S3 upload sent?", "job/transfer/s3/sending.py", "_send_large"),
    ("Where is one failed S3 request retried?", "job/transfer/s3/connection.py", "connect"),
    ("Where is a delivery to S3 continued after a failure?", "job/upload/s3.py", "wait_after"),
    ("Where does a job fall back from gradients to TPE?", "job/stages/gradient.py", "find_path"),
    ("Where is a scorer tried before the job?", "job/preflight/scorer_checks.py", "scorer_checks"),
    ("Where are cross-entropy and benchmarks measured as objectives?", "job/scoring/measures.py", "EditMeasures"),
    ("Where is a job's identity made?", "job/storage/identity.py", "identify"),
    ("Where is the memory of a model planned, and the batch size?", "job/preflight/memory_plan.py", "plan"),
    ("Where is an export proven?", "job/export/verification.py", "MeasuredEdit"),
    ("Where is a run folder read for status, front and reports?", "job/report/run_view.py", "RunView"),
    ("Where is the scorecard section of a report written?", "job/report/markdown.py", "_scorecard"),
    ("Where is the model card written?", "job/export/model_card.py", "model_card"),
    ("Where is the picture on the model card drawn?", "job/export/picture.py", "card_picture"),
    ("Where is it decided whether a rented machine may be ended?", "job/cloud/end_policy.py", "ending"),
    ("Where does a machine end its own rental?", "job/cloud/self_stop.py", "end"),
    ("Where is a rented machine destroyed from outside?", "job/cloud/destroying.py", "Destroyer"),
)
_GLOSSARY = """
## Glossary

| Word | Meaning |
|---|---|
| ablation | Projecting a direction out of what a module adds to the residual stream |
| actor | A worker on a Ray cluster |
| response | What a model says to a prompt. Some names say answer: `answer_tokens`, `answers/`, the JSON of `chat` |
| bad prompts, good prompts | Prompts that trigger the behaviour to remove, and prompts that do not |
| basis | The orthonormal directions of every layer, with their weights |
| broken | A response that is empty, repetitive or in another script than its prompt; judged from the text alone |
| incoherent | A response that the base model finds much less likely than its own responses |
| not answered | Refused or broken; in the search evasive responses count as refused |
| checkpoint | A model's files. The option `--checkpoint` names the place of a job's mirror |
| edit | Directions and strengths for all residual writers of a model |
| engine | What runs workers: this machine (local) or a Ray cluster (ray) |
| executor | Gives tasks to workers and returns their results in order |
| export | An edited model, an adapter or a directions file in the run folder, proven and sealed |
| choice split | Extraction prompts that directions and search leave alone: finalists are measured on them |
| finalist | A trial that may be chosen, and is measured again: by full-length responses and on the choice split |
| front | The trials that are Pareto-optimal in refusals and KL |
| gate | A bound on refusals or KL; an export that misses it is not delivered |
| identity | The settings that determine the result; their hash names the job |
| lease | The right to run a job, kept at its mirror and renewed |
| lock | The right to run a job, kept in its run folder |
| mirror | A copy of a job's state elsewhere, from which another machine continues |
| pinned | Resolved at the first start and kept in job.json |
| plan | Trials that are evaluated together, stored before any of them is evaluated |
| memory plan | Where a model's weights go, and how many sequences fit in a forward pass |
| residual writer | A module whose output is added to the residual stream |
| rows | Sequences in one forward pass: the batch size |
| run folder | WORKSPACE/JOB_ID, all that a job leaves |
| search split, report split | Evaluation prompts for scoring trials, and those for the figures that are reported |
| held-out prompts | Report prompts whose text neither directions, search nor choice use |
| strength | λ, the share of a direction that is removed from one writer; a kernel gives it for every layer |
| task | What a worker is given: edits to score, or prompts to extract residuals of |
| trial | One edit that the search measures |
| twin | A tiny random model of the same family, on which the architecture is proven |
| worker | A process that evaluates one task at a time, its model loaded once |
| writer | A residual writer |
"""


def packages() -> list[str]:
    """Return the packages of the import contract, from the top down."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers: list[str] = next(contract for contract in contracts if contract["type"] == "layers")["layers"]
    return [name for layer in layers for name in layer.split(" | ")]


def page() -> str:
    rows = [f"| {_linked(_path(name))} | {_about(_path(name))} | {_modules(name)} |" for name in packages()]
    where = [f"| {question} | `{place}` in {_linked(ROOT / file)} |" for question, file, place in WHERE]
    return _INTRODUCTION + "\n".join(rows) + "\n" + _QUESTIONS + "\n".join(where) + "\n" + _GLOSSARY


def _path(name: str) -> Path:
    return JOB / name if (JOB / name).is_dir() else JOB / f"{name}.py"


def _linked(path: Path) -> str:
    return f"[`{path.relative_to(ROOT)}`](../{path.relative_to(ROOT)})"


def _about(path: Path) -> str:
    file = path / "__init__.py" if path.is_dir() else path
    said = ast.get_docstring(ast.parse(file.read_text())) or ""
    return said.partition("\n\n")[0].replace("\n", " ").rstrip(".").replace("|", "\\|")


def _modules(name: str) -> str:
    if not (JOB / name).is_dir():
        return ""
    own = [path.stem for path in (JOB / name).glob("*.py") if path.stem != "__init__"]
    below = [f"{path.name}/" for path in (JOB / name).iterdir() if (path / "__init__.py").exists()]
    return ", ".join(sorted([*own, *below]))


if __name__ == "__main__":
    write_or_print(page())
