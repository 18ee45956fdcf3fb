"""Prompts as people have them."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from tests.cases import LFS_POINTER, LINES, Case

CONFIG = "- config_name: {0}\n  data_files:\n  - split: train\n    path: {1}\n"
CARD = f"---\nconfigs:\n{CONFIG}---\n"
TWO = f"---\nconfigs:\n{CONFIG.format('en', 'data/train*')}{CONFIG.format('de', 'other/*')}---\n"


Build = Callable[[Path, list[str]], str]


def text(name: str, make: Callable[[list[str]], str | bytes], suffix: str = "") -> Build:
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


def parquet(name: str, columns: Callable[[list[str]], dict[str, list[Any]]]) -> Build:
    def build(folder: Path, lines: list[str]) -> str:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        pyarrow.parquet.write_table(pyarrow.table(columns(lines)), folder / name)
        return str(folder / name)

    return build


def clone(card: str = "", at: str = "data/train-00000-of-00001.parquet") -> Build:
    """Return what writes a dataset repository as `git clone` leaves it, with a split that is not asked for."""

    def build(folder: Path, lines: list[str]) -> str:
        parquet(f"set/{at}", lambda own: {"text": own, "label": [0] * len(own)})(folder, lines)
        parquet("set/data/test-00000-of-00001.parquet", lambda own: {"text": own})(folder, ["Not this one."])
        (folder / "set/README.md").write_text(card)
        (folder / "set/.gitattributes").write_text("*.parquet filter=lfs\n")
        return str(folder / "set")

    return build


def parquet_of_twins(folder: Path, lines: list[str]) -> str:
    twins = pyarrow.table([lines, ["b"] * len(lines)], names=["text", "text"])
    pyarrow.parquet.write_table(twins, folder / "p.parquet")
    return str(folder / "p.parquet")


def chat(said: Any) -> list[dict[str, Any]]:
    """Return a conversation with a user's first words, in the form of OpenAI."""
    turns = ("system", "Be brief."), ("user", said), ("assistant", "Yes."), ("user", "And then?")
    return [{"role": who, "content": what} for who, what in turns]


def pipe(folder: Path, _: list[str]) -> str:
    os.mkfifo(folder / "p.txt")
    return str(folder / "p.txt")


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


def folder_of(**files: str) -> Build:
    def build(folder: Path, _: list[str]) -> str:
        (folder / "set").mkdir()
        for name, content in files.items():
            (folder / "set" / name.replace("__", ".")).write_text(content)
        return str(folder / "set")

    return build


def read(
    build: Build,
    told: Sequence[str] = (),
    as_read: Callable[[list[str]], list[str]] | None = None,
    row: int | None = None,
) -> Case:
    return Case(told, check="data", prompts=build, read=as_read, row=row)


def refused(build: Build, told: Sequence[str], row: int | None = None) -> Case:
    return Case(told, 3, "data", prompts=build, row=row)


