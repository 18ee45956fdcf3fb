"""Untrusted model folders: links, files that no model needs, and the text of cards and names."""

from __future__ import annotations

import html.parser
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from transformers import AutoModelForCausalLM

from job.architectures.structure import discover
from job.data.prompts import PromptSets
from job.errors import ImpossibleJobError, one_line
from job.export.merged import Edit, seal_made, write_weights
from job.export.model_card import model_card
from job.export.reproduction import PromptsRecord
from job.model.carried_files import carried_files
from job.model.files import fetch_model, list_model, parse_model, refuse_links_out
from job.model.safetensors_files import Checkpoint
from job.records import GeometryRecord, JobRecord, KeptAnswer, Manifest
from job.report.markdown import run_report
from job.report.plot import Chart, Series, linear_axis
from job.report.run_view import RunView
from job.storage.atomic import make_folder, read_record, write_record
from job.storage.exports import MANIFEST
from job.storage.identity import model_identity
from job.storage.run_folder import RunFolder
from job.text.behaviour import REFUSAL_WORDS
from job.text.markup import markdown
from job.text.templates import template
from tests.helpers import abliterate, made_from
from tests.integration.edits.test_hooks import EDITS, basis_for
from tests.system.model.test_own_code import MAP

# Files

# Contents of a folder after a training, and a forgotten file.
NEEDLESS = (
    ".env",
    ".git/config",
    ".gitattributes",
    ".netrc",
    ".cache/token",
    "README.md",
    "checkpoint.pkl",
    "data.pickle",
    "events.out.tfevents.1",
    "global_step5/states.pt",
    "id_rsa",
    "modeling_hidden.py",
    "notes.txt",
    "optimizer.pt",
    "optimizer.bin",
    "pytorch_model.bin",
    "rng_state.pth",
    "scheduler.pt",
    "secrets.json",
    "train.log",
    "trainer_state.json",
    "training_args.bin",
    "wandb.yaml",
    "LICENSE.pkl",
    "NOTICE\n.txt",
    "x.safetensors.env",
)
NEEDED = ("LICENSE", "USE_POLICY.md", "merges.txt", "added_tokens.json", "chat_template.json")


@pytest.fixture
def model(random_model_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(random_model_folder, folder)
    return folder


def put(folder: Path, name: str, text: str = "{}") -> None:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def exported(model: Path, out: Path) -> set[str]:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    edit = Edit(EDITS[0], basis_for(loaded), "none")
    write_weights(model, out, discover(loaded), edit, lambda _: None)
    seal_made(out, made_from(edit=edit.parameters), model)
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


def test_an_export_carries_what_a_model_needs_and_nothing_else(model: Path, tmp_path: Path) -> None:
    before = {path.name for path in model.iterdir()}
    for name in (*NEEDLESS, *NEEDED):
        put(model, name)
    found = exported(model, tmp_path / "out")
    made = {"README.md", "reproduce.json", "result.png", "SHA256SUMS", "manifest.json", ".done"}
    assert found == before | {*NEEDED} | made
    assert read_record(tmp_path / "out" / MANIFEST, Manifest).files.keys() == found - {"manifest.json", ".done"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_models_own_code_is_carried_with_what_it_imports_and_reads(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "auto_map": MAP}))
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    mapped = {"AutoTokenizer": ["tokenization_kitchen.KitchenTokenizer", None]}
    (model / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "auto_map": mapped}))
    put(model, "modeling_kitchen.py", "from .parts import Part\nfrom . import tools, more\nimport os\n")
    put(model, "parts.py", "from .modeling_kitchen import x\n")
    put(model, "tools.py")
    put(model, "more.py")
    put(model, "tokenization_kitchen.py", 'FILES = {"vocab_file": "kitchen.tiktoken", "x": "weights.pkl"}\n')
    put(model, "kitchen.tiktoken")
    carried = {"modeling_kitchen.py", "parts.py", "tools.py", "more.py", "tokenization_kitchen.py", "kitchen.tiktoken"}
    for name in ("train.py", "other.tiktoken", "weights.pkl", "secrets.json"):
        put(model, name)
    names = {path.name for path in carried_files(model, code=True)}
    assert carried <= names
    assert not names & {"train.py", "other.tiktoken", "weights.pkl", "secrets.json"}


