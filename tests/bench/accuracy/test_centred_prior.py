"""The centred text prediction is what its name says, and what is recorded of it."""

import numpy as np
import pytest

from bench import wild_tables
from bench.accuracy import centred_prior
from bench.accuracy.wild_problems import Pool
from bench.accuracy.wild_scenarios import Scenario, sample


def by_hand(features, prototypes, unit):
    """Products of centred rows, one by one."""
    rows = [row - features.sum(0) / len(features) for row in features]
    texts = [text - prototypes.sum(0) / len(prototypes) for text in prototypes]

    def product(row, text):
        return row @ text / (np.linalg.norm(row) * np.linalg.norm(text) if unit else 1)

    return np.array([[product(row, text) for text in texts] for row in rows])


def test_products_of_centred_rows(problem):
    features, prototypes, _ = (np.asarray(x, float) for x in problem(n=21, k=5, d=7))
    for prior, unit in ((centred_prior.centred, False), (centred_prior.centred_unit, True)):
        found = prior(features, prototypes)
        assert found == pytest.approx(by_hand(features, prototypes, unit), abs=1e-12)
    # Of the logits without unit rows, only the mean over the images is taken away.
    rest = centred_prior.plain(features, prototypes)
    rest = rest - rest.mean(0) - centred_prior.centred(features, prototypes)
    assert rest == pytest.approx(np.broadcast_to(rest[:, :1], rest.shape), abs=1e-12)


def test_a_line_a_scenario(problem, monkeypatch, tmp_path):
    features, prototypes, labels = problem(n=90, k=5)
    pools = [Pool("made", features, prototypes, labels)]
    monkeypatch.setattr(centred_prior, "SCENARIOS", {"all": Scenario(sample(), lambda: pools, 2)})
    rows = []
    monkeypatch.setattr(centred_prior, "record", lambda name, row: rows.append((name, row)))
    assert centred_prior.main([], say=lambda _: None) == 0
    ((name, row),) = rows
    assert (name, row["scenario"], row["pool"]) == ("centred_prior", "all", ["made", "made"])
    zero_shot = 100 * ((features @ prototypes.T).argmax(1) == labels).mean()
    assert row["accuracy"]["as it is: zero-shot"] == pytest.approx([zero_shot] * 2)
    assert "python -m bench.accuracy.centred_prior" in wild_tables.centred_prior(tmp_path)
