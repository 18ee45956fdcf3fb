from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from job.config.describe import describe_settings
from job.config.load import default_values, load_settings, setting_names
from job.config.schema import Settings
from job.config.sections import PromptSettings
from job.errors import UsageError
from tests.reference import page

GIVEN = {
    "model": "m",
    "good_prompts": "g.txt",
    "bad_prompts": "b.txt",
    "good_eval_prompts": "ge.txt",
    "bad_eval_prompts": "be.txt",
}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("ABLITERATE_"):
            monkeypatch.delenv(name)


def load(config: Path | None = None, assignments: tuple[str, ...] = (), **options: Any) -> Settings:
    return load_settings({**GIVEN, **options}, config=config, assignments=assignments).settings


def toml(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "job.toml"
    file.write_text(text)
    return file


def test_precedence_and_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toml(tmp_path, "trials = 11\nseed = 12\n[search]\nei_candidates = 13\nspace = 'field'\n")
    monkeypatch.setenv("ABLITERATE_SEED", "22")
    monkeypatch.setenv("ABLITERATE_SEARCH__EI_CANDIDATES", "23")
    loaded = load_settings(GIVEN, config=config, assignments=["search.ei_candidates=33"])
    settings = loaded.settings
    assert (settings.trials, settings.seed, settings.search.ei_candidates) == (11, 22, 33)
    assert settings.search.space == "field"
    assert loaded.sources["trials"] == str(config)
    assert loaded.sources["seed"] == "environment"
    assert loaded.sources["search.ei_candidates"] == "command line"
    assert loaded.sources["grace"] == "default"
    _, lines = describe_settings(GIVEN, config=config)
    assert f"trials = 11  # {config}" in lines
    assert 'bad_prompts.spec = "b.txt"  # command line' in lines


def test_every_setting_is_described_and_named_once() -> None:
    names = list(setting_names())
    assert len(names) == len(set(names))
    described = "\n".join(describe_settings(GIVEN)[1])
    for name in names:
        table, _, key = name.partition(".")
        assert name in described or (
            table.endswith("_prompts") and (table in described or key in PromptSettings.model_fields)
        )


def test_prompt_sets_as_spec_and_as_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toml(tmp_path, "good_prompts = 'toml.txt'\n[bad_prompts]\nspec = 'toml.txt'\nprefix = 'P: '\n")
    settings = load(config)
    assert settings.good_prompts.spec == "g.txt"
    assert settings.bad_prompts.spec == "b.txt"
    assert settings.bad_prompts.prefix == "P: "
    assert load(assignments=('good_prompts.system_prompt="Be kind."',)).good_prompts.system_prompt == "Be kind."
    monkeypatch.setenv("ABLITERATE_GOOD_REPORT_PROMPTS", "env.txt")
    report = load().good_report_prompts
    assert report is not None
    assert report.spec == "env.txt"


def test_a_new_spec_does_not_inherit_what_was_said_of_another(tmp_path: Path) -> None:
    config = toml(tmp_path, "[bad_prompts]\nspec = 'user/set'\nsplit = 'test[:9]'\ncolumn = 'ask'\nprefix = 'P: '\n")
    inherited = load_settings({"model": "m"}, config=config).settings.bad_prompts
    assert (inherited.spec, inherited.split, inherited.column) == ("user/set", "test[:9]", "ask")
    other = load_settings({"model": "m", "bad_prompts": "other/set"}, config=config)
    assert (other.settings.bad_prompts.split, other.settings.bad_prompts.column) == (None, None)
    assert other.settings.bad_prompts.prefix == "P: "
    assert "bad_prompts.split" not in other.sources


def test_reference_sets_are_used_for_orthogonalisation_only() -> None:
    assert not {name for name in load().prompt_sets() if "helpful" in name}
    used = load(assignments=("directions.orthogonalize_directions=true",)).prompt_sets()
    assert used["unhelpfulness_prompts"].spec == "allenai/c4:en#train[:200]/text"


def test_start_up_trials_depend_on_trials() -> None:
    assert load().asked_startup_trials is None
    assert load(startup_trials=300).asked_startup_trials == 300
    assert load(trials=400).asked_startup_trials == 60
    assert load(trials=20).asked_startup_trials == 7
    assert load(trials=20, startup_trials=20).asked_startup_trials == 20


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"trials": 0}, ["trials", "0", "command line"]),
        ({"trials": 5, "startup_trials": 6}, ["startup_trials = 6", "trials = 5"]),
        ({"seed": -1}, ["seed"]),
        ({"upload": ["ftp://x"]}, ["ftp://x"]),
        ({"upload": ["file:///"]}, ["file:///"]),
        ({"bad_prompts": ""}, ["bad_prompts"]),
    ],
)
def test_invalid_values_are_told_in_one_line(options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load(**options)
    assert caught.value.exit_code == 2
    for part in parts:
        assert part in caught.value.line


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("trails = 3", "did you mean trials?"),
        ("[search]\nspaces = 'wide'", "did you mean search.space?"),
        ("[ablation]\nrow_normalisation = 'none'", "did you mean ablation.row_normalization?"),
        ("xyzzy = 1", "config show"),
    ],
)
def test_unknown_settings_are_refused_with_the_nearest_name(tmp_path: Path, text: str, nearest: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(toml(tmp_path, text))
    assert nearest in caught.value.line
    assert caught.value.exit_code == 2


def test_unknown_names_are_refused_in_environment_and_assignments(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="searc"):
        load(assignments=("searc.space=wide",))
    with pytest.raises(UsageError, match="key=value"):
        load(assignments=("trials",))
    monkeypatch.setenv("ABLITERATE_TRAILS", "3")
    with pytest.raises(UsageError, match="ABLITERATE_TRAILS"):
        load()


def test_broken_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not valid TOML"):
        load(toml(tmp_path, "trials = ="))
    with pytest.raises(UsageError, match="no settings file"):
        load(tmp_path / "absent.toml")
    with pytest.raises(UsageError, match="model is not set"):
        load_settings({})


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_settings_are_read_as_editors_save_them(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "job.toml"
    file.write_bytes("trials = 11\nmodel = 'é'\n".encode(encoding))
    settings = load_settings({}, config=file).settings
    assert (settings.trials, settings.model) == (11, "é")


def test_settings_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_bytes(b"model = 'caf\xe9'\n")
    with pytest.raises(UsageError, match="cannot read the settings file"):
        load_settings({}, config=tmp_path / "job.toml")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().trials = 3  # type: ignore[misc]  # that it is refused is what is tested


def test_the_reference_of_settings_is_up_to_date() -> None:
    """`python -m tests.reference --write docs/settings.md` makes it so."""
    assert (Path(__file__).parents[3] / "docs/settings.md").read_text() == page()


def test_a_table_is_a_value(tmp_path: Path) -> None:
    config = tmp_path / "places.toml"
    config.write_text('[loading.device_map]\n"model.layers.0" = 0\n"" = "cpu"\n')
    assignments = ['loading.max_memory={0 = "20GiB"}']
    settings, lines = describe_settings({"model": "m"}, config=config, assignments=assignments)
    assert settings.loading.device_map == {"model.layers.0": 0, "": "cpu"}
    assert settings.loading.max_memory == {"0": "20GiB"}
    shown = next(line for line in lines if line.startswith("loading.device_map"))
    assert shown == f'loading.device_map = {{ "model.layers.0" = 0, "" = "cpu" }}  # {config}'
    assert tomllib.loads(shown)["loading"]["device_map"] == settings.loading.device_map
    for wrong in ('{0 = "much"}', '{gpu = "20GiB"}'):
        with pytest.raises(UsageError, match="max_memory"):
            load(assignments=(f"loading.max_memory={wrong}",))


def test_a_profile_stands_between_the_defaults_and_what_is_given() -> None:
    given = load_settings({"model": "m", "bad_prompts": "b.txt"}, profile="heretic", assignments=["trials=20"])
    settings = given.settings
    assert (settings.trials, settings.search.space, settings.scoring.effective_search_tokens) == (20, "field", 100)
    assert settings.bad_prompts.spec == "b.txt"
    assert settings.bad_prompts.system_prompt == "You are a helpful assistant."
    assert given.sources["search.space"] == "profile heretic"
    with pytest.raises(UsageError, match="no profile nonsense") as refused:
        load_settings({"model": "m"}, profile="nonsense")
    assert refused.value.remedy == "choose from: heretic"


# All keys that config.toml of heretic 1.4.0 may hold, with default or typical values.
OTHERS = """
model = "someone/model"
model_commit = "0123abc"
evaluate_model = "someone/other"
collect_reproducibles = "archive"
reproduce = "reproduce.json"
dtypes = ["auto", "float16", "bfloat16", "float32"]
quantization = "bnb_4bit"
device_map = "auto"
max_memory = { "0" = "20GB", "cpu" = "64GB" }
offload_outputs_to_cpu = true
batch_size = 0
max_batch_size = 128
max_response_length = 80
response_prefix = "<think></think>"
chain_of_thought_skips = [["<think>", "<think></think>"]]
print_responses = false
print_residual_geometry = false
plot_residuals = false
residual_plot_path = "plots"
residual_plot_title = "Residuals"
residual_plot_style = "dark_background"
kl_divergence_scale = 1.0
kl_divergence_target = 0.01
orthogonalize_direction = true
row_normalization = "none"
full_normalization_lora_rank = 3
winsorization_quantile = 0.95
n_trials = 100
n_startup_trials = 30
seed = 7
study_checkpoint_dir = "checkpoints"
refusal_markers = ["sorry"]
system_prompt = "You are a helpful assistant."
export_strategy = "merge"
max_shard_size = "5GB"

[[benchmarks]]
task = "gsm8k"
name = "GSM8K"
description = "Grade school mathematics"

[good_prompts]
dataset = "someone/good"
split = "train[:40]"
column = "text"
residual_plot_label = "good"
residual_plot_color = "royalblue"

[bad_evaluation_prompts]
dataset = "someone/bad"
commit = "4567def"
split = "test[:10]"
column = "text"
system_prompt = "You are a cook."
"""


def test_a_file_of_heretic_loads_whole(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(OTHERS)
    loaded = load_settings({}, config=config)
    settings = loaded.settings
    assert (settings.model, settings.trials, settings.startup_trials, settings.seed) == (
        "someone/model@0123abc",
        100,
        30,
        7,
    )
    assert (settings.loading.quantization, settings.loading.device_map) == ("bnb-4bit", "auto")
    assert settings.loading.max_memory == {"0": "20GB", "cpu": "64GB"}
    assert (settings.scoring.answer_tokens, settings.export_format) == (80, "merged")
    assert settings.good_prompts.system_prompt == settings.bad_prompts.system_prompt == "You are a helpful assistant."
    assert settings.bad_eval_prompts.system_prompt == "You are a cook."
    assert (settings.bad_eval_prompts.spec, settings.bad_eval_prompts.revision) == ("someone/bad", "4567def")
    assert settings.bad_prompts.spec == default_values()["bad_prompts"]
    assert any(note.startswith("benchmarks is no longer needed") for note in loaded.notes)
