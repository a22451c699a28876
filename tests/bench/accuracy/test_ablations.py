"""The ablations are what their names say, against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest

from bench.accuracy.ablations import VARIANTS, measure, summary
from tests import reference
from tests.agreement import assert_agrees, zero_shot_log_prior
from transclip_fast import TransCLIP
from transclip_fast.graph.build import build_graph


@pytest.mark.parametrize("name", ["no graph", "paper: W z", "paper: all three", "1 sweep a step"])
def test_against_the_reference(name, problem):
    features, prototypes, _ = problem()
    rows, log_y = features.astype(float), zero_shot_log_prior(features, prototypes)
    parameters, edges = VARIANTS[name]
    model = TransCLIP(device="cpu", **parameters)
    model.fit(features, prototypes, graph=edges(build_graph(features)))
    given = {"graph": np.zeros((77, 77))} if name == "no graph" else {}
    if name.startswith("paper"):
        # sum_j w_ij z_j over the three nearest, of which the directed form takes a third
        given = {"graph": 3 * reference.knn_weights(rows, rows, 3, True, True)}
    run = reference.solve(rows, log_y, parameters=reference.Parameters(**parameters), **given)
    assert_agrees(model, run)


def test_table(problem):
    features, prototypes, labels = problem()
    rows = measure(features, prototypes, labels)
    assert rows.keys() == {"zero-shot", *VARIANTS}
    assert rows["default"]["changed"] == 0
    correct = (features @ prototypes.T).argmax(1) == labels
    assert rows["zero-shot"]["accuracy"] == pytest.approx(100 * correct.mean())
    lines = summary({"a": rows, "b": rows}).splitlines()
    assert lines[0] == "|  | a | b | mean |"
    assert len(lines) == 2 + len(rows)
    value = f"{rows['no graph']['accuracy']:.2f}"
    assert f"| no graph | {value} | {value} | {value} |" in lines
