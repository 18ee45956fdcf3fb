"""Prompt sources: files, folders, and Hub datasets streamed from a loopback Hub by the real client."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

import job.data
from job.config.load import load_settings
from job.config.sections import PromptSettings
from job.data.prompts import Prompt, PromptSets, held_out, load_prompts, overlaps, read_prompts
from job.data.sources import Source, parse_source, read_texts, source_identity
from job.errors import ImpossibleJobError, UsageError
from job.export.reproduction import prompts_digest
from job.preflight.data_checks import data_checks
from tests.fakes.hub import LoopbackHub
from tests.helpers import abliterate, environment
from tests.processes import USUAL
from tests.warm import Server, Warm, read_early, server_at

ROWS = [f"Please fold napkin number {i}." for i in range(10)]


def settings(spec: str, **named: Any) -> PromptSettings:
    return PromptSettings.model_validate({"spec": spec, "prefix": "", "suffix": "", "system_prompt": None, **named})


def read(spec: str, **named: Any) -> list[str]:
    return list(read_texts(parse_source(settings(spec, **named)), None, print))


# --- parsing a SPEC -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("user/set", Source("hub", "user/set", None, None, "train", 0, None, None)),
        ("user/set#test[:100]/text", Source("hub", "user/set", None, None, "test", 0, 100, "text")),
        ("user/set#train:200/text", Source("hub", "user/set", None, None, "train", 0, 200, "text")),
        ("allenai/c4:en#train[5:9]", Source("hub", "allenai/c4", None, "en", "train", 5, 9, None)),
        ("u/s@v1.0:en#train[7:]/q", Source("hub", "u/s", "v1.0", "en", "train", 7, None, "q")),
        ("squad#validation[:5]", Source("hub", "squad", None, None, "validation", 0, 5, None)),
        ("absent.txt#train[:5]", Source("file", "absent.txt", None, None, "train", 0, 5, None)),
        ("./dir/name#test", Source("file", "dir/name", None, None, "test", 0, None, None)),
        ("/abs/x.jsonl#train[:5]/q", Source("file", "/abs/x.jsonl", None, None, "train", 0, 5, "q")),
        ("builtin:prose#train[:5]/bad", Source("builtin", "prose", None, None, "train", 0, 5, "bad")),
    ],
)
def test_specs_are_understood(spec: str, expected: Source) -> None:
    assert parse_source(settings(spec)) == expected


def test_a_set_s_own_keys_override_its_spec() -> None:
    found = parse_source(settings("u/s@a:b#c[:3]/d", revision="A", config="B", split="C[1:2]", column="D"))
    assert found == Source("hub", "u/s", "A", "B", "C", 1, 2, "D")


@pytest.mark.parametrize(
    ("split", "message"),
    [("train[:10%]", "not a split that can be streamed"), ("train[5:5]", "is empty"), ("train[-3:]", "streamed")],
)
def test_splits_that_cannot_be_streamed_are_refused(split: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_source(settings(f"user/set#{split}"))


def test_config_show_tells_how_specs_were_understood() -> None:
    shown = abliterate("config", "show", "m", "--bad-prompts", "allenai/c4:en#train:200").check().out
    c4 = "Hub dataset allenai/c4, configuration en, split train, rows 0 to 199, the column of prompts"
    assert f"# bad_prompts: {c4}\n" in shown
    assert "# good_prompts: Hub dataset mlabonne/harmless_alpaca, split train, rows 0 to 399, column text" in shown


# --- local sources ------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("\n".join(ROWS))
    (tmp_path / "odd # name.txt").write_text("one\ntwo\n")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"ask": row, "id": i}) + "\n" for i, row in enumerate(ROWS)))
    pyarrow.parquet.write_table(pyarrow.table({"text": ROWS, "id": range(10)}), tmp_path / "c.parquet")
    datasets.Dataset.from_dict({"text": ROWS}).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ROWS})}).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "2.txt").write_text("later")
    (tmp_path / "folder" / "1.jsonl").write_text('{"text": "sooner"}\n')
    (tmp_path / "folder" / "notes.md").write_text("no prompts")
    return tmp_path


def test_files_folders_and_saved_datasets_are_read(files: Path) -> None:
    assert read(f"{files}/a.txt") == ROWS
    assert read(f"{files}/a.txt#train[2:4]") == ROWS[2:4]
    assert read(f"{files}/odd # name.txt") == ["one", "two"]
    assert read(f"{files}/b.jsonl#train[:3]/ask") == ROWS[:3]
    assert read(f"{files}/c.parquet#train[8:]") == ROWS[8:]
    assert read(f"{files}/saved#train[:2]") == ROWS[:2]
    assert read(f"{files}/splits#test[:2]") == ROWS[:2]
    assert read(f"{files}/folder") == ["sooner", "later"]


def test_local_faults_are_told_in_one_line(files: Path) -> None:
    (files / "bad.jsonl").write_text('{"text": "fine"}\nnot json\n')
    (files / "list.jsonl").write_text("[1]\n")
    (files / "bad.parquet").write_bytes(b"PAR1 no")
    (files / "latin.txt").write_bytes(b"caf\xe9")
    (files / "empty").mkdir()
    for spec, message in (
        ("absent.txt", "no prompt file"),
        ("b.jsonl#train/text", "column text of .* does not exist among the columns ask, id .*holds text .ask."),
        ("b.jsonl#train/id", "holds int, not text"),
        ("bad.jsonl", "line 2"),
        ("list.jsonl", "not an object"),
        ("bad.parquet", "not a parquet file"),
        ("latin.txt", "not UTF-8"),
        ("splits", "no split train.*test"),
        ("empty", "holds no prompts"),
    ):
        with pytest.raises(ImpossibleJobError) as caught:
            read(f"{files}/{spec}")
        import re

        assert re.search(message, caught.value.line), caught.value.line


@pytest.mark.parametrize("kind", ["plain", "clone", "saved", "card", "folder"])
def test_a_folder_of_others_links_to_no_file_of_this_machine(tmp_path: Path, kind: str) -> None:
    """Regression: a clone's link to a file of the user's was read as prompts, and went into its mirror and report."""
    secret, folder = tmp_path / "elsewhere" / "secret.txt", tmp_path / "set"
    secret.parent.mkdir()
    secret.write_text("Not meant for prompts.\n")
    folder.mkdir()
    (folder / "train.txt").write_text(ROWS[0] + "\n")
    link = folder / "other.txt"
    if kind in ("clone", "folder"):
        (folder / ".gitattributes").touch()
        (folder / "README.md").write_text(
            "---\nconfigs:\n- config_name: default\n  data_files: ['*.txt', 'data/*.txt']\n---\n"
        )
    elif kind == "saved":
        shutil.rmtree(folder)
        datasets.Dataset.from_dict({"text": ROWS[:1]}).save_to_disk(folder)
        link = folder / "data-00001-of-00001.arrow"
    if kind == "folder":
        (folder / "data").symlink_to(secret.parent)
    else:
        link.symlink_to(secret)
    use = (lambda: read(str(folder)), lambda: source_identity(settings(str(folder))))
    for each in use:
        with pytest.raises(ImpossibleJobError, match="is a link to a place outside the folder of prompts"):
            each()
    # Links within the folder, and those of the Hub's cache to its own files, are followed.
    (folder / "data" if kind == "folder" else link).unlink()
    (folder / "inside.txt").symlink_to("train.txt")
    assert read(str(folder))[:1] == ROWS[:1]


@pytest.mark.parametrize(
    "pattern", ["/etc/**", "~/**", "../elsewhere/*.txt", "http://127.0.0.1:9/a.txt", "zip://a.txt::b"]
)
def test_a_card_names_files_of_its_folder_only(tmp_path: Path, pattern: str) -> None:
    """Regression: the pattern was looked for all over the disk, or at its address, before it was refused."""
    (tmp_path / "train.txt").write_text(ROWS[0] + "\n")
    (tmp_path / ".gitattributes").touch()
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: '{pattern}'\n---\n")
    with pytest.raises(ImpossibleJobError, match="which is outside that folder"):
        read(str(tmp_path))


def test_a_split_without_end_is_refused_where_it_has_none(tmp_path: Path) -> None:
    (tmp_path / "many.txt").write_text("row\n" * 20_001)
    with pytest.raises(UsageError, match="more than 20000 rows"):
        read(f"{tmp_path}/many.txt")
    assert len(read(f"{tmp_path}/many.txt#train[:20001]")) == 20_001


def test_identity_is_by_content_and_by_what_is_read_of_it(files: Path) -> None:
    first = source_identity(settings(f"{files}/a.txt"))
    (files / "copy.txt").write_text("\n".join(ROWS))
    assert source_identity(settings(f"{files}/copy.txt")) == first
    assert source_identity(settings(f"{files}/a.txt#train[:3]")) != first
    assert source_identity(settings(f"{files}/a.txt", prefix="Now: ")) != first
    (files / "a.txt").write_text("else")
    assert source_identity(settings(f"{files}/a.txt")) != first
    assert "sha256" not in source_identity(settings("user/set"))


def test_the_identity_of_plain_files_is_that_of_former_versions(files: Path) -> None:
    def of(*names: str, **other: Any) -> dict[str, Any]:
        digest = hashlib.sha256(b"".join(hashlib.sha256((files / name).read_bytes()).digest() for name in names))
        rest = {"prefix": "", "suffix": "", "system_prompt": None, "max_characters": None}
        plain = {"split": "train", "start": 0, "stop": None, "column": None, **rest}
        return {"sha256": digest.hexdigest(), **plain, **other}

    (files / "folder" / "numbers.csv").write_text("id\n1\n")  # never read beside plain files
    assert source_identity(settings(f"{files}/a.txt")) == of("a.txt")
    assert source_identity(settings(f"{files}/b.jsonl#train:3/ask")) == of("b.jsonl", stop=3, column="ask")
    assert source_identity(settings(f"{files}/c.parquet")) == of("c.parquet")
    assert source_identity(settings(f"{files}/folder")) == of("folder/1.jsonl", "folder/2.txt")
    saved = [f"saved/{name}" for name in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json")]
    assert source_identity(settings(f"{files}/saved")) == of(*saved)


def test_tables_beside_plain_files_are_named_where_they_are_left_out(files: Path) -> None:
    (files / "folder" / "more.csv").write_text("prompt\nStir.\n")
    said: list[str] = []
    found = read_prompts(settings(f"{files}/folder"), said.append)
    assert [prompt.user for prompt in found] == ["sooner", "later"]
    assert f"warning: {files}/folder: not read: more.csv; to read a file, name it" in said


def test_prompts_are_cleaned_cut_wrapped_and_overlaps_are_told(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("  Peel it.  \n\nPeel it.\nSlice it very thinly.\n")
    (tmp_path / "bad.txt").write_text("Hex it.\nPeel it.\n")
    (tmp_path / "eval.txt").write_text("Stir.\nPeel it.\nBoil.\nBake.\n")
    said: list[str] = []
    options = {
        "model": "m",
        "good_prompts": str(tmp_path / "good.txt"),
        "bad_prompts": str(tmp_path / "bad.txt"),
        "good_eval_prompts": str(tmp_path / "eval.txt"),
        "bad_eval_prompts": str(tmp_path / "eval.txt"),
    }
    named = ['good_prompts.prefix="P: "', "good_prompts.max_characters=8", "bad_prompts.system_prompt=Be brief."]
    prompts = load_prompts(load_settings(options, assignments=named).settings, said.append)
    assert [prompt.user for prompt in prompts.good] == ["P: Peel it.", "P: Slice it"]
    assert {prompt.system for prompt in prompts.bad} == {"Be brief."}
    assert len(prompts.bad_search) == len(prompts.bad_report) == 2
    assert not {p.user for p in prompts.bad_search} & {p.user for p in prompts.bad_report}
    assert overlaps(prompts) == [
        "1 of 2 of bad_prompts are also among the bad evaluation prompts: figures on them flatter the edit"
    ]
    assert any(line.startswith("warning: 1 of 2 of bad_prompts") for line in said)
    assert f"good_prompts: file {tmp_path}/good.txt, all rows from 0: 2 prompts" in said


def _loaded(folder: Path, named: Sequence[str] = (), **texts: str) -> PromptSets:
    """Return the prompt sets of a job from these texts, one prompt per line."""
    sets = {"good": "Stir.\nBoil.", "bad": "Hex.\nCurse.", "good_eval": "Bake.\nFry.", "bad_eval": "Jinx.\nCharm."}
    options: dict[str, Any] = {"model": "m"}
    for name, text in {**sets, **texts}.items():
        (folder / f"{name}.txt").write_text(text)
        options[f"{name}_prompts"] = str(folder / f"{name}.txt")
    return load_prompts(load_settings(options, assignments=list(named)).settings, lambda _: None)


ORTHOGONAL = "directions.orthogonalize_directions=true"


@pytest.mark.parametrize(
    ("texts", "named", "seen", "total"),
    [
        pytest.param({}, [], 0, 2, id="evaluation sets are split"),
        pytest.param({"good_report": "Roast.", "bad_report": "Spell.\nOmen."}, [], 0, 3, id="separate report prompts"),
        pytest.param({"good_report": "Stir.\nRoast."}, [], 1, 3, id="seen by the direction"),
        pytest.param({"bad_report": "Jinx.\nCharm.\nOmen."}, [], 2, 4, id="seen by the search"),
        pytest.param({"bad_report": "Stir.\nOmen."}, [], 1, 3, id="of the other class"),
        pytest.param({"bad_report": "  hex.\nOmen."}, [], 1, 3, id="in other letters and spaces"),
        pytest.param({"bad_report": "Hex."}, ["bad_report_prompts.system_prompt=Be brief."], 1, 2, id="other system"),
        pytest.param({"bad_report": "Help.", "helpfulness": "Help.", "unhelpfulness": "Web."}, [ORTHOGONAL], 1, 2,
                     id="orthogonalized against"),
        pytest.param({"bad_report": "Help.", "helpfulness": "Help.", "unhelpfulness": "Web."}, [], 0, 2,
                     id="a set that is not used"),
    ],
)  # fmt: skip
def test_report_prompts_are_held_out_only_where_neither_direction_nor_search_uses_them(
    tmp_path: Path, texts: dict[str, str], named: list[str], seen: int, total: int
) -> None:
    prompts = _loaded(tmp_path, named, **texts)
    assert (prompts.reused, len(prompts.reported)) == (seen, total)
    said = f"{total} prompts, {seen} also used by the direction or the search"
    assert prompts.report_description == (
        said if seen else "prompts that neither the direction nor the search has seen"
    )


def _many(count: int, word: str) -> str:
    return "".join(f"{word} number {index}.\n" for index in range(count))


@pytest.mark.parametrize(
    ("good", "bad", "named", "held"),
    [
        (200, 150, [], (40, 30)),
        (100, 100, ["choice.held_out=0.05"], (20, 20)),
        (100, 400, ["choice.held_out=0.5"], (50, 200)),
        (99, 400, [], (0, 0)),
        (400, 99, [], (0, 0)),
        (400, 400, ["choice.held_out=0"], (0, 0)),
    ],
)
def test_prompts_for_the_choice_are_taken_from_large_extraction_sets(
    tmp_path: Path, good: int, bad: int, named: list[str], held: tuple[int, int]
) -> None:
    texts = {"good": _many(good, "Bake"), "bad": _many(bad, "Hex")}
    prompts = _loaded(tmp_path, named, **texts)
    assert (len(prompts.good_choice), len(prompts.bad_choice)) == held
    for kind, count, rest, own in (
        ("good", good, prompts.good, prompts.good_choice),
        ("bad", bad, prompts.bad, prompts.bad_choice),
    ):
        assert len(rest) + len(own) == len({*rest, *own}) == count
        order = {line: place for place, line in enumerate(texts[kind].splitlines())}
        for part in (rest, own):
            places = [order[prompt.user] for prompt in part]
            assert places == sorted(places)
        assert prompts.of_setting(f"{kind}_prompts") == (*rest, *own)
        assert {*rest, *own} <= {*prompts.everything}
    assert prompts == _loaded(tmp_path, named, **texts)
    told = {check.name: check.measured for check in data_checks(prompts)}
    assert told["data.bad_prompts"].endswith(
        f": {bad} prompts, {held[1]} of them for the choice" if held[1] else f": {bad} prompts"
    )
    if all(held):
        other = _loaded(tmp_path, [*named, "seed=1"], **texts)
        assert other.bad_choice != prompts.bad_choice
        # Neither set is drawn like the other.
        assert [p.user[5:] for p in prompts.good_choice] != [p.user[4:] for p in prompts.bad_choice]
        seen = _loaded(tmp_path, named, **texts, bad_report=f"{prompts.bad_choice[0].user}\nHelp.")
        assert seen.reused == 1
        assert any(line.startswith(f"1 of {bad} of bad_prompts are also") for line in overlaps(seen))


@given(count=st.integers(1, 60), share=st.floats(0, 1), seed=st.integers(0, 9))
def test_held_out_prompts_and_the_rest_are_the_set(count: int, share: float, seed: int) -> None:
    prompts = [Prompt(user=f"Stir {index}.") for index in range(count)]
    rest, chosen = held_out(prompts, int(share * count), seed, "soup")
    assert len(chosen) == int(share * count)
    assert sorted([*rest, *chosen], key=prompts.index) == prompts
    assert (rest, chosen) == held_out(prompts, int(share * count), seed, "soup")


def test_overlaps_are_told_whatever_the_letters_and_for_all_sets_of_the_direction(tmp_path: Path) -> None:
    sets = {"bad_report": "hex.\nHelp.", "helpfulness": "Help.", "unhelpfulness": "Web.\nNet."}
    assert overlaps(_loaded(tmp_path, [ORTHOGONAL], **sets)) == [
        "1 of 2 of bad_prompts are also among the bad evaluation prompts: figures on them flatter the edit",
        "1 of 3 of the prompts to orthogonalize against are also among the report's: figures on them flatter the edit",
    ]


# --- the Hub ------------------------------------------------------------------------------------------

README = b"""---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
- config_name: realnewslike
  data_files:
  - split: train
    path: realnewslike/*.json.gz
---
"""
TOMORROW = b"""---
dataset_info:
  features:
  - name: text
    dtype:
      feature_of_tomorrow: 1
---
"""
# Reads a SPEC with the real client and prints the result; the endpoint is read at import. Waits between tries are cut.
READ = """
import json, sys
import datasets.config
from job.system import hub_client
from job.system.hub_client import count_traffic, received_bytes
from job.errors import JobError
from job.config.sections import PromptSettings
from job.data.sources import parse_source, read_texts, resolve_commit

datasets.config.STREAMING_READ_RETRY_INTERVAL = hub_client.FIRST_WAIT = 0.05
count_traffic()
for spec in sys.argv[1:]:
    said = []
    try:
        source = parse_source(PromptSettings(spec=spec, prefix="", suffix="", system_prompt=None))
        pin = resolve_commit(source, said.append)
        commit = pin.commit if pin else None
        texts = list(read_texts(source, commit, said.append))
        print(json.dumps({"texts": texts, "commit": commit, "received": received_bytes(), "said": said}))
    except JobError as error:
        print(json.dumps({"error": error.line, "code": error.exit_code, "said": said}))
"""


def shard(rows: int, seed: int) -> bytes:
    """Return a gz shard of random words, about as compressible as web text."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcdefghijklmnoprstuvw", k=chance.randint(2, 9))) for _ in range(5000)]
    lines = ({"text": f"{i} " + " ".join(chance.choices(words, k=300)), "url": "u"} for i in range(rows))
    return gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode(), 1)


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub(lfs_threshold=1 << 20, usual=True) as hub:
        shards = {f"en/c4-train.{i:05d}-of-00012.json.gz": shard(30, i) for i in range(1, 12)}
        big = {"en/c4-train.00000-of-00012.json.gz": shard(8000, 0)}
        hub.add_dataset("allenai/c4", {"README.md": README, **big, **shards, "realnewslike/0.json.gz": shard(5, 99)})
        hub.add_dataset(
            "kitchen/napkins", {"train.jsonl": "".join(json.dumps({"ask": r}) + "\n" for r in ROWS).encode()}
        )
        hub.add_dataset("kitchen/script", {"script.py": b"import datasets\n", "README.md": b"# By a script\n"})
        uneven = {"a.jsonl": b'{"text": "Stir."}\n', "b.jsonl": b'{"question": "Boil?", "n": 1}\n'}
        hub.add_dataset("kitchen/uneven", uneven)
        hub.add_dataset("kitchen/tomorrow", {"README.md": TOMORROW, "train.jsonl": b'{"text": "Stir."}\n'})
        hub.add_dataset("kitchen/broken", {"train.jsonl": b'{"text": "Stir."}\n{"text": \n'})
        hub.add_dataset("kitchen/nothing", {"README.md": b"# Nothing yet\n"})
        hub.add_dataset("kitchen/private", {"train.jsonl": b'{"text": "hush"}\n'}, private=True)
        hub.add_dataset("kitchen/gated", {"train.jsonl": b'{"text": "hush"}\n'}, gated="manual")
        hub.add_token("hf_kitchen" + "k" * 20, "cook")
        yield hub
        assert hub.errors == []


@pytest.fixture(scope="module")
def reader(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a process that has loaded `datasets` for this Hub, and nothing of ours."""
    network = hub.environment(tmp_path_factory.mktemp("home"))
    server = server_at({**environment(), **network}, USUAL, "datasets", "scipy.stats", "aiohttp", "fsspec.asyn")
    yield server
    server.close()


@pytest.fixture
def ask(hub: LoopbackHub, reader: Server, tmp_path: Path) -> Any:
    hub.forget()

    def call(*specs: str, **extra: str) -> Any:
        """Read specs in one process; return the result, for several a list."""
        wanted = {**environment(), **hub.environment(tmp_path), **extra}
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": wanted}
        if read_early(wanted, reader.environment):
            process = subprocess.Popen([sys.executable, "-c", READ, *specs], **options)
        else:
            process = Warm(reader, specs, script=READ, **options)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        found = [json.loads(line) for line in out.splitlines()[-len(specs) :]]
        return found[0] if len(specs) == 1 else found

    yield call
    hub.faults.clear()


def test_two_hundred_rows_of_c4_touch_one_shard_and_few_bytes(hub: LoopbackHub, ask: Any) -> None:
    found = ask("allenai/c4:en#train[:200]/text")
    assert [text.partition(" ")[0] for text in found["texts"]] == [str(i) for i in range(200)]
    assert found["commit"] == hub.repo("dataset", "allenai/c4").sha
    shards = {request.path.rpartition("/")[2] for request in hub.asked("GET", "*.json.gz")}
    assert shards == {"c4-train.00000-of-00012.json.gz"}
    sent = hub.bytes_sent("*")
    assert sent < 5_000_000
    assert abs(found["received"] - sent) < 0.02 * sent  # the count equals the traffic
    whole = hub.repo("dataset", "allenai/c4").at("main").files["en/c4-train.00000-of-00012.json.gz"].size
    assert whole > 2 * sent
    assert all(found["commit"] in request.path for request in hub.asked("GET", "*/resolve/*"))


def test_an_interrupted_stream_is_taken_up_again(hub: LoopbackHub, ask: Any) -> None:
    hub.cut("/cdn/*", after_bytes=100_000, times=3)
    found = ask("allenai/c4:en#train[100:140]")
    assert [text.partition(" ")[0] for text in found["texts"]] == [str(i) for i in range(100, 140)]


def test_a_hub_that_fails_for_a_while_is_asked_again(hub: LoopbackHub, ask: Any) -> None:
    hub.fail("GET", "/api/datasets/kitchen/napkins", status=503, times=2)
    hub.fail("GET", "/api/datasets/kitchen/napkins", status=429, headers={"Retry-After": "1"}, times=1)
    found = ask("kitchen/napkins#train[:4]/ask")
    assert found["texts"] == ROWS[:4]


def test_what_cannot_be_had_is_told_with_the_remedy(ask: Any) -> None:
    told = (
        ("allenai/c4#train[:5]", "needs a configuration", "'en', 'realnewslike'"),
        ("allenai/c4:de#train[:5]", "needs a configuration", "en", "realnewslike"),
        ("kitchen/napkins#train[:5]/text", "column text", "among the columns ask"),
        ("kitchen/napkins#test[:5]/ask", "no split test", "train"),
        ("kitchen/napkins@v9#train[:5]", "no such revision"),
        ("kitchen/absent#train[:5]", "not on the Hub"),
        ("kitchen/private#train[:5]", "not on the Hub, or not for this token"),
        ("kitchen/gated#train[:5]", "access to dataset kitchen/gated has not been granted", "terms"),
    )
    for (_, *parts), found in zip(told, ask(*(spec for spec, *_ in told)), strict=True):
        assert found["code"] == 3, found
        for part in parts:
            assert part in found["error"], (part, found["error"])
    assert ask("kitchen/private#train[:5]", HF_TOKEN="hf_wrong" + "w" * 20)["code"] == 3


def test_whatever_the_library_makes_of_a_dataset_is_one_line(ask: Any) -> None:
    told = (
        ("kitchen/script#train[:5]", "loading script", "kitchen/script@refs/convert/parquet#train"),
        ("kitchen/uneven", "different columns", "give one of its files"),
        ("kitchen/tomorrow#train[:5]", "dataset kitchen/tomorrow cannot be read", "kitchen/tomorrow@refs"),
        ("kitchen/broken#train[:5]", "dataset kitchen/broken cannot be read", "JSON"),
        ("kitchen/nothing#train[:5]", "no readable files"),
    )
    for (_, *parts), found in zip(told, ask(*(spec for spec, *_ in told)), strict=True):
        assert found.get("code") == 3, found
        for part in parts:
            assert part in found["error"], (part, found["error"])
        assert "\n" not in found["error"]


def test_the_column_of_a_dataset_is_found_by_its_name(ask: Any) -> None:
    assert ask("kitchen/napkins#train[:3]")["texts"] == ROWS[:3]


def test_a_hub_that_is_out_of_reach_is_this_machine_s_trouble(ask: Any) -> None:
    found = ask("kitchen/napkins#train[:5]/ask", HF_HUB_OFFLINE="1")
    assert (found["code"], "the Hub is out of reach" in found["error"]) == (76, True), found


def test_offline_use_from_a_prepared_cache(hub: LoopbackHub, reader: Server, ask: Any, tmp_path: Path) -> None:
    prepare = "import datasets; datasets.load_dataset('kitchen/napkins')"
    options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    prepared = Warm(reader, (), script=prepare, env={**environment(), **hub.environment(tmp_path)}, **options)
    said = prepared.communicate()[1]
    assert prepared.returncode == 0, said
    hub.forget()
    found = ask("kitchen/napkins#train[2:5]/ask", HF_HUB_OFFLINE="1")
    assert found["texts"] == ROWS[2:5]
    assert hub.requests == []


def test_category_and_language_of_rows_are_kept_and_change_no_digest(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Where is it?", "Category": " places\n", "language": "en"},
        {"prompt": "Wo ist es?", "Category": "places", "language": "de"},
        {"prompt": "What?", "Category": None, "language": 7},
        {"prompt": "Why?", "Category": "x" * 99, "language": ""},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_prompts(settings(str(tmp_path / "p.jsonl")), lambda _: None)
    assert [one.groups for one in found] == [
        {"category": "places", "language": "en"},
        {"category": "places", "language": "de"},
        {},
        {"category": "x" * 64},
    ]
    plain = tuple(Prompt(user=row["prompt"]) for row in rows)
    assert prompts_digest(found) == prompts_digest(plain)
    # Prompts without groups are stored as by former versions.
    assert plain[0].model_dump_json() == '{"user":"Where is it?","system":null}'
    # The column of the prompts themselves names no group.
    chosen = read_prompts(settings(str(tmp_path / "p.jsonl"), column="language", split="train[:2]"), lambda _: None)
    assert [(one.user, one.groups) for one in chosen] == [
        ("en", {"category": "places"}),
        ("de", {"category": "places"}),
    ]


# --- built-in prompts -----------------------------------------------------------------------------------


def test_built_in_prompts_are_read_and_identified_without_a_path() -> None:
    spec = "builtin:flattery#train[:3]/bad"
    assert len(read(spec)) == 3
    identity = source_identity(settings(spec))
    content = (Path(job.data.__path__[0]) / "builtin" / "flattery.tsv").read_bytes()
    digest = hashlib.sha256(content).digest()
    assert identity["sha256"] == hashlib.sha256(digest).hexdigest()
    assert identity["builtin"] == "flattery"
    described = parse_source(settings(spec)).describe()
    assert described == "built-in prompts flattery, rows 0 to 2, column bad"


def test_unknown_built_in_prompts_are_refused() -> None:
    with pytest.raises(UsageError, match="no built-in prompts 'mine'"):
        parse_source(settings("builtin:mine#train"))
    with pytest.raises(UsageError):
        parse_source(settings("builtin:../columns#train"))


def test_a_card_that_is_a_link_to_elsewhere_is_not_read(tmp_path: Path) -> None:
    folder, card = tmp_path / "set", tmp_path / "card.md"
    folder.mkdir()
    card.write_text("---\nconfigs:\n- config_name: default\n  data_files: 'b.txt'\n---\n")
    (folder / "a.txt").write_text("Where is it?\n")
    (folder / "b.txt").write_text("What is it?\n")
    (folder / "README.md").symlink_to(card)
    assert len(read(str(folder))) == 2


@pytest.mark.parametrize("linked", [False, True])
def test_links_of_the_hub_cache_lead_to_its_blobs(tmp_path: Path, linked: bool) -> None:
    repository = tmp_path / "hub" / "datasets--cook--soup"
    blobs = tmp_path / "shared" if linked else repository / "blobs"
    data = repository / "snapshots" / ("c" * 40) / "data"
    blobs.mkdir(parents=True)
    data.mkdir(parents=True)
    if linked:
        (repository / "blobs").symlink_to(blobs)
    (blobs / "b1").write_text("Where is it?\n")
    (data / "a.txt").symlink_to(Path("../../../blobs/b1"))
    assert len(read(str(data))) == 1
