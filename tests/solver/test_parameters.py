"""Parameters as numpy's scalars, which a search over arrays of values gives."""

from __future__ import annotations

import numpy as np
import pytest

from transclip_fast import InputError, TransCLIP
from transclip_fast.solver.parameters import Parameters
from transclip_fast.store.checkpoint import FileCheckpoint

SCALARS = {
    "n_neighbors": np.int64(2),
    "max_iter": np.uint8(3),
    "inner_iter": np.int32(2),
    "tol": np.float32(0.0),
    "logit_scale": np.float64(50.0),
    "kl_weight": np.float32(0.5),
    "likelihood_weight": np.float64(0.25),
    "unit_means": np.bool_(True),
    "update_variance": np.False_,
    "clamp_similarity": np.True_,
    "class_cost": np.True_,
    "candidates": np.int64(6),
    "rank": np.int16(6),
    "memory": np.int64(8 << 30),
}


def test_scalars_of_numpy_are_python_s_in_a_solve(problem, tmp_path):
    features, prototypes, _ = problem()
    given, kept = TransCLIP(device="cpu", **SCALARS), []
    plain = TransCLIP(device="cpu", **{name: value.item() for name, value in SCALARS.items()})

    def checkpoint(name, identity):
        kept.append(FileCheckpoint(tmp_path / "out", name, identity, 0.0).identity)
        return FileCheckpoint(tmp_path / "out", name, identity, 1e9)

    for model in (given, plain):
        model.fit(features, text_features=prototypes, checkpoint=checkpoint)
    np.testing.assert_array_equal(given.transduction_, plain.transduction_)
    np.testing.assert_array_equal(given.objective_, plain.objective_)
    assert kept[0] == kept[1]
    assert given.get_params() == {**TransCLIP(device="cpu").get_params(), **SCALARS}
    assert all(getattr(given, name) is value for name, value in SCALARS.items())


def test_plain_parameters():
    plain = Parameters(**SCALARS).plain()
    for name, value in SCALARS.items():
        if name != "memory":  # of which a solve reads the bytes
            assert getattr(plain, name) == value
            assert type(getattr(plain, name)) is type(value.item())
    assert Parameters(kl_weight=1).plain().get_params() == Parameters(kl_weight=1.0).get_params()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_neighbors", np.float64(2.0)),
        ("n_neighbors", np.True_),
        ("unit_means", np.int64(1)),
        ("class_cost", np.int64(1)),
        ("memory", np.float64(8e9)),
    ],
)
def test_scalars_of_another_kind(name, value):
    with pytest.raises(InputError, match=f"^{name} must be "):
        TransCLIP(**{name: value}).check()
