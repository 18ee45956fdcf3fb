"""Templates and job files against the platforms' own packages, where those are installed.

None is a dependency: install vastai, skypilot, dstack, kubernetes-validate and pytest into a separate virtual
environment, and run this file there with `pytest --noconftest tests/unit/cloud/test_schemas.py`.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
INFRA = Path(__file__).parents[3] / "infra"


def data(name: str) -> Any:
    text = (INFRA / name).read_text("utf-8")
    return json.loads(text) if name.endswith("json") else yaml.safe_load(text)


def test_vast_knows_every_field_of_the_template() -> None:
    offers = pytest.importorskip("vastai.api.offers")
    source = inspect.getsource(offers.create_template)
    # args_str is documented for templates, but this client does not offer it.
    for field in data("vast/template.json").keys() - {"args_str"}:
        assert f'"{field}":' in source, field


def test_vast_knows_the_fields_that_offers_are_filtered_by() -> None:
    query = pytest.importorskip("vastai.api.query")
    assert data("vast/template.json")["extra_filters"].keys() <= query.offers_fields


def test_skypilot_reads_the_task() -> None:
    sky = pytest.importorskip("sky")
    task = sky.Task.from_yaml(str(INFRA / "skypilot.yaml"))
    resources = list(task.resources)
    assert all(resource.use_spot for resource in resources)
    assert {resource.job_recovery["max_restarts_on_errors"] for resource in resources} == {0}
    assert {tuple(resource.job_recovery["recover_on_exit_codes"]) for resource in resources} == {(75,)}


def test_dstack_reads_the_task() -> None:
    configurations = pytest.importorskip("dstack._internal.core.models.configurations")
    task = configurations.parse_run_configuration(data("dstack.yml"))
    assert task.type == "task"
    assert task.retry.duration == 24 * 3600


def test_kubernetes_accepts_the_objects() -> None:
    validator = pytest.importorskip("kubernetes_validate")
    for document in yaml.safe_load_all((INFRA / "kubernetes" / "job.yaml").read_text("utf-8")):
        validator.validate(document, "1.34", strict=True)
