"""Prompts and chat templates as people have them: `preflight` and `run` come to the same verdict."""

from __future__ import annotations

import codecs
import csv
import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from job.data.prompts import PromptSets
from tests.helpers import Result, abliterate, job_arguments, only_job, stored_trials

LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 400\n"
CONFIG = "- config_name: {0}\n  data_files:\n  - split: train\n    path: {1}\n"
CARD = f"---\nconfigs:\n{CONFIG}---\n"
TWO = f"---\nconfigs:\n{CONFIG.format('en', 'data/train*')}{CONFIG.format('de', 'other/*')}---\n"


@dataclass(frozen=True)
class Case:
    """Prompts that are given, and what has to become of them.

    Attributes:
        build: Writes the prompts into a folder; returns the SPEC.
        told: What preflight's check or the error says.
        prompts: Prompts as they are read; None: all lines as they were given.
    """

    build: Callable[[Path, list[str]], str]
    told: Sequence[str] = ()
    prompts: Callable[[list[str]], list[str]] | None = None


def text(name: str, make: Callable[[list[str]], str | bytes], suffix: str = "") -> Callable[[Path, list[str]], str]:
    """Return what writes one file and names it."""

    def build(folder: Path, lines: list[str]) -> str:
        made = make(lines)
        (folder / name).write_bytes(made if isinstance(made, bytes) else made.encode())
        return f"{folder / name}{suffix}"

    return build


def table(lines: list[str], *names: str, delimiter: str = ",") -> str:
    """Return a CSV file whose first column holds the prompts, its others something else."""
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter)
    writer.writerow(names)
    writer.writerows([line, *(f"other {number}" for _ in names[1:])] for number, line in enumerate(lines))
    return stream.getvalue()