@pytest.mark.parametrize("code", [None, 5, [], {"AutoConfig": {"x": 1}}, {"AutoConfig": "../evil.x"}], ids=repr)
def test_a_map_of_code_that_is_none_carries_nothing(model: Path, code: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "auto_map": code}))
    put(model.parent, "evil.py")
    put(model, "evil.py")
    assert "evil.py" not in {path.name for path in carried_files(model, code=True)}


# Links


@pytest.mark.parametrize("name", ["config.json", "LICENSE", "model.safetensors.index.json", "notes.txt"])
@pytest.mark.parametrize(
    "use",
    [
        lambda folder: list_model(parse_model(str(folder)), None, print),
        lambda folder: fetch_model(parse_model(str(folder)), None, print),  # type: ignore[arg-type]  # of a folder unused
        lambda folder: _identity(folder),
    ],
    ids=["list", "fetch", "identity"],
)
def test_links_out_of_a_model_folder_are_refused(model: Path, name: str, use: Callable[[Path], object]) -> None:
    secret = model.parent / "secret"
    secret.write_text("{}")
    use(model)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    with pytest.raises(ImpossibleJobError, match=f"{name} is a link to a place outside the model folder"):
        use(model)


def _identity(folder: Path) -> object:
    from job.config.load import load_settings

    return model_identity(load_settings({"model": str(folder), "workspace": str(folder.parent / "w")}).settings)


def test_a_link_out_is_said_in_one_line(model: Path) -> None:
    (model / "LICENSE").symlink_to("/etc/hostname")
    abliterate("inspect", model).fails(3, "LICENSE is a link to a place outside", "replace the link by the file")


def test_links_within_a_folder_and_the_hubs_cache_are_followed(model: Path, tmp_path: Path) -> None:
    (model / "LICENSE").write_text("terms")
    (model / "NOTICE").symlink_to("LICENSE")
    refuse_links_out(model)
    linked = tmp_path / "linked"
    linked.symlink_to(model)
    refuse_links_out(linked)
    # The layout of `snapshot_download`.
    cache = tmp_path / "models--kitchen--cook"
    snapshot, blobs = cache / "snapshots" / ("c" * 40), cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    refuse_links_out(snapshot)
    assert {path.name for path in carried_files(snapshot, code=True)} == {
        path.name for path in carried_files(model, code=True)
    }
    # Blobs of another repository are foreign.
    other = tmp_path / "models--kitchen--other" / "blobs"
    other.mkdir(parents=True)
    (other / "0").write_text("{}")
    (snapshot / "vocab.json").symlink_to(other / "0")
    with pytest.raises(ImpossibleJobError, match="place outside"):
        refuse_links_out(snapshot)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "", 5, None])
def test_an_index_names_files_of_its_folder_only(model: Path, name: Any) -> None:
    shutil.copy(next(model.glob("*.safetensors")), model.parent / "outside.safetensors")
    index = model / "model.safetensors.index.json"
    described = json.loads(index.read_text())
    described["weight_map"][next(iter(described["weight_map"]))] = name
    index.write_text(json.dumps(described))
    with pytest.raises(ImpossibleJobError):
        Checkpoint(model)


# Cards, reports and pages

