"""The model of docs/scale.md: laws that a pipeline obeys, and tables that are the script's."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale", ROOT / "benchmarks/scale.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale"] = module
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_page_are_those_of_the_script(scale: ModuleType) -> None:
    page = (ROOT / "docs/scale.md").read_text()
    for title, table in scale.TABLES.items():
        found = re.search(rf"<!-- {title} -->\n(.*?)\n?<!-- /{title} -->", page, re.DOTALL)
        assert found, title
        assert found[1] == table(), f"paste the output of benchmarks/scale.py: {title}"


def test_a_line_that_does_not_vary_has_the_rate_of_its_slowest_stage(scale: ModuleType) -> None:
    capacities = {"a": 500.0, "b": 200.0, "c": 300.0}
    for queue in (0, 1, 5):
        rate = scale.line(capacities, dict.fromkeys(capacities, 0.0), batches=200, queue=queue)
        assert rate == pytest.approx(200, rel=1e-9)


def test_variation_costs_and_queues_give_some_of_it_back(scale: ModuleType) -> None:
    capacities = {"a": 200.0, "b": 200.0, "c": 200.0}
    variation = dict.fromkeys(capacities, 0.5)
    rates = [scale.line(capacities, variation, queue=queue) for queue in (0, 1, 4, 64)]
    assert rates == sorted(rates)
    assert rates[0] < 0.85 * 200
    assert 0.95 * 200 < rates[-1] < 1.02 * 200
    assert scale.line(capacities, variation, seed=1) != scale.line(capacities, variation)
    assert scale.line(capacities, variation) == scale.line(capacities, variation)


def test_two_exponential_like_stages_without_a_queue(scale: ModuleType) -> None:
    # Two stages in a line without places between them keep 2/3 of their rate when times are
    # exponential (Hunt 1956); log-normal ones of the same variation lose about as much.
    capacities = {"a": 100.0, "b": 100.0}
    rate = scale.line(capacities, {"a": 1.0, "b": 1.0}, batches=20_000, queue=0)
    assert rate / 100 == pytest.approx(2 / 3, abs=0.06)


def test_a_campaign_without_failures(scale: ModuleType) -> None:
    made = scale.campaign(1e6, 4, 100.0, mtbf=1e15, spread=0.0)
    assert made.seconds == pytest.approx(scale.RESTART + 1e6 / 400)
    assert made.machine_seconds == pytest.approx(4 * made.seconds)
    assert (made.redone, made.failures) == (0, 0)


def test_failures_lose_half_a_part_each(scale: ModuleType) -> None:
    images, rate, mtbf = 5e8, 1000.0, 2e4
    made = scale.campaign(images, 8, rate, mtbf=mtbf, spread=0.0)
    expected = images / rate / mtbf
    assert made.failures == pytest.approx(expected, rel=0.15)
    assert made.redone * images / made.failures == pytest.approx(scale.PART / 2, rel=0.1)
    least = scale.RESTART + images / (8 * rate)
    assert least < made.seconds < 1.2 * least


def test_capacities_say_what_the_bottleneck_is(scale: ModuleType) -> None:
    for machine in scale.MACHINES:
        capacities = machine.capacities()
        rate = scale.line(capacities, scale.VARIATION)
        assert 0.9 * min(capacities.values()) < rate < 1.01 * min(capacities.values())
        assert machine.bottleneck == ("decode" if machine.gpus else "processor")


def test_words(scale: ModuleType) -> None:
    seconds = (30, 100, 5400, 2e5, 1e8)
    assert [scale.duration(value) for value in seconds] == [
        "30 s", "1.7 min", "1.5 h", "2.3 days", "3.2 years",
    ]  # fmt: skip
    assert [scale.dollars(x) for x in (0.001, 2.5, 12345.6)] == ["under $0.01", "$2.50", "$12,346"]
