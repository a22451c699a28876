"""Means and deviations of the tables, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from transclip_fast.protocols.table import markdown, summarise


@pytest.fixture
def rows():
    """Two data sets, one head, one number of shots, three seeds."""
    draw = np.random.default_rng(0)
    return [
        {
            "data": data,
            "head": "taskres",
            "shots": 4,
            "seed": seed,
            "zero_shot_accuracy": 70.0,
            "head_accuracy": float(draw.uniform(50, 90)),
            "accuracy": float(draw.uniform(50, 90)),
        }
        for data in ("pets", "dtd")
        for seed in range(3)
    ]


def test_mean_deviation_and_average(rows):
    pets, dtd, average = summarise(rows)
    values = np.array([row["accuracy"] for row in rows]).reshape(2, 3)
    assert [row["data"] for row in (pets, dtd, average)] == ["pets", "dtd", "(average)"]
    for row, of_row in ((pets, values[0]), (dtd, values[1]), (average, values.mean(0))):
        assert row["accuracy"] == pytest.approx(of_row.mean(), abs=1e-4)
        assert row["accuracy_std"] == pytest.approx(of_row.std(ddof=1), abs=1e-4)
        assert (row["seeds"], row["zero_shot_accuracy_std"]) == (3, 0.0)


def test_one_seed_has_no_deviation(rows):
    (pets,) = summarise(rows[:1])
    assert pets["accuracy_std"] is None
    assert f"| {pets['accuracy']:.2f} |" in markdown([pets])


def test_a_method_without_head(rows):
    table = summarise([{**row, "head_accuracy": None} for row in rows])
    assert {row["head_accuracy"] for row in table} == {None}
    assert "|  |" in markdown(table)


def test_markdown(rows):
    lines = markdown(summarise(rows)).splitlines()
    assert lines[0] == "| data | head | shots | seeds | zero-shot | head alone | TransCLIP |"
    assert lines[1] == "|---|---|---|---|---|---|---|"
    assert lines[2].startswith("| pets | taskres | 4 | 3 | 70.00 ± 0.00 | ")
    assert len(lines) == 5


def test_harmonic_means_of_base_and_new(rows):
    draw = np.random.default_rng(1)
    halves = [
        {**row, "classes": classes, "accuracy": float(draw.uniform(20, 90))}
        for row in rows
        for classes in ("base", "new")
    ]
    found = {(row["data"], row["classes"]): row for row in summarise(halves)}
    assert list(found) == [
        (data, classes)
        for data in ("pets", "dtd", "(average)")
        for classes in ("base", "new", "harmonic mean")
    ]
    values = np.array([row["accuracy"] for row in halves]).reshape(2, 3, 2)  # data, seed, half
    for data, of_data in (("pets", values[0]), ("dtd", values[1]), ("(average)", values.mean(0))):
        a, b = of_data.mean(0)
        row = found[data, "harmonic mean"]
        assert row["accuracy"] == pytest.approx(2 / (1 / a + 1 / b), abs=1e-4)
        seeds = 2 / (1 / of_data).sum(1)
        assert row["accuracy_std"] == pytest.approx(seeds.std(ddof=1), abs=1e-4)
        assert row["zero_shot_accuracy"] == 70.0
        assert found[data, "new"]["accuracy"] == pytest.approx(b, abs=1e-4)
    assert "| pets | harmonic mean | taskres | 4 | 3 | 70.00 ± 0.00 | " in markdown(
        summarise(halves)
    )


def test_nothing_right_has_a_harmonic_mean_of_nothing(rows):
    none = [
        {**rows[0], "classes": classes, "accuracy": 0.0, "head_accuracy": None}
        for classes in ("base", "new")
    ]
    row = summarise(none)[-1]
    assert (row["classes"], row["accuracy"], row["head_accuracy"]) == ("harmonic mean", 0.0, None)
