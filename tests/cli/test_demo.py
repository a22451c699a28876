"""`demo`: a whole run on images in the package."""

from __future__ import annotations

import json
import warnings

import pyarrow.parquet as pq

from transclip_fast.errors import InputError


def test_demo(cli, tmp_path, no_network):
    ran = cli("demo", "--out", tmp_path / "demo", "--json")
    assert ran.code == 0
    summary = json.loads(ran.out)
    assert json.loads((tmp_path / "demo/run.json").read_text()) == summary
    sets = summary["sets"]
    assert list(sets) == ["blur", "thin strokes", "thick strokes", "plain"]
    assert summary["accuracy"] > summary["zero_shot_accuracy"] + 2
    for name, numbers in sets.items():
        result = tmp_path / "demo" / name.replace(" ", "-") / "result"
        truth, label, zero_shot = (
            pq.read_table(result / "predictions.parquet")[column].to_numpy()
            for column in ("true_label", "label", "zero_shot_label")
        )
        assert numbers["accuracy"] == round(100 * (label == truth).mean(), 4)
        assert numbers["zero_shot_accuracy"] == round(100 * (zero_shot == truth).mean(), 4)
    assert (tmp_path / "demo/changed.png").stat().st_size > 10_000
    assert summary["report"] == str(tmp_path / "demo/report.html")
    assert (tmp_path / "demo/report.html").read_text().count('"picture":') > 100


def test_the_demo_replaces_nothing_but_a_demo(cli, refused, tmp_path, monkeypatch):
    """A result folder has a run.json, too; what a killed demo left is written again."""

    def fail(*_, **__):
        raise InputError("features: cannot be written")

    monkeypatch.setattr("transclip_fast.cli.demo.encode_source", fail)
    for name in ("run.json", "changed.txt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("{}")
        message = refused("demo", "--out", tmp_path / name)
        assert f"{tmp_path / name}: holds other files ({name}); name a new folder" in message
        assert [path.name for path in (tmp_path / name).iterdir()] == [name]
    for _ in range(2):
        assert "cannot be written" in cli("demo", "--out", tmp_path / "demo").err
        (tmp_path / "demo/.changed.png.1").write_text("half")


def test_what_the_demo_warns_of_is_one_line(cli, tmp_path, monkeypatch):
    """Also where it encodes, as of a lock that cannot be removed."""

    def fail(*_, **__):
        warnings.warn("cannot remove .features.lock", stacklevel=2)
        raise InputError("features: cannot be written")

    monkeypatch.setattr("transclip_fast.cli.demo.encode_source", fail)
    ran = cli("demo", "--out", tmp_path / "demo")
    assert ran.code == 2
    lines = ["warning: cannot remove .features.lock", "error: features: cannot be written"]
    assert ran.err.splitlines() == lines
