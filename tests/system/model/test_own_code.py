"""A model that needs its own code is refused, unless that code is trusted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers import abliterate, job_arguments, only_job

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

open(__file__ + ".ran", "w").close()
print("soup of the day")


class KitchenConfig(LlamaConfig):
    model_type = "kitchen"


class KitchenForCausalLM(LlamaForCausalLM):
    config_class = KitchenConfig
"""
MAP = {"AutoConfig": "modeling_kitchen.KitchenConfig", "AutoModelForCausalLM": "modeling_kitchen.KitchenForCausalLM"}


@pytest.mark.slow
def test_a_models_own_code_is_run_only_where_it_is_trusted(organism: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(organism / "model", model)
    described = json.loads((model / "config.json").read_text())
    described |= {"model_type": "kitchen", "architectures": ["KitchenForCausalLM"], "auto_map": MAP}
    (model / "config.json").write_text(json.dumps(described))
    (model / "modeling_kitchen.py").write_text(CODE)
    home = {"HF_HOME": str(tmp_path / "home")}
    arguments = ["run", model, *job_arguments(organism)[1:], "--workspace", tmp_path / "runs", "--trials", 2]
    refused = abliterate(*arguments, **home)
    assert refused.code == 3
    assert "loading.trust_remote_code=true" in refused.err
    assert not list(tmp_path.rglob("*.ran"))
    assert abliterate("inspect", model, **home).code == 3
    inspected = abliterate("inspect", model, "--json", "--trust-remote-code", **home).check()
    assert json.loads(inspected.out)["model_type"] == "kitchen"
    checked = abliterate("preflight", *arguments[1:], "--set", "loading.trust_remote_code=true", "--json", **home)
    assert json.loads(checked.check().out)["ok"]
    ended = abliterate(*arguments, "--set", "loading.trust_remote_code=true", **home).check()
    assert "responses match" in ended.err
    assert list(tmp_path.rglob("*.ran"))
    export = only_job(tmp_path / "runs") / "export"
    assert (export / "modeling_kitchen.py").read_text() == CODE
    assert json.loads((export / "config.json").read_text())["auto_map"] == MAP
