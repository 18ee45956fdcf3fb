"""Needs and offers, against simulated platforms."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest

from job.cli.cloud_requirements import PLANNED_LINE, need_of_cards, need_of_survey
from job.cloud.api import CloudError
from job.cloud.credentials import open_market
from job.cloud.launching import find_offers
from job.cloud.provider import Terms
from job.errors import UsageError
from job.preflight.gpu_table import MIN_CUDA, cards, offers_query
from tests.fakes.cloud import RunPodServer, VastServer
from tests.fakes.cloud.helpers import QUICK, command, env_of, need, survey


def test_the_need_follows_preflight(tmp_path: Path) -> None:
    found = need_of_survey(survey(tmp_path))
    assert (found.gpu, found.count, found.disk_gb, found.vast_name) == ("RTX4090", 4, 300, "RTX_4090")
    assert found.work_hours == pytest.approx(2.5)
    assert found.download_gb == pytest.approx(3600 * PLANNED_LINE / 1e9)
    assert found.upload_gb == pytest.approx(2 * found.download_gb)
    without = need_of_survey(survey(tmp_path, hours=None))
    assert without.work_hours is None


@pytest.mark.parametrize("name", [card.name for card in cards()])
def test_every_card_comes_back_from_its_query(tmp_path: Path, name: str) -> None:
    card = next(card for card in cards() if card.name == name)
    found = need_of_survey(survey(tmp_path, offers=offers_query(card, 2, 10**11)))
    assert found == need_of_cards(f"2x{name}", 100).model_copy(
        update={key: getattr(found, key) for key in ("work_hours", "download_gb", "upload_gb")}
    )


def test_a_survey_that_is_none(tmp_path: Path) -> None:
    from job.preflight.checks import Check

    file = survey(tmp_path, offers=None)
    for wrong in (file, tmp_path / "missing.json"):
        with pytest.raises(UsageError):
            need_of_survey(wrong)
    for text in ("", "[]", "{", '{"offers": "vastai search offers"}', '{"offers": "x gpu_name=ABACUS gpu_ram>=1"}'):
        file.write_text(text)
        with pytest.raises(UsageError):
            need_of_survey(file)
    failed = Check(name="gpu.memory", status="fail", measured="no", needed="a plan")
    with pytest.raises(UsageError, match=r"cannot run there: gpu\.memory"):
        need_of_survey(survey(tmp_path, checks=(failed,)))


def test_the_constants_agree_with_what_they_stand_for() -> None:
    from job.preflight.planning import LINE

    assert PLANNED_LINE == LINE
    constraints = (Path(__file__).parents[3] / "constraints.txt").read_text()
    runtime = re.search(r"^nvidia-cuda-runtime==(\d+\.\d+)", constraints, re.MULTILINE)
    assert runtime is not None
    assert runtime[1] == MIN_CUDA


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_survey_is_read_as_a_shell_has_written_it(tmp_path: Path, encoding: str) -> None:
    plain = survey(tmp_path)
    written = tmp_path / "by-powershell.json"
    written.write_bytes(plain.read_text().encode(encoding))
    assert need_of_survey(written) == need_of_survey(plain)


def test_offers_are_filtered_and_the_cheapest_job_comes_first(vast: VastServer, tmp_path: Path) -> None:
    vast.add_ask(1, dph_total=1.0, inet_down=120.0)  # the lowest hourly price, on a slow line
    vast.add_ask(2, dph_total=1.2, inet_down=2000.0, inet_up=2000.0)
    for number, wrong in enumerate(
        (
            {"num_gpus": 1}, {"gpu_ram": 16000}, {"disk_space": 100}, {"cuda_max_good": 12.4}, {"reliability": 0.5},
            {"verified": False}, {"rented": True}, {"inet_down": 20.0}, {"gpu_name": "RTX 3090"}, {"dph_total": 9.0},
        ),
        start=10,
    ):  # fmt: skip
        vast.add_ask(number, **wrong)
    result = command(vast, tmp_path, "offers", "--preflight", survey(tmp_path), "--max-price", "2").check()
    lines = result.out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["2", "1"]
    assert "4xRTX4090" in lines[0]
    assert "job about $" in lines[0]


def test_the_price_of_a_job_counts_time_and_traffic(vast: VastServer, tmp_path: Path) -> None:
    vast.add_ask(1, dph_total=2.0, inet_down=800.0, inet_up=400.0, inet_down_cost=0.01, inet_up_cost=0.02)
    market = open_market("vast", print, env=env_of(vast), patience=QUICK)
    (offer,) = find_offers(market, [need(work_hours=3.0, download_gb=60.0, upload_gb=60.0)], Terms())
    hours = 3 + (60 * 8000 / (0.6 * 800) + 60 * 8000 / (0.6 * 400)) / 3600
    assert offer.hours == pytest.approx(hours)
    assert offer.job_dollars == pytest.approx(2 * hours + 60 * 0.03)
    (unknown,) = find_offers(market, [need()], Terms())
    assert (unknown.hours, unknown.job_dollars) == (None, None)


def test_several_machines_are_weighed_against_each_other(vast: VastServer) -> None:
    vast.add_ask(1, dph_total=1.6)
    vast.add_ask(2, gpu_name="H200", num_gpus=1, gpu_ram=143771, dph_total=2.5)
    market = open_market("vast", print, env=env_of(vast), patience=QUICK)
    needs = [need(work_hours=8.0), need("1xH200", work_hours=2.0)]
    assert [offer.id for offer in find_offers(market, needs, Terms())] == ["2", "1"]


def test_waiting_for_an_offer(vast: VastServer, tmp_path: Path) -> None:
    threading.Timer(1.5, lambda: vast.add_ask(5)).start()
    result = command(vast, tmp_path, "offers", "--on", "4xRTX4090", "--wait", "0.5", "--every", "0.2").check()
    assert result.out.startswith("5:")
    assert "asking again" in result.err
    vast.asks.clear()
    nothing = command(vast, tmp_path, "offers", "--on", "4xRTX4090")
    assert nothing.code == 76
    assert "no machine is offered" in nothing.err


def test_what_offers_refuses(vast: VastServer, tmp_path: Path) -> None:
    command(vast, tmp_path, "offers").fails(2, "no machine is specified")
    command(vast, tmp_path, "offers", "--on", "4xABACUS").fails(2, "unknown GPU")
    command(vast, tmp_path, "offers", "--on", "H200", VAST_API_KEY="").fails(2, "no key for Vast.ai", "VAST_API_KEY")
    command(vast, tmp_path, "offers", "--on", "H200", VAST_API_KEY="wrong-key-12345").fails(2, "401", "VAST_API_KEY")
    command(vast, tmp_path, "offers", "--on", "H200", VAST_URL="http://example.org").fails(2, "https")


def test_a_used_up_quota_is_not_waited_for(vast: VastServer, tmp_path: Path) -> None:
    rule = vast.fail("POST", status=429, message="search_quota_exceeded", headers={"Retry-After": "0"})
    market = open_market("vast", print, env=env_of(vast), patience=QUICK)
    with pytest.raises(CloudError, match="429"):
        find_offers(market, [need()], Terms())
    assert rule.hits == 1


def test_runpods_catalogue(runpod: RunPodServer, tmp_path: Path) -> None:
    result = command(runpod, tmp_path, "offers", "--on", "4xRTX4090", "--unverified").check()
    community, secure = result.out.splitlines()
    assert community.startswith("COMMUNITY/NVIDIA GeForce RTX 4090: 4xRTX4090, $1.360 an hour")
    assert "$2.760 an hour" in secure
    assert "stock high" in secure
    assert command(runpod, tmp_path, "offers", "--on", "1xA100-80").check().out.count("\n") == 1
    # Not in stock; more cards than a machine has; another size of the card; too expensive.
    for on, more in (("1xH200", ()), ("16xRTX4090", ()), ("1xA100-40", ()), ("4xRTX4090", ("--max-price", "2"))):
        assert command(runpod, tmp_path, "offers", "--on", on, *more).code == 76
    command(runpod, tmp_path, "offers", "--on", "1xRTX4090", "--bid", "0.2").fails(76, "no interruptible machines")