def json_lines(rows: Sequence[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def with_commas(lines: list[str]) -> list[str]:
    """Return prompts that need quotes: with commas, quotes and line breaks."""
    return [f'{line}, said "please"\nand waited' for line in lines]


def parquet(name: str, columns: Callable[[list[str]], dict[str, list[Any]]]) -> Callable[[Path, list[str]], str]:
    def build(folder: Path, lines: list[str]) -> str:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        pyarrow.parquet.write_table(pyarrow.table(columns(lines)), folder / name)
        return str(folder / name)

    return build


def clone(card: str = "", at: str = "data/train-00000-of-00001.parquet") -> Callable[[Path, list[str]], str]:
    """Return what writes a dataset repository as `git clone` leaves it, with a split that is not asked for."""

    def build(folder: Path, lines: list[str]) -> str:
        parquet(f"set/{at}", lambda own: {"text": own, "label": [0] * len(own)})(folder, lines)
        parquet("set/data/test-00000-of-00001.parquet", lambda own: {"text": own})(folder, ["Not this one."])
        (folder / "set/README.md").write_text(card)
        (folder / "set/.gitattributes").write_text("*.parquet filter=lfs\n")
        return str(folder / "set")

    return build


def unfetched_clone(folder: Path, lines: list[str]) -> str:
    spec = clone()(folder, lines)
    (folder / "set/data/train-00000-of-00001.parquet").write_text(LFS_POINTER)
    return spec


def clone_that_leads_out(folder: Path, lines: list[str]) -> str:
    (folder / "secret.txt").write_text("Not meant for prompts.\n")
    return clone(CARD.format("default", f"{folder}/secret.txt"))(folder, lines)


def saved(folder: Path, lines: list[str]) -> str:
    datasets.Dataset.from_dict({"goal": lines, "id": list(range(len(lines)))}).save_to_disk(folder / "saved")
    return str(folder / "saved")


def saved_by_another_version(folder: Path, lines: list[str]) -> str:
    spec = saved(folder, lines)
    info = folder / "saved/dataset_info.json"
    described = json.loads(info.read_text())
    described["features"]["goal"]["_type"] = "FeatureOfTomorrow"
    info.write_text(json.dumps(described))
    return spec


def folder_of(**files: str) -> Callable[[Path, list[str]], str]:
    def build(folder: Path, _: list[str]) -> str:
        (folder / "set").mkdir()
        for name, content in files.items():
            (folder / "set" / name.replace("__", ".")).write_text(content)
        return str(folder / "set")

    return build


READ = {
    "csv": Case(text("p.csv", lambda lines: table(lines, "goal", "target")), ["column goal"]),
    "csv with commas, quotes and line breaks": Case(
        text("p.csv", lambda lines: table(with_commas(lines), "goal", "target")), prompts=with_commas
    ),
    "csv with a given column": Case(
        text("p.csv", lambda lines: table(lines, "what", "prompt"), "#train/what"), ["column what"]
    ),
    "csv with semicolons and a BOM": Case(
        text("p.csv", lambda lines: codecs.BOM_UTF8 + table(lines, "Prompt", "id", delimiter=";").encode())
    ),
    "csv with one column of text": Case(
        text("p.csv", lambda lines: "id,behaviour\n" + "".join(f"{i},{line}\n" for i, line in enumerate(lines))),
        ["column behaviour"],
    ),
    "csv whose fields are longer than Python's limit": Case(
        text("p.csv", lambda lines: table(lines, "goal", "target") + f'"{lines[0]}","{"x" * 200_000}"\n')
    ),
    "tsv": Case(text("p.tsv", lambda lines: table(lines, "question", "answer", delimiter="\t")), ["column question"]),
    "json": Case(
        text("p.json", lambda lines: json.dumps([{"instruction": line, "output": "x"} for line in lines], indent=1)),
        ["column instruction"],
    ),
    "json of texts": Case(text("p.json", json.dumps)),
    "json in an object": Case(
        text("p.json", lambda lines: json.dumps({"version": "1", "data": [{"prompt": line} for line in lines]}))
    ),
    "json by columns": Case(text("p.json", lambda lines: json.dumps({"prompt": lines, "id": list(range(len(lines)))}))),
    "json that is json lines": Case(text("p.json", lambda lines: json_lines([{"query": line} for line in lines]))),
    "json lines": Case(text("p.jsonl", lambda lines: json_lines([{"text": line} for line in lines]))),
    "json lines in capitals": Case(text("P.JSONL", lambda lines: json_lines([{"Text": line} for line in lines]))),
    "prompt goes before text": Case(
        text("p.jsonl", lambda lines: json_lines([{"text": "x", "prompt": line} for line in lines])), ["column prompt"]
    ),
    "a column of messages is no text": Case(
        text("p.jsonl", lambda lines: json_lines([{"prompt": [{"role": "user"}], "text": line} for line in lines])),
        ["column text"],
    ),
    "UTF-16": Case(text("p.txt", lambda lines: "\r\n".join(lines).encode("utf-16"))),
    "UTF-16 without a mark": Case(text("p.txt", lambda lines: "\n".join(lines).encode("utf-16-le"))),
    "UTF-8 with a BOM": Case(text("p.txt", lambda lines: codecs.BOM_UTF8 + "\n".join(lines).encode())),
    "UTF-16 json lines": Case(
        text("p.jsonl", lambda lines: json_lines([{"text": line} for line in lines]).encode("utf-16"))
    ),
    "a file without a suffix": Case(text("prompts", "\n".join)),
    "parquet": Case(parquet("p.parquet", lambda lines: {"goal": lines, "target": lines}), ["column goal"]),
    "a null and an empty row": Case(
        parquet("p.parquet", lambda lines: {"text": [*lines[:3], None, " ", *lines[3:]]}),
        ["1 row without text skipped (row 3)", "1 row empty skipped (row 4)"],
    ),
    "NaN where a text is missing": Case(
        text("p.jsonl", lambda lines: json_lines([{"text": line} for line in lines] + [{"text": float("nan")}])),
        ["1 row without text skipped (line 41)"],
    ),
    "repeated rows": Case(
        text("p.txt", lambda lines: "\n".join([*lines, lines[0], f"  {lines[1]} "])),
        ["2 rows repeated skipped (line 41, line 42)"],
    ),
    "a row that is a document": Case(
        text("p.jsonl", lambda lines: json_lines([{"text": "word " * 30_000}, *({"text": line} for line in lines)])),
        ["1 row of more than 100000 characters skipped (line 1)"],
    ),
    "a lone surrogate": Case(
        text("p.jsonl", lambda lines: json_lines([{"text": line + "\ud83d"} for line in lines])),
        ["40 rows with a lone surrogate, replaced by U+FFFD (line 1, line 2, line 3, line 4, line 5, …)"],
        prompts=lambda lines: [line + "\ufffd" for line in lines],
    ),
    "a character in two halves": Case(
        text("p.jsonl", lambda lines: "".join(f'{{"text": "{line} \\ud83d\\ude00"}}\n' for line in lines)),
        prompts=lambda lines: [line + " \U0001f600" for line in lines],
    ),
    "a cloned dataset": Case(clone(), ["column text"]),
    "a cloned dataset whose card names its files": Case(
        clone(CARD.format("default", "parts/*.parquet"), at="parts/0.parquet")
    ),
    "a configuration of a cloned dataset": Case(
        lambda folder, lines: clone(TWO)(folder, lines) + ":en", ["configuration en"]
    ),
    "a saved dataset": Case(saved, ["column goal"]),
}

REFUSED = {
    "several columns of text": Case(
        text("p.csv", lambda lines: table(lines, "ask", "say")),
        ["several columns of text", "columns ask, say", "(ask, say)"],
    ),
    "no column of text": Case(
        text("p.jsonl", lambda lines: json_lines([{"id": 1, "n": 2} for _ in lines])),
        ["no column of text", "columns id, n"],
    ),
    "a given column that is not there": Case(
        text("p.csv", lambda lines: table(lines, "goal", "target"), "#train/ask"),
        ["column ask", "does not exist among the columns goal, target"],
    ),
    "csv without names": Case(text("p.csv", "\n".join), ["names no columns", "prompt"]),
    "csv with commas that are not quoted": Case(
        text("p.csv", lambda lines: "goal\n" + "".join(f"{line}, please\n" for line in lines)),
        ["p.csv, line 2 has 2 fields", "quotes"],
    ),
    "csv with a quote that does not end": Case(
        text("p.csv", lambda lines: 'goal\n"' + "\n".join(lines)), ["p.csv, line 41: unexpected end of data"],
    ),
    "json that is cut off": Case(
        text("p.json", lambda lines: json.dumps(lines)[:-1]), ["p.json: Expecting ',' delimiter"],
    ),
    "json that is no list": Case(text("p.json", lambda _: '{"a": 1}'), ["does not hold a list of prompts"]),
    "json nested without end": Case(text("p.json", lambda _: "[" * 200_000), ["p.json: maximum recursion depth"]),
    "an empty file": Case(text("p.jsonl", lambda _: ""), ["it is empty"]),
    "only empty rows": Case(text("p.txt", lambda _: "\n\n"), ["it is empty; none of its 2 rows is a prompt"]),
    "another encoding": Case(
        text("p.txt", lambda lines: "\n".join([*lines[:4], "caf\xe9"]).encode("latin-1")),
        ["not UTF-8 text (line 5)", "iconv"],
    ),
    "a spreadsheet": Case(text("p.xlsx", lambda _: b"PK\3\4"), ["has an unsupported suffix: .xlsx"]),
    "markdown": Case(text("p.md", "\n".join), ["has an unsupported suffix: .md", "prompt per line .txt"]),
    "a compressed file": Case(text("p.jsonl.gz", lambda _: b"\x1f\x8b"), ["has an unsupported suffix: .gz"]),
    "a Git LFS pointer": Case(text("p.jsonl", lambda _: LFS_POINTER), ["Git LFS pointer", "git lfs pull"]),
    "a damaged parquet file": Case(text("p.parquet", lambda _: b"PAR1" + b"\0" * 40), ["not a parquet file"]),
    "a clone without its files": Case(unfetched_clone, ["Git LFS pointer", "git lfs pull"]),
    "a clone without that split": Case(
        lambda folder, lines: clone()(folder, lines) + "#validation", ["no split validation", "train, test"],
    ),
    "a card that leads out of its folder": Case(clone_that_leads_out, ["secret.txt, which is outside that folder"]),
    "a card that asks for a configuration": Case(
        clone(TWO), ["needs a configuration (en, de)", "set:CONFIG#SPLIT"],
    ),
    "files with different columns": Case(
        folder_of(a__jsonl=json_lines([{"text": "Stir."}]), b__jsonl=json_lines([{"prompt": "Boil."}])),
        ["column prompt of", "(a.jsonl) does not exist among the columns text"],
    ),
    "a folder of other files": Case(
        folder_of(README__rst="x", notes__doc="y"), ["holds no prompts (it holds README.rst"],
    ),
    "a saved dataset of another version": Case(saved_by_another_version, ["cannot be read", "FeatureOfTomorrow"]),
}  # fmt: skip


SETS = {
    "bad_prompts": "bad_train.txt",
    "good_prompts": "good_train.txt",
    "bad_eval_prompts": "bad_test.txt",
    "good_eval_prompts": "good_test.txt",
}
# A job has four sets of prompts: so many cases share one.
GROUPS = [tuple(READ)[start : start + len(SETS)] for start in range(0, len(READ), len(SETS))]


def both(
    organism: Path, specs: dict[str, str], folder: Path, model: Path | None = None, more: Sequence[str] = ()
) -> tuple[Result, dict[str, str], Result]:
    """Return what `preflight` comes to, its checks in words by name, and what `run` comes to."""
    words = [str(model or organism / "model"), "--workspace", str(folder / "runs"), *more]
    words += ["--trials", "1", "--set", "startup_trials=1"]
    for name, file in SETS.items():
        words += [f"--{name.replace('_', '-')}", specs.get(name, str(organism / file))]
    checked = abliterate("preflight", *words, "--json")
    checks = {one["name"]: f"{one['measured']}; {one['remedy']}" for one in json.loads(checked.out)["checks"]}
    return checked, checks, abliterate("run", *words)


@pytest.mark.parametrize("names", GROUPS, ids=", ".join)
def test_prompts_are_read_and_what_was_left_out_is_named(
    names: tuple[str, ...], organism: Path, tmp_path: Path
) -> None:
    lines, specs = {}, {}
    for name, (setting, file) in zip(names, SETS.items(), strict=False):
        (tmp_path / setting).mkdir()
        lines[setting] = (organism / file).read_text().splitlines()
        specs[setting] = READ[name].build(tmp_path / setting, lines[setting])
    checked, said, ran = both(organism, specs, tmp_path)
    assert (checked.code, ran.code) == (0, 0), checked.out + ran.err
    read = PromptSets.model_validate_json((only_job(tmp_path / "runs") / "prompts.json").read_bytes())
    for name, setting in zip(names, specs, strict=True):
        case, given = READ[name], lines[setting]
        for part in case.told:
            assert part in said[f"data.{setting}"], name
        expected = case.prompts(given) if case.prompts else given
        assert sorted(prompt.user for prompt in read.of_setting(setting)) == sorted(expected), name


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(name: str, organism: Path, tmp_path: Path) -> None:
    case = REFUSED[name]
    spec = case.build(tmp_path, (organism / "bad_train.txt").read_text().splitlines())
    checked, said, ran = both(organism, {"bad_prompts": spec}, tmp_path)
    assert (checked.code, ran.code) == (3, 3), checked.out + ran.err
    assert "Traceback" not in checked.err + ran.err
    for part in case.told:
        assert part in said["data"]
        assert part in ran.out + ran.err


# --- models' tokenizers and templates -----------------------------------------------------------------

USUAL = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
OPENS = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
PARTS = """{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}
{%- endif %}{% endfor %}<|end|>{% endfor %}"""
WITHOUT_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + USUAL
DEAF_TO_SYSTEM = "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
# Words of the tokenizer, one of two by the day, so that the date is in the tokens and not only in the text.
DATED = "{{ ['red', 'green'][strftime_now('%j') | int % 2] }} {{ strftime_now('%Y %H:%M:%S') }}" + USUAL
SYSTEM = ("--set", "bad_prompts.system_prompt=You are a helpful assistant.")


@dataclass(frozen=True)
class ModelCase:
    """A model that is given, and what has to become of it.

    Attributes:
        spoil: Changes the files of a valid model.
        told: What the checks or the error say.
        options: Further words of the command.
        resolved: What job.json has to say beside the usual.
    """

    spoil: Callable[[Path], None]
    told: Sequence[str] = ()
    options: Sequence[str] = ()
    resolved: dict[str, Any] | None = None


def template(text: str) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        (model / "chat_template.jinja").write_text(text + OPENS)

    return spoil


def template_of_a_processor(text: str) -> Callable[[Path], None]:
    """Return what leaves a template where multimodal models' processors keep it."""

    def spoil(model: Path) -> None:
        (model / "chat_template.jinja").unlink()
        (model / "chat_template.json").write_text(text)

    return spoil


def changed(model: Path, name: str, /, **values: Any) -> None:
    """Change values of a JSON file."""
    file = model / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def ends_with_another_token(model: Path) -> None:
    """Have the model's files name an end that its template never writes."""
    for name in ("config.json", "generation_config.json"):
        changed(model, name, eos_token_id=0)
    changed(model, "tokenizer_config.json", eos_token="<pad>")


def token_without_embedding(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = "<|turn|>" + USUAL + OPENS
    tokenizer.save_pretrained(model)


def of_learned_positions(model: Path) -> None:
    """Have a model in the place that looks positions up in a table which is too short."""
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    config = GPT2Config(vocab_size=vocabulary, n_positions=64, n_embd=32, n_layer=2, n_head=2, eos_token_id=2)
    (model / "model.safetensors").unlink()
    GPT2LMHeadModel(config).save_pretrained(model)


def unknown_tokenizer(model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    changed(model, "tokenizer.json", model={**tokenizer["model"], "type": "ModelOfTomorrow"})


TAKEN = {
    "list content": ModelCase(template(PARTS), ["messages as lists of parts"]),
    "no system role": ModelCase(template(WITHOUT_SYSTEM), ["system prompts in the user's turn"], SYSTEM),
    "a system prompt that is left out": ModelCase(
        template(DEAF_TO_SYSTEM), ["system prompts in the user's turn"], SYSTEM
    ),
    "a template in chat_template.json": ModelCase(
        template_of_a_processor(json.dumps({"chat_template": USUAL + OPENS})), ["and a chat template"]
    ),
    "another end of turn": ModelCase(ends_with_another_token, resolved={"turn_end": 2}),
    "a prompt that spells a special token": ModelCase(
        lambda _: None,
        ["40 prompts (prompt 0 of bad, prompt 1 of bad, prompt 2 of bad, …) with the special token '<|user|>'"],
        ("--set", "bad_prompts.suffix=<|user|>"),
    ),
    "bos twice": ModelCase(
        lambda model: (
            template("{{ bos_token }}{{ bos_token }}" + USUAL)(model),
            changed(model, "tokenizer_config.json", bos_token="<|system|>"),
        )[-1],
        ["texts begin with '<|system|>' twice"],
    ),
}

NOT_TAKEN = {
    "a template that leaves prompts out": ModelCase(
        template("{% for m in messages %}<|{{ m.role }}|>{% endfor %}"), ["leaves the prompt out"]
    ),
    "a damaged chat_template.json": ModelCase(
        template_of_a_processor('{"chat_template": '), ["chat_template.json is damaged"]
    ),
    "a token without an embedding": ModelCase(
        token_without_embedding, ["has token 164 ('<|turn|>'), but the model's embedding has 164 rows"]
    ),
    "fewer positions than a prompt needs": ModelCase(
        of_learned_positions, ["the model 64 positions", "max_characters"]
    ),
    "a tokenizer of tomorrow": ModelCase(unknown_tokenizer, ["has no usable tokenizer (tokenizer.json"]),
}


def spoilt(case: ModelCase, organism: Path, folder: Path) -> Path:
    shutil.copytree(organism / "model", folder / "model")
    case.spoil(folder / "model")
    return folder / "model"


@pytest.mark.parametrize("name", TAKEN)
def test_a_template_is_written_as_it_has_to_be(name: str, organism: Path, tmp_path: Path) -> None:
    case = TAKEN[name]
    checked, said, ran = both(organism, {}, tmp_path, spoilt(case, organism, tmp_path), case.options)
    assert (checked.code, ran.code) == (0, 0), checked.out + ran.err
    for part in case.told:
        assert part in said["model.template"] + said["model.tokenizer"]
    resolution = json.loads((only_job(tmp_path / "runs") / "job.json").read_text())["resolution"]
    own = {name: value for name, value in resolution.items() if name in ("turn_end", "date", "options")}
    assert own == (case.resolved or {})


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_a_model_that_cannot_be_asked_is_refused(name: str, organism: Path, tmp_path: Path) -> None:
    case = NOT_TAKEN[name]
    checked, said, ran = both(organism, {}, tmp_path, spoilt(case, organism, tmp_path), case.options)
    assert (checked.code, ran.code) == (3, 3), checked.out + ran.err
    assert "Traceback" not in checked.err + ran.err
    for part in case.told:
        assert part in "".join(text for check, text in said.items() if check.startswith("model"))
        assert part in ran.out + ran.err


# The dates of these zones are never the same.
EARLY, LATE = {"TZ": "Etc/GMT+12"}, {"TZ": "Etc/GMT-14"}


def test_a_dated_template_is_written_on_the_day_of_the_first_start(organism: Path, tmp_path: Path) -> None:
    model = spoilt(ModelCase(template(DATED)), organism, tmp_path)
    words = [str(model), *job_arguments(organism)[1:], "--set", "startup_trials=2", "--set", "trials_per_batch=2"]

    def run(name: str, trials: int, zone: dict[str, str], *more: str) -> Path:
        abliterate("run", *words, "--workspace", tmp_path / name, "--trials", trials, *more, **zone).check()
        return only_job(tmp_path / name)

    whole = run("whole", 4, EARLY)
    begun = run("broken", 2, EARLY)
    run("broken", 4, LATE)
    again = run("again", 4, LATE, "--reproduce", str(whole / "export" / "reproduce.json"))
    days = [json.loads((job / "job.json").read_text())["resolution"]["date"] for job in (whole, begun, again)]
    assert len(set(days)) == 1
    assert stored_trials(whole.parent) == stored_trials(begun.parent)
    manifests = [(job / "export" / "manifest.json").read_bytes() for job in (whole, begun, again)]
    assert manifests[0] == manifests[1]
    weights = [(job / "export" / "model.safetensors").read_bytes() for job in (whole, again)]
    assert weights[0] == weights[1]
    assert len(list((begun / "residuals").iterdir())) == len(list((whole / "residuals").iterdir()))