HOSTILE = (
    "x\n---\n# Injected",
    "x\ntags:\n- injected",
    "x: injected\ny: [",
    "]( javascript:alert(1) ) [x](https://evil.example",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![x](https://evil.example/x.png)",
    "`code` **bold** _it_ ~~gone~~",
    "a | b |\n| c | d |",
    "\n\n# Heading\n\n- item\n\n> quote\n\n```\ncode\n```\n",
    "&lt;b&gt; &#60;b&#62; &amp;",
    "\\`\\[x\\](y)\\<b>",
    "\u202e\u2028\x1b[2J\x07\x00",
    "!!python/object/apply:os.system [x]",
    "*anchor &anchor",
    "$\\href{javascript:alert(1)}{x}$",
    "<!-- x",
    "'\"`",
)
STORY = {"words": REFUSAL_WORDS}
MACROS: Any = template("job.report", "macros.html").make_module({"story": STORY})
MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


class Shape(html.parser.HTMLParser):
    """Elements with their attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        self.text = ""
        self.odd: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.odd.append(data)

    def handle_decl(self, decl: str) -> None:
        self.odd.append(decl)

    def handle_pi(self, data: str) -> None:
        self.odd.append(data)


def shape(markdown_text: str) -> Shape:
    return Shape(MARKDOWN.render(markdown_text))


PIECES = [*"\\`*_[]()<>#+-!|~&$\n\r\t '\"{}:=", "a", "b1", "<b>", "://", "&#60;"]
# Of the usage examples, whatever the model.
OUR_LINKS = ("https://docs.vllm.ai", "https://github.com/ggml-org/llama.cpp")


def chart_of(text: str) -> Chart:
    """Return a chart with a text wherever it shows one."""
    axis = linear_axis(text, [0.0, 1.0])
    return Chart("chart", axis, axis, (Series(text, "dots", 0, ((0.0, 1.0),), (text,), text),), ((0.5, text),))


texts = st.text(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=30).map("".join)


@settings(max_examples=300, deadline=None)
@given(texts)
def test_text_in_markdown_is_shown_as_it_is(text: str) -> None:
    shown = markdown(f"x {text}")
    assert "\n" not in shown
    for around in ("- it is {}: yes", "| a | {} |\n|---|---|\n| b | {} |", "# {}"):
        found = shape(around.replace("{}", shown))
        assert found.elements == shape(around.replace("{}", "x")).elements
        assert one_line(found.text).count(one_line(f"x {text}")) >= 1
        assert found.odd == []


SHOWN: tuple[Callable[[str], str], ...] = (
    lambda cell: MACROS.table(cell, [(cell, "b"), (cell, cell)]),
    lambda cell: MACROS.figure(cell, [chart_of(cell)], cell),
    lambda cell: MACROS.check_table(cell, [{"name": cell, "status": cell, "measured": cell}]),
    lambda cell: MACROS.answer_pairs(*2 * [[KeptAnswer(prompt=cell, answer=cell, refused=True)]]),
)
PLAIN = [Shape(make("x")) for make in SHOWN]


@settings(max_examples=200, deadline=None)
@given(texts)
def test_text_in_html_is_shown_as_it_is(text: str) -> None:
    for make, plain in zip(SHOWN, PLAIN, strict=True):
        found = Shape(make(f"x{text}"))
        assert [tag for tag, _ in found.elements] == [tag for tag, _ in plain.elements]
        assert found.odd == []
        for (_, attributes), (_, usual) in zip(found.elements, plain.elements, strict=True):
            assert [name for name, _ in attributes] == [name for name, _ in usual]


def card_with(folder: Path, text: str, where: str) -> ModelCard:
    """Return the card of an export whose base model, prompts and names contain a text where possible."""
    folder.mkdir()
    front = {"license": "mit", "language": ["en"]}
    taken = {**made_from().prompts["bad_prompts"].taken, "split": text}
    hostile = PromptsRecord(source={"dataset": text or "x", "commit": text}, taken=taken, count=1, sha256="0" * 64)
    changes: dict[str, dict[str, Any]] = {
        "behaviour": {"behaviour": text},
        "model": {"model": {"repository": text, "commit": text}},
        "base": {"base_model": text or "x"},
        "prompts": {"prompts": {**made_from().prompts, "bad_prompts": hostile}},
        "prefix": {"resolution": made_from().resolution.model_copy(update={"response_prefix": text})},
        "versions": {"versions": {"abliteration-job": text}},
    }
    if where in ("license", "license_name", "license_link"):
        front[where] = text
    elif where == "language":
        front[where] = [text]
    elif where == "nested":
        front["license"] = {text: [text]}  # type: ignore[assignment]  # as no card should have it
    elif where == "file":
        (folder / ("LICENSE" + text.replace("/", "").replace("\0", ""))[:200]).write_text("terms")
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(front)}---\n# Base\n")
    return ModelCard(model_card(made_from(**changes.get(where, {})), folder))


KEYS = {
    *("license", "license_name", "license_link", "language", "library_name", "pipeline_tag", "base_model"),
    *("base_model_relation", "datasets", "tags", "model_name", "model-index"),
}
PLACES = ("license", "license_name", "license_link", "language", "nested", "file", "behaviour", "model", "base")


@pytest.mark.parametrize("where", [*PLACES, "prompts", "prefix", "versions"])
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_that_others_say_becomes_part_of_a_card(tmp_path: Path, where: str, text: str) -> None:
    card, plain = card_with(tmp_path / "hostile", text, where), card_with(tmp_path / "plain", "x", where)
    data = card.data.to_dict()
    assert data.keys() <= KEYS
    assert data["tags"] == ["abliterated", "not-for-all-audiences"]
    front = card.content.partition("---\n")[2].partition("\n---\n")[0]
    assert yaml.safe_load(front).keys() <= KEYS
    found, usual = shape(card.text), shape(plain.text)
    assert found.odd == []

    def structure(of: Shape) -> list[str]:
        # Whether a link appears, e.g. to the terms, depends on its target.
        return [tag for tag, _ in of.elements if tag != "a"]

    assert structure(found) == structure(usual)
    for tag, attributes in found.elements:
        if tag == "a":
            (target,) = [value or "" for name, value in attributes if name == "href"]
            known = target.startswith("https://huggingface.co/") or target in OUR_LINKS
            assert known or target == "x" or "/" not in target
            assert "javascript" not in target
            assert len(attributes) == 1


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_that_others_say_becomes_part_of_a_report(text: str, tmp_path: Path) -> None:
    def report(said: str) -> Shape:
        made = made_from()
        one = ({"user": said},)
        sets = dict.fromkeys(("good", "bad", "good_search", "bad_search", "good_report", "bad_report"), one)
        record = JobRecord(
            job_id="0" * 12,
            identity={"seed": 0, "directions": {"method": "probe"}},
            settings={"model": said, "scoring": {"search_tokens": 1, "answer_tokens": 1}, "ablation": {}},
            startup_trials=1,
            versions={said: said},
            resolution=made.resolution.model_copy(update={"response_prefix": said, "norms": (said,)}),
            searches=False,
        )
        folder = RunFolder(tmp_path)
        records = {
            folder.job_file: record,
            folder.reproduces_file: made,
            folder.prompts_file: PromptSets.model_validate({**sets, "sources": {said: said}, "commits": {said: said}}),
            folder.figures_file("base"): made.base,
            folder.figures_file(folder.export_folder(made.trial.number, "merged").name): made.edited,
            folder.geometry_file: GeometryRecord(key="x", layers=[]),
        }
        for file, kept in records.items():
            make_folder(file.parent)
            write_record(file, kept)
        check = {"name": said, "status": said, "measured": said}
        folder.preflight_file.write_text(json.dumps({"checks": [check], "allowed": [said]}))
        events = ({"event": "loaded", "hardware": said}, {"event": "trial", "number": 0})
        folder.events_file.write_text("".join(json.dumps(event) + "\n" for event in events))
        view = RunView(folder)
        assert view.result is not None
        return shape(run_report(view, view.result))

    found, usual = report(text), report("x")
    assert found.elements == usual.elements
    assert found.odd == []


@pytest.mark.parametrize("text", ["# a", "- a", "+ a", "1. a", "12) a", "===", "---", "> a", "    a", "#"])
def test_a_text_that_begins_a_line_is_no_block(text: str) -> None:
    assert shape(markdown(text)).elements == [("p", ())]
    assert shape(f"a\n{markdown(text)}").elements == [("p", ())]
    assert [tag for tag, _ in shape(f"- {markdown(text)}").elements] == ["ul", "li"]
