"""Help: examples that parse, options in groups with defaults, units of durations, and output as JSON."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from job import __version__
from job.cli.app import app
from job.cli.examples import EXAMPLES
from job.cli.help import GROUPS
from job.cli.main import app as whole
from job.cli.options import SETTING_OPTIONS
from job.config.load import setting_names
from job.config.option_names import NESTED_OPTIONS
from tests.helpers import COMMAND, abliterate, environment, only_job
from tests.unit.test_docs import parsed

WIDE = {"COLUMNS": "200", "TERMINAL_WIDTH": "200"}


def all_commands() -> dict[str, Any]:
    """Return every visible command by its words; those of the platforms are named once."""
    found: dict[str, Any] = {}
    waiting: list[tuple[str, Any]] = [("", typer.main.get_command(whole))]
    while waiting:
        words, command = waiting.pop()
        if hasattr(command, "commands"):
            waiting += [(f"{words} {name}".strip(), below) for name, below in command.commands.items()]
        elif not command.hidden:
            found[words] = command
    return found


def test_every_command_ends_its_help_with_examples_that_parse() -> None:
    assert app is whole
    seen = set()
    for words, command in all_commands().items():
        shown = re.findall(r"`(abliterate [^`]+)`", command.epilog or "")
        assert shown, words
        for line in shown:
            assert line.startswith(f"abliterate {words}"), line
            parsed(line)
        seen.add(re.sub("cloud (vast|runpod)", "cloud", words))
    assert seen == set(EXAMPLES)


def test_groups_of_commands_say_where_the_examples_are() -> None:
    for words in ("", "cloud", "cloud vast", "cloud runpod"):
        assert "lists a command's options and examples" in abliterate(*words.split(), "-h").check().out, words


def test_short_help_is_help_for_every_command() -> None:
    for words in all_commands():
        assert abliterate(*words.split(), "-h").check().out == abliterate(*words.split(), "--help").check().out
    assert abliterate("-h").check().out == abliterate("--help").check().out


def test_the_version_is_printed_by_both_distributions_commands() -> None:
    assert abliterate("--version").check().out == f"abliteration-job {__version__}\n"


def test_options_of_settings_are_in_groups_and_show_their_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(SETTING_OPTIONS.keys() - {"model"})
    for name, value in WIDE.items():
        monkeypatch.setenv(name, value)
    shown = abliterate("run", "--help", **WIDE).check().out
    for group in (*GROUPS, "Settings from elsewhere", "Examples"):
        assert group in shown
    for option, default in (
        ("--seed", "0"),
        ("--device ", "auto"),
        ("--visibility", "private"),
        ("--engine", "local"),
    ):
        (described,) = re.findall(rf"│ {option}.*?(?=│ --|╰)", shown, re.DOTALL)
        assert f"[default: ({default})]" in described


def test_everyday_settings_are_options(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--batch-size", "8", "--quantization", "bnb-4bit", "--trust-remote-code"]
    shown = abliterate("config", "show", "model", *words, "--device-map", '{ "" = 0 }').check().out
    for line in (
        *('loading.device = "cpu"', "batching.rows = 8", 'loading.quantization = "bnb-4bit"'),
        *("loading.trust_remote_code = true", 'loading.device_map = { "" = 0 }'),
    ):
        assert f"{line}  # command line" in shown
    assert set(NESTED_OPTIONS.values()) <= set(setting_names())
    abliterate("config", "show", "model", "--device", "tpu").fails(2, "loading.device")


@pytest.mark.parametrize(
    ("given", "setting"),
    [
        (["--max-hours", "90m"], "max_hours = 1.5"),
        (["--max-hours", "2"], "max_hours = 2.0"),
        (["--grace", "1m"], "grace = 60.0"),
        (["--wait-for-gpu", "1h30m"], "wait_for_gpu = 90.0"),
        (["--set", "hang_seconds=1h"], "hang_seconds = 3600.0"),
    ],
)
def test_durations_take_units_and_plain_numbers_as_before(given: list[str], setting: str) -> None:
    assert f"{setting}  # command line" in abliterate("config", "show", "model", *given).check().out


def test_durations_that_are_none_are_refused() -> None:
    abliterate("run", "model", "--max-hours", "soon").fails(2, "'soon' is no duration")
    assert "is no duration" in abliterate("cloud", "vast", "offers", "--on", "1xH200", "--wait", "2 weeks").err
    assert "0 is less than 0.1" in abliterate("status", "--watch", "--interval", "0").err


def test_a_bad_option_keeps_its_plain_lines_and_exit_code() -> None:
    ended = abliterate("run", "model", "--no-such-option")
    assert (ended.code, ended.out) == (2, "")
    assert "No such option: --no-such-option" in ended.err
    assert "─" not in ended.err


def test_options_of_one_concept_answer_to_both_names(finished: Path) -> None:
    assert 'export_format = "adapter"' in abliterate("config", "show", "model", "--format", "adapter").check().out
    abliterate("export", "--workspace", finished, "--export-format", "none").fails(2, "there is no format none")
    abliterate("status", "--workspace", finished, "--watch", "--every", "1s").check()


def test_front_and_status_are_aligned_and_coloured_on_terminals_only(finished: Path) -> None:
    lines = abliterate("front", "--workspace", finished).check().out.splitlines()
    assert len(lines) > 1
    assert len({line.index(" refusals (") for line in lines}) == 1
    assert len({line.index("KL ") for line in lines}) == 1
    assert not any("\x1b" in line for line in lines)
    status = abliterate("status", "--workspace", finished).check().out
    assert len({line.index("KL ") for line in status.splitlines() if line.startswith("  trial ")}) == 1
    for extra, coloured in ({}, True), ({"NO_COLOR": "1"}, False):
        assert ("\x1b[" in on_a_terminal(["front", "--workspace", str(finished)], extra)) == coloured


def on_a_terminal(words: list[str], extra: dict[str, str]) -> str:
    """Return what a command shows on a terminal."""
    outer, inner = pty.openpty()
    env = {**environment(), "TERM": "xterm", **extra}
    process = subprocess.Popen([*COMMAND, *words], stdout=inner, stderr=subprocess.DEVNULL, env=env)
    os.close(inner)
    shown = b""
    while True:
        try:
            piece = os.read(outer, 65536)
        except OSError:  # closed by the command's end
            break
        if not piece:
            break
        shown += piece
    os.close(outer)
    assert process.wait(60) == 0
    return shown.decode()


def test_inspect_is_a_table(organism: Path) -> None:
    lines = abliterate("inspect", organism / "model").check().out.splitlines()
    assert lines[0] == "llama: supported, 8 layers"
    assert lines[1].split() == ["layer", "component", "parameter"]
    assert len(lines) == 2 + 16
    assert len({line.index("model.layers.") for line in lines[2:]}) == 1


def test_json_of_settings_and_reports(finished: Path) -> None:
    shown = json.loads(abliterate("config", "show", "model", "--trials", "7", "--json").check().out)
    assert shown["trials"] == {"value": 7, "source": "command line"}
    assert shown["search.space"]["source"] == "default"
    pages = json.loads(abliterate("report", "--workspace", finished, "--json").check().out)
    assert pages == {"report": str(only_job(finished) / "report.md"), "page": str(only_job(finished) / "report.html")}


def test_completion_is_offered() -> None:
    words = {"_ABLITERATE_COMPLETE": "complete_bash", "COMP_WORDS": "abliterate eva", "COMP_CWORD": "1"}
    env = {**environment(), **words}
    ended = subprocess.run([*COMMAND], capture_output=True, text=True, env=env)
    assert ended.stdout.split() == ["evaluate"], ended.stderr
    assert sys.executable