READ = {
    "csv": read(text("p.csv", lambda lines: table(lines, "goal", "target")), ["column goal"]),
    "csv with commas, quotes and line breaks": read(
        text("p.csv", lambda lines: table(with_commas(lines), "goal", "target")), as_read=with_commas, row=2
    ),
    "csv with a given column": read(
        text("p.csv", lambda lines: table(lines, "what", "prompt"), "#train/what"), ["column what"]
    ),
    "csv with semicolons and a BOM": read(
        text("p.csv", lambda lines: codecs.BOM_UTF8 + table(lines, "Prompt", "id", delimiter=";").encode())
    ),
    "csv with one column of text": read(
        text("p.csv", lambda lines: "id,behaviour\n" + "".join(f"{i},{line}\n" for i, line in enumerate(lines))),
        ["column behaviour"],
    ),
    "csv whose fields are longer than Python's limit": read(
        text("p.csv", lambda lines: table(lines, "goal", "target") + f'"{lines[0]}","{"x" * 200_000}"\n')
    ),
    "tsv": read(text("p.tsv", lambda lines: table(lines, "question", "answer", delimiter="\t")), ["column question"]),
    "json": read(
        text("p.json", lambda lines: json.dumps([{"instruction": line, "output": "x"} for line in lines], indent=1)),
        ["column instruction"],
        row=2,
    ),
    "json of texts": read(text("p.json", json.dumps)),
    "json in an object": read(
        text("p.json", lambda lines: json.dumps({"version": "1", "data": [{"prompt": line} for line in lines]}))
    ),
    "json by columns": read(text("p.json", lambda lines: json.dumps({"prompt": lines, "id": list(range(len(lines)))}))),
    "json that is json lines": read(text("p.json", lambda lines: json_lines([{"query": line} for line in lines]))),
    "json lines": read(text("p.jsonl", lambda lines: json_lines([{"text": line} for line in lines]))),
    "json lines in capitals": read(text("P.JSONL", lambda lines: json_lines([{"Text": line} for line in lines]))),
    "prompt goes before text": read(
        text("p.jsonl", lambda lines: json_lines([{"text": "x", "prompt": line} for line in lines])), ["column prompt"]
    ),
    "a column of messages is no text": read(
        text("p.jsonl", lambda lines: json_lines([{"prompt": [{"role": "user"}], "text": line} for line in lines])),
        ["column text"],
    ),
    "conversations": read(
        text("p.jsonl", lambda lines: json_lines([{"id": "a", "messages": chat(line)} for line in lines])),
        ["column messages (what users say first)"],
    ),
    "conversations of ShareGPT beside their text": read(
        parquet(
            "p.parquet",
            lambda lines: {
                "text": [f"<|user|>{line}" for line in lines],
                "conversations": [
                    [{"from": "system", "value": "Be brief."}, {"from": "human", "value": line}] for line in lines
                ],
            },
        ),
        ["column conversations"],
    ),
    "a prompt that is a conversation in parts": read(
        text(
            "p.json",
            lambda lines: json.dumps(
                [{"prompt": chat([{"type": "text", "text": line[:4]}, {"text": line[4:]}])} for line in lines]
            ),
        ),
        ["column prompt (what users say first)"],
    ),
    "UTF-16": read(text("p.txt", lambda lines: "\r\n".join(lines).encode("utf-16"))),
    "UTF-16 without a mark": read(text("p.txt", lambda lines: "\n".join(lines).encode("utf-16-le"))),
    "UTF-8 with a BOM": read(text("p.txt", lambda lines: codecs.BOM_UTF8 + "\n".join(lines).encode())),
    "UTF-16 json lines": read(
        text("p.jsonl", lambda lines: json_lines([{"text": line} for line in lines]).encode("utf-16"))
    ),
    "a file without a suffix": read(text("prompts", "\n".join)),
    "parquet": read(parquet("p.parquet", lambda lines: {"goal": lines, "target": lines}), ["column goal"]),
    "a null and an empty row": read(
        parquet("p.parquet", lambda lines: {"text": [*lines[:3], None, " ", *lines[3:]]}),
        ["1 row without text skipped (row 3)", "1 row empty skipped (row 4)"],
        row=18,
    ),
    "json lines with NaN, a null and an empty text": read(
        text(
            "p.jsonl",
            lambda lines: json_lines([{"text": text} for text in (*lines, float("nan"), None, "")]),
        ),
        [
            f"2 rows without text skipped (line {LINES + 1}, line {LINES + 2})",
            f"1 row empty skipped (line {LINES + 3})",
        ],
        row=18,
    ),
    "repeated rows": read(
        text("p.txt", lambda lines: "\n".join([*lines, lines[0], f"  {lines[1]} "])),
        [f"2 rows repeated skipped (line {LINES + 1}, line {LINES + 2})"],
    ),
    "a row that is a document": read(
        text("p.jsonl", lambda lines: json_lines([{"text": "word " * 30_000}, *({"text": line} for line in lines)])),
        ["1 row of more than 100000 characters skipped (line 1)"],
    ),
    "half a character": read(
        text("p.jsonl", lambda lines: json_lines([{"text": line + "\ud83d"} for line in lines])),
        [f"{LINES} rows with a lone surrogate, replaced by U+FFFD (line 1, line 2, line 3, line 4, line 5, …)"],
        as_read=lambda lines: [line + "\ufffd" for line in lines],
        row=24,
    ),
    "a character in two halves": read(
        text("p.jsonl", lambda lines: "".join(f'{{"text": "{line} \\ud83d\\ude00"}}\n' for line in lines)),
        as_read=lambda lines: [line + " \U0001f600" for line in lines],
    ),
    "a cloned dataset": read(clone(), ["column text"], row=2),
    "a cloned dataset whose card names its files": read(
        clone(CARD.format("default", "parts/*.parquet"), at="parts/0.parquet")
    ),
    "a configuration of a cloned dataset": read(
        lambda folder, lines: clone(TWO)(folder, lines) + ":en", ["configuration en"]
    ),
    "a saved dataset": read(saved, ["column goal"]),
}

