"""What several processes do not share is refused by each of them, before work begins."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cli.test_ranks import REPORTED, contents, hidden, solve
from tests.conftest import balanced, make_problem
from tests.ranks import on_ranks
from transclip_fast import InputError, NeighborGraph, TransCLIP
from transclip_fast.cli import COMMANDS, SHARED


@pytest.fixture
def features(tmp_path):
    """A file of two parts of rows, with shots."""
    image, text, labels = make_problem(n=800, k=4)
    rows = balanced(labels, 4)
    np.savez(
        tmp_path / "features.npz",
        image_features=image,
        text_features=text,
        support_features=image[rows],
        support_labels=labels[rows],
    )
    return tmp_path / "features.npz"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--head", "taskres"), "--head: is trained and applied in one process"),
        (("--head", "none.safetensors"), "--head: is trained and applied in one process"),
        (("--method", "stata"), "--method: stata is one process"),
        (("--method", "zero-shot"), "--method: zero-shot is one process"),
        (("--backend", "triton", "--device", "cpu"), "triton"),
    ],
)
def test_options_of_one_process(features, tmp_path, options, expected):
    codes, errors = solve(2, features, "--out", tmp_path / "out", *options)
    assert codes == [REPORTED, REPORTED]
    for text in errors:
        (line,) = text.splitlines()
        assert expected in line
    assert not (tmp_path / "out").exists()
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - set(SHARED)))
def test_commands_of_one_process(command, cli, monkeypatch):
    """They would write the same files at once."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    ran = cli(command)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == f"error: {command} is one process; run it without torchrun\n"


def refusal(values):
    features, text, _ = make_problem(n=600, k=4, d=8)
    graph = NeighborGraph((np.arange(600)[:, None] + 1) % 600, np.ones((600, 1), np.float32))
    try:
        TransCLIP(device="cpu", n_neighbors=1, **values).fit(
            features, text_features=text, graph=graph
        )
    except InputError as error:
        return str(error)
    return "none"


def test_triton_and_float16_are_refused_on_all_ranks(monkeypatch):
    half = {"precision": "float16"}
    for message in on_ranks(2, refusal, half):
        assert "precision='float16' is for backend='triton'" in message
    # As on a GPU.
    monkeypatch.setattr("transclip_fast.solver.problem.choose_backend", lambda *_: "triton")
    for values in ({}, half):
        for message in on_ranks(2, refusal, values):
            assert "backend='triton' is for one process" in message


@pytest.mark.parametrize("option", ["--prior", "--prior-logits"])
def test_priors_in_files(tmp_path, option):
    """The same bits for 1 to 3 ranks."""
    image, text, _ = make_problem(n=1100, k=5, noise=0.06)
    np.savez(tmp_path / "features.npz", image_features=image)
    logits = 20 * image @ text.T
    given = np.exp(logits) if option == "--prior" else logits
    np.save(
        tmp_path / "given.npy", given / (given.sum(1, keepdims=True) if option == "--prior" else 1)
    )
    command = tmp_path / "features.npz", option, tmp_path / "given.npy", "--device", "cpu", "--out"
    for size in (1, 2, 3):
        codes, errors = solve(size, *command, tmp_path / f"{size}")
        assert codes == [0] * size, errors
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")
