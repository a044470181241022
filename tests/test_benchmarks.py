import importlib
from dataclasses import asdict

import pytest
from test_environment import ROOT

from benchmarks.__main__ import PARTS, render
from benchmarks.measure import Row, interleaved, ratio, spread


@pytest.mark.parametrize("part", PARTS)
def test_every_part_can_be_imported_and_has_rows(part):
    assert callable(importlib.import_module(f"benchmarks.{part}").rows)


def test_no_part_is_forgotten():
    modules = (ROOT / "benchmarks").glob("*.py")
    assert {path.stem for path in modules if "\ndef rows(" in path.read_text()} == set(PARTS)


def test_functions_are_timed_in_turn_after_a_warm_up():
    called = []
    times = interleaved({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, repeats=2)
    assert called == list("ababab")
    assert [len(found) for found in times.values()] == [2, 2]


def test_a_ratio_is_that_of_medians_with_the_quartiles_of_its_repeats():
    assert ratio([2.0, 4.0, 6.0], [1.0, 2.0, 2.0]) == (2.0, 2.0, 3.0)
    assert spread((2.0, 1.234, 3.0)) == "2.00 (1.23–3.00)"


def test_results_name_machine_date_and_what_was_missed():
    rows = [Row("a step", "a peer", "0.9", "≥ 1", False, "noisy"), Row("memory", "", "2 GiB")]
    part = {"title": "Parts", "date": "2026-01-02", "machine": {"cores": "2"}, "versions": {"torch": "3"}}
    text = render({PARTS[0]: {**part, "rows": [asdict(row) for row in rows]}})
    assert "2026-01-02. cores 2; torch 3." in text
    assert "| a step | a peer | 0.9 | ≥ 1 | **no** |" in text
    assert "- a step: noisy" in text