REFUSED = {
    "several columns of text": refused(
        text("p.csv", lambda lines: table(lines, "ask", "say")),
        ["several columns of text", "columns ask, say", "(ask, say)"],
    ),
    "no column of text": refused(
        text("p.jsonl", lambda lines: json_lines([{"id": 1, "n": 2} for _ in lines])),
        ["no column of text", "columns id, n"],
    ),
    "a given column that is not there": refused(
        text("p.csv", lambda lines: table(lines, "goal", "target"), "#train/ask"),
        ["column ask", "does not exist among the columns goal, target"],
    ),
    "csv without names": refused(text("p.csv", "\n".join), ["names no columns", "prompt"]),
    "csv that names a column twice": refused(
        text("p.csv", lambda lines: table(lines, "prompt", "prompt")), ["p.csv, line 1 names 'prompt' more than once"],
    ),
    "json lines that name a column twice": refused(
        text("p.jsonl", lambda lines: "".join(f'{{"text": {json.dumps(line)}, "text": "b"}}\n' for line in lines)),
        ["p.jsonl, line 1 names 'text' more than once"],
    ),
    "parquet that names a column twice": refused(parquet_of_twins, ["p.parquet names 'text' more than once"]),
    "a conversation without a user's text": refused(
        text(
            "p.jsonl",
            lambda lines: json_lines(
                [
                    *({"messages": chat(line)} for line in lines),
                    {"messages": chat([{"type": "image"}, {"type": "text", "text": "What is it?"}])},
                ]
            ),
        ),
        [f"holds a conversation without a user's text, in line {LINES + 1}"],
    ),
    "a pipe": refused(pipe, ["p.txt is a pipe or a device", "save the prompts to a file"]),
    "csv with commas that are not quoted": refused(
        text("p.csv", lambda lines: "goal\n" + "".join(f"{line}, please\n" for line in lines)),
        ["p.csv, line 2 has 2 fields", "quotes"],
    ),
    "csv with a quote that does not end": refused(
        text("p.csv", lambda lines: 'goal\n"' + "\n".join(lines)), [f"p.csv, line {LINES + 1}: unexpected end of data"],
    ),
    "json that is cut off": refused(
        text("p.json", lambda lines: json.dumps(lines)[:-1]), ["p.json: Expecting ',' delimiter"],
    ),
    "json that is no list": refused(text("p.json", lambda _: '{"a": 1}'), ["does not hold a list of prompts"]),
    "json nested without end": refused(text("p.json", lambda _: "[" * 200_000), ["p.json: maximum recursion depth"]),
    "an empty file": refused(text("p.jsonl", lambda _: ""), ["it is empty"]),
    "only empty rows": refused(text("p.txt", lambda _: "\n\n"), ["it is empty; none of its 2 rows is a prompt"]),
    "another encoding": refused(
        text("p.txt", lambda lines: "\n".join([*lines[:4], "caf\xe9"]).encode("latin-1")),
        ["not UTF-8 text (line 5)", "iconv"],
    ),
    "a binary file": refused(text("p.txt", lambda _: b"\xff\xfe\x00binary"), ["not UTF-8"]),
    "a spreadsheet": refused(text("p.xlsx", lambda _: b"PK\3\4"), ["has an unsupported suffix: .xlsx"]),
    "markdown": refused(text("p.md", "\n".join), ["has an unsupported suffix: .md", "prompt per line .txt"]),
    "a compressed file": refused(text("p.jsonl.gz", lambda _: b"\x1f\x8b"), ["has an unsupported suffix: .gz"]),
    "a Git LFS pointer": refused(text("p.jsonl", lambda _: LFS_POINTER), ["Git LFS pointer", "git lfs pull"]),
    "a damaged parquet file": refused(text("p.parquet", lambda _: b"PAR1" + b"\0" * 40), ["not a parquet file"]),
    "a clone without its files": refused(unfetched_clone, ["Git LFS pointer", "git lfs pull"]),
    "a clone without that split": refused(
        lambda folder, lines: clone()(folder, lines) + "#validation", ["no split validation", "train, test"],
    ),
    "a card that leads out of its folder": refused(clone_that_leads_out, ["secret.txt, which is outside that folder"]),
    "a card that asks for a configuration": refused(
        clone(TWO), ["needs a configuration (en, de)", "set:CONFIG#SPLIT"],
    ),
    "files with different columns": refused(
        folder_of(a__jsonl=json_lines([{"text": "Stir."}]), b__jsonl=json_lines([{"prompt": "Boil."}])),
        ["column prompt of", "(a.jsonl) does not exist among the columns text"], 19,
    ),
    "a folder of other files": refused(
        folder_of(README__rst="x", notes__doc="y"), ["holds no prompts (it holds README.rst"],
    ),
    "a saved dataset of another version": refused(
        saved_by_another_version, ["cannot be read", "FeatureOfTomorrow"], 19
    ),
    "no file": refused(lambda folder, _: str(folder / "p.txt"), ["no prompt file", "p.txt"]),
}  # fmt: skip


def single(folder: Path) -> Sequence[str]:
    (folder / "single.txt").write_text("One.\n")
    return ("--bad-eval-prompts", str(folder / "single.txt"))


OTHERS = {
    "a single prompt to evaluate with": Case(
        ["bad_eval_prompts has a single prompt", "bad_report_prompts"], 3, "data", options=single
    )
}

PROMPTS = {**READ, **REFUSED, **OTHERS}
