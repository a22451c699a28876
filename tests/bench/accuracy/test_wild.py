"""The problems of `bench.accuracy.wild` are what their names say, and its tables what it found."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest

from bench import wild_tables
from bench.accuracy import wild, wild_problems
from bench.accuracy import wild_scenarios as scenarios
from bench.common import record

SIZES = [90, 80, 70, 60, 50, 40, 30, 20, 10, 5]


@pytest.fixture
def labels():
    """Ten classes, at the odd places of a list of 21."""
    return np.random.default_rng(0).permutation(np.repeat(np.arange(1, 21, 2), SIZES))


@pytest.fixture
def golden(golden_dir, monkeypatch):
    monkeypatch.setenv("TRANSCLIP_GOLDEN", str(golden_dir))


def draws(rule, labels, number=20):
    for seed in range(number):
        found = rule(labels, 21, np.random.default_rng(seed))
        assert len(set(found.rows)) == len(found.rows)
        yield found, np.bincount(labels[found.rows], minlength=21)


@pytest.mark.parametrize(("low", "high"), [(1, 1), (1, 4), (2, 10), (5, 25)])
def test_few_classes_in_a_batch(low, high, labels):
    numbers = set()
    for draw, sizes in draws(scenarios.of_classes(low, high, 64), labels):
        numbers.add(np.count_nonzero(sizes))
        assert len(draw.rows) <= 64
        assert len(draw.names) == 21
    assert low - 1 <= min(numbers)  # a class of five rows may be missed
    assert max(numbers) <= min(high, 10)
    assert len(numbers) > 1 or high == 1


def test_few_classes_with_all_rows(labels):
    for _, sizes in draws(scenarios.of_classes(2, 5), labels):
        present = np.flatnonzero(sizes)
        assert 2 <= len(present) <= 5
        assert (sizes[present] == np.array(SIZES)[present // 2]).all()


def test_half_the_classes(labels):
    assert all(np.count_nonzero(sizes) == 5 for _, sizes in draws(scenarios.half, labels))


def test_a_sample(labels):
    assert all(len(draw.rows) == 64 for draw, _ in draws(scenarios.sample(64), labels))
    every = scenarios.sample()(labels, 21, np.random.default_rng(0))
    assert every.rows.tolist() == list(range(len(labels)))


def test_sizes_of_a_dirichlet_distribution(labels):
    largest = []
    for _, sizes in draws(scenarios.dirichlet, labels):
        kept = sizes[1::2] / SIZES
        assert kept.max() == 1
        largest.append(kept.max() / kept.sum())
    assert 0.3 < np.mean(largest) < 0.8  # 0.2 leaves three classes in ten the most of it


def test_a_long_tail(labels):
    expected = sorted(50 ** -np.linspace(0, 1, 10))
    for _, sizes in draws(scenarios.long_tail, labels):
        error = np.abs(np.sort(sizes[1::2] / SIZES) - expected)
        assert error.max() <= 0.5 / min(SIZES)


def test_missing_names(labels):
    for draw, sizes in draws(scenarios.out_of_list, labels):
        missing = np.setdiff1d(np.arange(21), draw.names)
        assert len(missing) == 3
        assert (sizes[missing] > 0).all()
        assert len(draw.rows) == len(labels)


def test_a_row_without_a_name_is_not_scored():
    pool = wild_problems.Pool("x", np.eye(3), np.arange(8).reshape(4, 2), np.array([0, 1, 3]))
    found = wild.drawn(pool, scenarios.Draw(np.array([1, 2]), np.array([0, 3])))
    assert found.labels.tolist() == [-1, 1]
    assert found.prototypes.tolist() == [[0, 1], [6, 7]]
    assert found.features.tolist() == [[0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("accuracy", wild_problems.MADE_ACCURACIES)
def test_made_text_has_the_accuracy_wanted(accuracy, golden):
    pool = wild_problems.made_text(wild_problems.with_means("dtd"), accuracy, seed=1)
    found, confidence = wild_problems.zero_shot(pool)
    assert found == pytest.approx(accuracy, abs=0.005)
    assert confidence == pytest.approx(accuracy, abs=0.02)
    np.testing.assert_allclose(np.linalg.norm(pool.prototypes, axis=1), 1, atol=1e-6)


def test_the_long_list(golden):
    for pool in wild_problems.long_lists():
        assert len(pool.prototypes) == 184
        assert len(pool.features) > scenarios.ROWS
    (together,) = wild_problems.all_sets()
    assert np.unique(together.labels).tolist() == list(range(184))
    own, listed = wild_problems.own_lists()[1], wild_problems.long_lists()[1]
    np.testing.assert_array_equal(own.prototypes[own.labels], listed.prototypes[listed.labels])


def test_every_scenario_draws_something_to_score(golden):
    for family, rules in scenarios.SCENARIOS.items():
        for name, scenario in rules.items():
            pools = list(wild.problems(name, scenario))
            assert len(pools) == scenario.draws * len(scenario.pools()), (family, name)
            assert min((pool.labels >= 0).sum() for pool in pools) >= 9, (family, name)


def test_the_same_draws_in_every_run(golden):
    scenario = scenarios.SCENARIOS[scenarios.FEW]["64 rows at random"]
    runs = [[pool.labels.tolist() for pool in wild.problems("x", scenario)] for _ in range(2)]
    assert runs[0] == runs[1]
    assert len({str(x) for x in runs[0]}) == len(runs[0])


@pytest.mark.parametrize("law", scenarios.LAWS)
def test_made_problems(law):
    problem = wild_problems.made(3000, 100, 5, law, seed=0)
    sizes = np.bincount(problem.labels, minlength=100)
    assert problem.features.shape == (3000, wild_problems.DIM)
    assert problem.prototypes.shape == (100, wild_problems.DIM)
    assert np.count_nonzero(sizes) == 5


def test_measured_recorded_and_printed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(wild, "record", partial(record, folder=tmp_path))
    monkeypatch.setattr(wild, "SCENARIOS", {})
    monkeypatch.setattr(wild, "MADE_DRAWS", {300: 2})
    monkeypatch.setattr(wild, "MADE", {"3 of 12": (12, 3, "power law")})
    assert wild.main([]) == 0
    row = json.loads((tmp_path / "wild.jsonl").read_text())
    assert row["family"] == "Made problems, 300 rows"
    assert row["queries"] == [300, 300]
    assert row["present"] == [3, 3]
    assert row["charged"] == [x < 0.8 * 12 for x in row["effective_classes"]]
    assert all(1 <= x <= 12 for x in row["effective_classes"])
    assert row["accuracy"].keys() == {"zero_shot", *wild_tables.METHODS}
    assert "3 of 12" in capsys.readouterr().out


def line(family, scenario, **accuracy):
    machine = {"cpu": "a CPU", "cores": 2, "memory_gb": 8.0, "gpu": None, "python": "3.11"}
    machine |= {"torch": "2.15", "commit": "abcdef123456", "dirty": False}
    row = {"date": "2026-01-01", "command": "x", "machine": machine, "pool": ["a", "b"]}
    return json.dumps({**row, "family": family, "scenario": scenario, "accuracy": accuracy})


def test_tables(tmp_path):
    assert wild_tables.families(tmp_path) == wild_tables.scenarios(tmp_path) == wild_tables.NOTHING
    shares = {"default": [55.0, 61.0], "class_cost": [55.0, 61.0]}
    first = {"zero_shot": [50.0, 60.0], "published": [40.0, 59.5], "stata": [51, 60], **shares}
    second = {"zero_shot": [70.0, 70.0], "published": [70.0, 70.0], **shares}
    made = scenarios.made_family(20_000)
    lines = [
        line(made, "20 of 1,000 classes, power law", **second),
        line(scenarios.FEW, "half the classes", **second, stata=[70.0, 71.0]),
        line(scenarios.FEW, "1 class, 64 rows", **first),
        line(scenarios.FEW, "no longer a scenario", **first),
    ]
    (tmp_path / "wild.jsonl").write_text("\n".join(lines))
    found = wild_tables.scenarios(tmp_path).splitlines()
    assert found[0] == wild_tables.TEXT
    head, _, one, half, mean = found[2:7]
    assert head.startswith(f"| {scenarios.FEW} | zero-shot | published method | default |")
    assert one.startswith("| 1 class, 64 rows | 55.0 | -5.2 | +3.0 | +3.0 | +0.5 | 50 %, -10.0 |")
    assert half.startswith("| half the classes | 70.0 | +0.0 | -12.0 | -12.0 | +0.5 |")
    assert mean.startswith("| **mean** | **62.5** | **-2.6** | **-4.5** |")
    assert "| 20 of 1,000 classes, power law | 70.0 | +0.0 | -12.0 | -12.0 |  |" in "\n".join(found)
    by_family = wild_tables.families(tmp_path)
    assert f"| {scenarios.FEW} | 4 | 62.5 | -2.6 | -4.5 | +0.5 | 25 %, -10.0 |" in by_family
    assert f"| {made} | 2 | 70.0 |" in by_family


def test_each_set_has_its_mean(tmp_path):
    def row(scenario, pool, zero_shot, default, published):
        accuracy = {"zero_shot": zero_shot, "default": default, "published": published}
        return {"scenario": scenario, "pool": pool, "accuracy": accuracy}

    pools = ["dtd", "whurs19 rn50", "dtd"]
    rows = [
        row("long tail", pools, [10, 90, 30], [20, 95, 50], [1, 2, 4]),
        row("all", ["dtd"], [44], [42.5], [10]),
    ]
    assert wild_tables.of_pool(rows[:1], "dtd") == "20.0 → 35.0 (2.5)"
    assert wild_tables.of_pool(rows, "dtd") == "28.0 → 37.5 (5.0)"
    assert wild_tables.of_pool(rows, "caltech101") == ""
    assert "python -m bench.accuracy.wild" in wild_tables.sets(tmp_path)
