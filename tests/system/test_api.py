"""The Python interface: its examples run as they stand, and it agrees with the command line."""

from __future__ import annotations

import doctest
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from job import api
from job.errors import UsageError
from job.numerics.basis import DirectionPath
from job.records import COMPONENTS, EditParameters, LearnedDirections
from tests.helpers import abliterate, environment, only_job

ROOT = Path(__file__).parents[2]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
PROMPTS = ("good_prompts", "bad_prompts", "good_eval_prompts", "bad_eval_prompts")
# Seconds faster than a descent, which the examples of the page make.
TPE = ("ABLITERATE_SEARCH__METHOD", "tpe")
FILES = ("good_train.txt", "bad_train.txt", "good_test.txt", "bad_test.txt")


def prompts_of(organism: Path) -> dict[str, str]:
    return {name: str(organism / file) for name, file in zip(PROMPTS, FILES, strict=True)}


@pytest.fixture(scope="module")
def brief(organism: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the organism with 20 prompts per file, for jobs that are not about figures; read-only."""
    folder = tmp_path_factory.mktemp("brief")
    (folder / "model").symlink_to(organism / "model")
    for name in FILES:
        lines = (organism / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:20]))
    return folder


@pytest.fixture
def names(brief: Path, tmp_path: Path) -> dict[str, Any]:
    """Return what the examples use."""
    return {
        "api": api,
        "organism": brief,
        "prompts": prompts_of(brief),
        "workspace": tmp_path / "runs",
        "folder": tmp_path,
    }


def run_examples(name: str, text: str, names: dict[str, Any]) -> None:
    """Run the examples of a text in a namespace that they share, and fail with what differs."""
    test = doctest.DocTestParser().get_doctest(text, {}, name, name, 0)
    test.globs = names
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=said.append, clear_globs=False)
    assert result.failed == 0, "".join(said)
    assert result.attempted > 0


@pytest.mark.slow
def test_the_examples_of_the_docstrings(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*TPE)
    functions = [api.inspect, api.preflight, api.run, *vars(api.Job).values()]
    docs = [(one.__doc__ or "") for one in functions if callable(one) or isinstance(one, property | classmethod)]
    with_examples = [inspect.cleandoc(doc) for doc in docs if ">>>" in doc]
    assert len(with_examples) == 10
    for number, doc in enumerate(with_examples):
        run_examples(f"api, example {number}", doc, names)


@pytest.mark.slow
def test_the_examples_of_the_page(names: dict[str, Any]) -> None:
    run_examples("docs/api.md", (ROOT / "docs/api.md").read_text().replace("```\n", "\n"), names)


def test_public_functions_have_examples() -> None:
    public = [api.inspect, api.preflight, api.run]
    public += [one for name, one in vars(api.Job).items() if not name.startswith("_") and callable(one)]
    assert len(public) > 6
    assert [one.__name__ for one in public if ">>>" not in (one.__doc__ or "")] == []


def test_it_reads_jobs_of_the_command_line_and_agrees_with_it(finished: Path) -> None:
    job = api.Job.find(finished)
    assert job.path == only_job(finished)
    assert job.outcome is None
    shown = json.loads(abliterate("front", "--workspace", finished, "--json").check().out)
    assert json.loads(json.dumps(job.front())) == shown
    numbers = [trial["number"] for trial in job.trials]
    assert numbers == list(range(20))
    chosen = next(point for point in shown if point["chosen"])
    (row,) = [trial for trial in job.trials if trial["number"] == chosen["number"]]
    assert (row["refusals"], row["kl"]) == (chosen["refusals"], chosen["kl"])
    assert all(isinstance(value, int | float | str | None) for trial in job.trials for value in trial.values())


def loaded(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="session")
def exported(finished: Path, shared: Any) -> Path:
    """Return a workspace of a finished job with an export of the directions; read-only."""

    def build(workspace: Path) -> None:
        shutil.copytree(finished, workspace, symlinks=True)
        api.Job.find(workspace).export(format="directions", quiet=True)

    path: Path = shared("exported-directions", build)
    return path


def edit_file(workspace: Path) -> Path:
    (file,) = only_job(workspace).rglob("edit.safetensors")
    return file


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def test_a_loaded_model_under_an_edit_is_the_exported_one_and_the_base_again_afterwards(
    organism: Path, exported: Path
) -> None:
    model, tokenizer = loaded(organism / "model"), AutoTokenizer.from_pretrained(organism / "model")
    ids = tokenizer("Can you explain the hexed lantern?", return_tensors="pt").input_ids
    base, merged = logits(model, ids), logits(loaded(only_job(exported) / "export"), ids)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    edit = api.Edit.load(edit_file(exported))
    with edit.apply(model) as same:
        assert same is model
        edited = logits(model, ids)
    assert (edited - merged).abs().max() < 1e-3 < (base - merged).abs().max()
    assert torch.equal(logits(model, ids), base)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert edit.model_type == "llama"
    assert edit.made.trial.number == api.Job.find(exported).status()["chosen"]
    # The folder of an export does as well.
    assert api.Edit.load(edit_file(exported).parent).made == edit.made


def test_an_edit_with_learned_directions_applies_those(organism: Path, exported: Path) -> None:
    model, ids = loaded(organism / "model"), torch.tensor([[3, 4, 5, 6]])
    edit = api.Edit.load(edit_file(exported))
    layers = edit._directions.directions.shape[0]
    strengths = dict.fromkeys(COMPONENTS, ((0.9,),) * layers)
    by_layer = EditParameters(direction_index=None, kernels={}, layer_strengths=strengths)
    learned = by_layer.model_copy(update={"directions": LearnedDirections(sha256="0" * 64, position=0.0)})
    found = []
    for parameters, directions in (
        (by_layer, edit._directions),
        (learned, DirectionPath(edit._directions.directions[None])),
        (learned, DirectionPath(edit._directions.directions[None].roll(1, -1))),
    ):
        made = edit.made.model_copy(update={"edit": parameters})
        header = edit._header.model_copy(update={"made": made})
        with type(edit)(header, directions).apply(model):
            found.append(logits(model, ids))
    torch.testing.assert_close(found[0], found[1])
    assert (found[0] - logits(model, ids)).abs().max() > 1e-3 < (found[2] - found[1]).abs().max()


def test_an_edit_ends_with_its_block_although_the_block_fails(organism: Path, exported: Path) -> None:
    model = loaded(organism / "model")
    ids = torch.tensor([[3, 4, 5, 6]])
    base = logits(model, ids)
    with pytest.raises(ZeroDivisionError), api.Edit.load(edit_file(exported)).apply(model):
        raise ZeroDivisionError
    assert torch.equal(logits(model, ids), base)


def test_an_edit_is_refused_for_other_models(organism: Path, exported: Path, organism_of: Any, tmp_path: Path) -> None:
    edit = api.Edit.load(edit_file(exported))
    with (
        pytest.raises(UsageError, match="for models of type llama, not gemma2"),
        edit.apply(loaded(organism_of("gemma2") / "model")),
    ):
        raise AssertionError("applied")
    model = loaded(organism / "model")
    model.model.layers[1].mlp.down_proj.weight.data.mul_(2)
    model.save_pretrained(tmp_path / "other")
    with (
        pytest.raises(UsageError, match="is not the model that the edit was made for"),
        edit.apply(loaded(tmp_path / "other")),
    ):
        raise AssertionError("applied")
    config = model.config.__class__(**{**model.config.to_dict(), "num_hidden_layers": 2})
    smaller = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UsageError, match="the edit is for 8 layers of width"), edit.apply(smaller):
        raise AssertionError("applied")


def test_settings_are_the_command_lines(organism: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="trails"):
        api.run(organism / "model", workspace=tmp_path, trails=4)
    with pytest.raises(UsageError, match="space"):
        api.preflight(organism / "model", workspace=tmp_path, search__space="narrow")
    survey = api.preflight(organism / "model", on="1xRTX4090", workspace=tmp_path, quiet=True, **prompts_of(organism))
    assert survey.offers is not None
    assert list(tmp_path.iterdir()) == []


# In a process of its own: the client leaves sockets to the garbage collector. Through a file, not a port.
EXECUTE = """
import sys
import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=sys.argv[2] + "/kernel")
kernel.kernel_spec.argv[0] = sys.executable
where = {"metadata": {"path": sys.argv[2]}}
client = NotebookClient(notebook, km=kernel, timeout=300, startup_timeout=300, resources=where)
client.execute()
nbformat.write(notebook, sys.argv[3])
"""


@pytest.mark.slow
def test_the_notebook_runs(brief: Path, tmp_path: Path) -> None:
    original = ROOT / "examples/organism.ipynb"
    assert not any(cell.get("outputs") for cell in nbformat.read(original, as_version=4).cells)
    (tmp_path / "here").mkdir()
    shutil.copytree(brief, tmp_path / "here/organism")
    words = [original, tmp_path / "here", tmp_path / "executed.ipynb"]
    env = {**environment(), "PYTHONPATH": str(ROOT), "JUPYTER_PLATFORM_DIRS": "1", **dict([TPE])}
    done = subprocess.run([sys.executable, "-c", EXECUTE, *words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    notebook = nbformat.read(tmp_path / "executed.ipynb", as_version=4)
    said = {
        cell.id: "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    assert said["inspect"].startswith("llama 8 layers, 16 residual writers")
    assert "refusals 10/10 -> " in said["job"]
    edited, base = (line.split(":", 1)[1].strip() for line in said["chat"].splitlines())
    # The applied edit answers as the chat's does, and the base model does not.
    assert said["edit"].strip() == edited != base
