"""`solve --method` and `compare`: every method on the command line."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.cli.conftest import contents, with_shots
from tests.conftest import balanced
from tests.reference import unit
from transclip_fast.cli import compare
from transclip_fast.cli.comparison import Comparison
from transclip_fast.cli.method import METHOD_ARRAYS
from transclip_fast.methods import BDCSPN, METHODS, StatA
from transclip_fast.methods.base import Setting

FEW = "transclip,zero-shot,stata,bd-cspn"


@pytest.fixture
def few_shot(arrays):
    """The arrays with two shots a class and validation rows."""
    return with_shots(arrays, 2)


@pytest.fixture
def counted(monkeypatch):
    """The methods that are fitted from now on, as a list that grows."""
    fitted, row = [], Comparison._row

    def noted(self, name, *arrays):
        fitted.append(name)
        return row(self, name, *arrays)

    monkeypatch.setattr(Comparison, "_row", noted)
    return fitted


def test_solve(save, arrays, succeeds, tmp_path):
    out = succeeds(
        "solve", save(arrays), "--method", "stata", "--set", "alpha=3", "--out", tmp_path / "result"
    )
    model = StatA(alpha=3, device="cpu").fit(
        arrays["image_features"], text_features=arrays["text_features"]
    )
    assert {x.name for x in (tmp_path / "result").iterdir()} == {"predictions.parquet", "run.json"}
    table = pq.read_table(tmp_path / "result" / "predictions.parquet")
    np.testing.assert_array_equal(table["label"], model.transduction_)
    run = json.loads((tmp_path / "result" / "run.json").read_text())
    assert (run["method"], run["anchors"], run["runs"]) == ("stata", "texts", 1)
    assert run["chosen"] == model.chosen_.values
    assert run["accuracy"] == round(100 * (model.transduction_ == arrays["labels"]).mean(), 4)
    assert "stata from texts: alpha 3, n_neighbors 3" in out
    assert f"{run['accuracy']:.2f} %" in out
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_result_is_evaluated_and_not_predicted_from(save, arrays, succeeds, cli, tmp_path):
    features = save(arrays)
    succeeds("solve", features, "--method", "bd-cspn", "--out", tmp_path / "result")
    assert "zero-shot ->" in succeeds("evaluate", tmp_path / "result")
    ran = cli("predict", tmp_path / "result", features, "--out", tmp_path / "more")
    assert ran.code == 2
    assert "was solved by bd-cspn, which has no mixture" in ran.err


def test_without_texts_labels_are_compared_with_the_means_of_the_shots(
    save, few_shot, cli, succeeds, refused, tmp_path
):
    del few_shot["text_features"]
    shots = few_shot["support_features"]
    noisy = shots + np.random.default_rng(0).normal(scale=0.2, size=shots.shape)
    few_shot["support_features"] = unit(noisy).astype(np.float32)
    x, s = (few_shot[f"{use}_features"].astype(np.float64) for use in ("image", "support"))
    means = np.stack([s[few_shot["support_labels"] == k].mean(0) for k in range(6)])
    nearest = (x @ unit(means).T).argmax(1)
    options = ("--method", "bd-cspn", "--set", "n_rows=3", "--set", "eps=10")
    ran = cli("solve", save(few_shot), *options, "--out", tmp_path / "result")
    model = BDCSPN(n_rows=3, eps=10, device="cpu").fit(
        few_shot["image_features"],
        support_features=few_shot["support_features"],
        support_labels=few_shot["support_labels"],
    )
    table = pq.read_table(tmp_path / "result" / "predictions.parquet")
    np.testing.assert_array_equal(table["label"], model.transduction_)
    np.testing.assert_array_equal(table["zero_shot_label"], nearest)
    run = json.loads((tmp_path / "result" / "run.json").read_text())
    assert (run["anchors"], run["zero_shot_from"], run["runs"]) == ("shots", "shots", 1)
    assert run["n_flipped"] == (model.transduction_ != nearest).sum() > 0
    warning = "text_features: none; zero-shot here is the nearest mean of the shots"
    assert ran.err.count(warning) == run["warnings"].count(warning) == 1
    assert f"{run['n_flipped']} labels changed from the nearest mean of the shots" in ran.out
    assert "% the nearest mean of the shots ->" in ran.out
    assert "zero-shot ->" in succeeds("evaluate", tmp_path / "result")
    message = refused("solve", save(few_shot), "--method", "stata", "--out", tmp_path / "other")
    assert "stata with anchors 'texts' needs text_features" in message
    few_shot["class_names"] = list("abcdefg")
    assert "7 names for 6 classes" in refused("solve", save(few_shot), *options, "--out", "other")


def test_solve_says_what_validation_chose_and_what_a_method_assumes(
    save, few_shot, succeeds, tmp_path
):
    out = succeeds("solve", save(few_shot), "--method", "pt-map", "--out", tmp_path / "result")
    assert "pt-map from shots: rate 0.2, max_iter 10, max_scalings 1000, the best of 2 runs" in out
    assert "pt-map assumes equally many images of every class" in out


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, ["--method", "stata", "--set", "beta=1"], "stata has no setting 'beta'"),
        ({}, ["--method", "stata", "--set", "name=1"], "stata has no setting 'name'"),
        ({}, ["--method", "stata", "--set", "alpha"], "--set alpha: expected NAME=VALUE"),
        ({}, ["--method", "stata", "--set", "alpha=much"], "expected NAME=VALUE with a number"),
        ({}, ["--method", "stata", "--set", "alpha=1", "--set", "alpha=2"], "set twice"),
        ({}, ["--method", "stata", "--set", "n_neighbors=1.5"], "must be a whole number"),
        ({}, ["--method", "stata", "--set", "device=1"], "--set device: is no setting"),
        ({}, ["--method", "stata", "--set", "anchors=1"], "the option for it is --anchors"),
        ({}, ["--method", "stata", "--gamma", "1"], "--gamma is for method transclip"),
        ({}, ["--method", "stata", "--reject", "0.1"], "--reject is for method transclip"),
        ({}, ["--method", "stata", "--head", "taskres"], "--head is for method transclip"),
        ({}, ["--method", "bd-cspn", "--anchors", "both"], "needs shots"),
        ({}, ["--anchors", "both"], "--anchors is for methods other than transclip"),
        ({}, ["--set", "alpha=1"], "--set is for methods other than transclip"),
        ({"known_labels": [0] * 77}, ["--method", "stata"], "known_labels: method stata takes"),
        ({"text_features": None}, ["--method", "bd-cspn"], "no text features and no shots"),
        ({"class_names": ["a"]}, ["--method", "stata"], "1 name for 6 classes"),
        ({}, ["--method", "stata", "--set", "self=1"], "stata has no setting 'self'"),
        (
            {},
            ["--method", "bd-cspn", "--set", "eps=1000"],
            "features.npz: bd-cspn: row 0 has no finite answer with n_rows 8, eps 1000",
        ),
    ],
)
def test_solve_refuses(save, arrays, refused, change, options, message, tmp_path):
    changed = {k: v for k, v in {**arrays, **change}.items() if v is not None}
    assert message in refused("solve", save(changed), *options, "--out", tmp_path / "result")


def test_a_graph_that_the_method_does_not_need_is_refused(save, arrays, done, refused, tmp_path):
    features = save(arrays)
    done("graph", features, "--out", tmp_path / "graph")
    command = ("solve", features, "--graph", tmp_path / "graph", "--out", tmp_path / "result")
    assert "em-dirichlet uses no graph" in refused(*command, "--method", "em-dirichlet")
    done(*command, "--method", "stata")
    assert "3 neighbours, 4 are needed" in refused(*command, "--method", "zlap")


def test_rows_are_those_of_a_fit_in_python(save, few_shot, succeeds, tmp_path):
    small = {**few_shot, "image_features": few_shot["image_features"][:40]}
    small["labels"] = few_shot["labels"][:40]
    names = "transclip,zero-shot,stata,zlap,ecalp,bd-cspn,pt-map"
    succeeds("compare", save(small), "--methods", names, "--out", tmp_path / "table.json")
    summary = json.loads((tmp_path / "table.json").read_text())
    rows = {row["method"]: row for row in summary["rows"]}
    assert [*rows] == names.split(",")
    assert (summary["n_queries"], summary["n_shots"], summary["n_validation"]) == (40, 12, 20)
    for name, cls in METHODS.items():
        if name not in rows:
            continue
        model = cls(device="cpu", anchors=rows[name]["anchors"]).fit(
            small["image_features"], **{name: small[name] for name in METHOD_ARRAYS}
        )
        accuracy = round(100 * (model.transduction_ == small["labels"]).mean(), 4)
        assert rows[name]["accuracy"] == accuracy
        assert rows[name]["chosen"] == model.chosen_.values
        assert rows[name]["runs"] == model.chosen_.runs
        assert rows[name]["assumes_balanced"] == cls.balanced
    assert rows["transclip"]["runs"] == 4
    assert [*rows["transclip"]["searched"]] == ["gamma"]
    assert rows["bd-cspn"]["searched"] == rows["bd-cspn"]["chosen"]
    assert rows["stata"]["searched"] == {}
    assert rows["bd-cspn"]["runs"] == 55
    assert (rows["bd-cspn"]["anchors"], rows["ecalp"]["anchors"]) == ("shots", "both")
    assert rows["zero-shot"]["changed"] == 0


def test_every_method_runs_and_texts_are_the_shots(save, arrays, succeeds, monkeypatch):
    for method in METHODS.values():
        if "max_iter" in method.grid:  # fewer steps: thousands take seconds
            fewer = {**method.grid, "max_iter": Setting(2, whole=True)}
            monkeypatch.setattr(method, "grid", fewer)
    arrays["image_features"], arrays["labels"] = arrays["image_features"][:30], None
    features = save({k: v for k, v in arrays.items() if v is not None})
    summary = json.loads(succeeds("compare", features, "--json"))
    assert [row["method"] for row in summary["rows"]] == ["transclip", *METHODS]
    assert {row["anchors"] for row in summary["rows"]} == {"texts", "probabilities"}
    assert {row["accuracy"] for row in summary["rows"]} == {None}
    assert {row["runs"] for row in summary["rows"]} == {1}


def test_formats(save, arrays, succeeds, tmp_path):
    features = save(arrays)
    text = succeeds("compare", features, "--methods", FEW)
    head = " ".join(text.splitlines()[0].split())
    assert head == "method text accuracy changed time peak memory settings chosen runs assumes"
    assert "77 images, 6 classes, 33 dimensions, 0 shots, 0 validation rows" in text
    for suffix in ("md", "txt"):
        succeeds("compare", features, "--methods", FEW, "--out", tmp_path / f"table.{suffix}")
    markdown = (tmp_path / "table.md").read_text().splitlines()
    assert markdown[0].startswith("| method | text | accuracy | changed |")
    assert markdown[3].startswith("| zero-shot | texts | ")
    assert all(line.count("|") == 10 for line in markdown[:6])
    assert markdown[-1] == "- choose a method by labelled images that you do not report on"
    assert (tmp_path / "table.txt").read_text().startswith("method     text ")
    summary = json.loads(succeeds("compare", features, "--methods", "zero-shot", "--json"))
    assert summary["rows"][0]["method"] == "zero-shot"


@pytest.mark.parametrize("kind", ["text", "image"])
def test_maps(save, few_shot, succeeds, cli, tmp_path, kind):
    """Features that are turned are turned back by their map; rows without it are not kept."""
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(33, 33)))[0].astype(np.float32)
    np.save(tmp_path / "turn.npy", turn)
    images = ("image_features", "support_features", "validation_features")
    names = images if kind == "image" else ("text_features",)
    straight, out = save(few_shot), tmp_path / "table.json"
    succeeds("compare", straight, "--methods", FEW, "--out", tmp_path / "expected.json")
    turned = save(few_shot | {name: few_shot[name] @ turn for name in names})
    succeeds("compare", turned, "--methods", FEW, "--out", out)
    back = [f"--{kind}-map", tmp_path / "turn.npy"]
    assert "begins anew" in cli("compare", turned, "--methods", FEW, "--out", out, *back).err
    expected, found = (json.loads((tmp_path / x).read_text()) for x in ("expected.json", out))
    results = [[(row["accuracy"], row["chosen"]) for row in x["rows"]] for x in (expected, found)]
    assert results[0] == results[1]
    assert list(found["options"]["maps"]) == [f"{kind}_map"]


def test_no_labels_no_accuracy(save, arrays, succeeds):
    del arrays["labels"]
    lines = succeeds("compare", save(arrays), "--methods", "zero-shot").splitlines()
    assert "no accuracy, as no image has a true label: give --labels" in lines


def test_methods_that_cannot_run_are_named(save, arrays, cli, refused, monkeypatch):
    monkeypatch.setattr(compare, "NAMES", ("transclip", "stata", "bd-cspn", "zlap"))
    shots = balanced(arrays["labels"], 3)
    del arrays["text_features"]
    arrays |= {
        "support_features": arrays["image_features"][shots],
        "support_labels": arrays["labels"][shots],
    }
    features = save(arrays)
    ran = cli("compare", features)
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["bd-cspn", "shots"], ["zlap", "shots"]]
    assert "not run: stata with anchors 'texts' needs text_features" in lines
    (alone,) = (line for line in lines if line.startswith("not run: transclip: "))
    assert alone.startswith("not run: transclip: no text features and no prior")
    assert alone.endswith("; for the shots alone, a uniform prior: np.full((N, K), 1 / K)")
    assert lines[-1] == "choose a method by labelled images that you do not report on"
    refusal = refused("compare", features, "--methods", "bd-cspn,stata")
    assert "stata with anchors 'texts' needs text_features" in refusal


def test_done_methods_are_not_run_again(save, arrays, succeeds, cli, counted, tmp_path):
    features, out = save(arrays), tmp_path / "table.md"
    succeeds("compare", features, "--methods", "zero-shot,stata", "--out", out)
    first = out.read_text().splitlines()
    succeeds("compare", features, "--methods", FEW, "--out", out)
    assert counted == ["zero-shot", "stata", "transclip", "bd-cspn"]
    assert set(first[:4]) <= set(out.read_text().splitlines())
    fewer = succeeds("compare", features, "--methods", "stata", "--out", out).splitlines()
    assert [line.split()[0] for line in fewer[1:5]] == [
        "stata",
        "transclip",
        "zero-shot",
        "bd-cspn",
    ]
    assert len(counted) == 4
    arrays["labels"][0] = (arrays["labels"][0] + 1) % 6
    ran = cli("compare", save(arrays), "--methods", "zero-shot", "--out", out)
    assert "was made with other input or options, or is damaged; begins anew" in ran.err
    assert counted[4:] == ["zero-shot"]
    assert "--logit-scale" not in ran.err


def test_other_anchors_run_again_only_what_they_change(save, few_shot, succeeds, counted, tmp_path):
    features, out = save(few_shot), tmp_path / "table.json"
    command = "compare", features, "--methods", "zero-shot,zlap", "--out", out
    kinds = "shots", "shots", "texts"
    for anchors in kinds:
        succeeds(*command, "--anchors", anchors)
        rows = {row["method"]: row for row in json.loads(out.read_text())["rows"]}
        assert (rows["zero-shot"]["anchors"], rows["zlap"]["anchors"]) == ("texts", anchors)
    assert counted == ["zero-shot", "zlap", "zlap"]


def test_rows_of_other_class_names_are_not_kept(save, arrays, cli, counted, tmp_path):
    """Labels by name are others once the names are put right."""
    names = np.array(list("fbdace"))
    features = save(arrays | {"labels": names[arrays["labels"]]})
    command = "compare", features, "--methods", "zero-shot", "--out", tmp_path / "table.json"
    for order in (names[::-1], names):
        (tmp_path / "names.txt").write_text("\n".join(order))
        assert cli(*command, "--class-names", tmp_path / "names.txt").code == 0
    assert counted == ["zero-shot", "zero-shot"]
    nearest = (arrays["image_features"] @ arrays["text_features"].T).argmax(1)
    (row,) = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert row["accuracy"] == round(100 * (nearest == arrays["labels"]).mean(), 4)


@pytest.mark.parametrize("suffix", ["md", "txt", "json"])
def test_only_a_table_is_replaced(save, arrays, refused, succeeds, suffix, tmp_path):
    """Not the names that the comparison reads, say."""
    names, out = tmp_path / f"names.{suffix}", tmp_path / f"table.{suffix}"
    names.write_text('["a", "b", "c", "d", "e", "f"]' if suffix == "json" else "a\nb\nc\nd\ne\nf")
    command = "compare", save(arrays), "--methods", "zero-shot", "--out"
    assert f"{names}: is there and is no table of `compare`" in refused(*command, names)
    for _ in range(2):
        succeeds(*command, out)


@pytest.mark.parametrize("damage", ["{", "[]", '{"rows": 3}', None])
def test_a_damaged_state_is_not_used(save, arrays, cli, counted, damage, tmp_path):
    features, out = save(arrays), tmp_path / "table.md"
    cli("compare", features, "--methods", "zero-shot", "--out", out)
    state = tmp_path / ".table.md.compare.json"
    if damage is None:  # a row that lacks what the table shows
        kept = json.loads(state.read_text())
        del kept["rows"]["zero-shot"]["seconds"]
        damage = json.dumps(kept)
    state.write_text(damage)
    ran = cli("compare", features, "--methods", "zero-shot", "--out", out)
    assert ran.code == 0
    assert "begins anew" in ran.err
    assert counted == ["zero-shot", "zero-shot"]


def test_a_killed_comparison_goes_on(save, arrays, cli, succeeds, counted, monkeypatch, tmp_path):
    features, out = save(arrays), tmp_path / "table.md"
    with monkeypatch.context() as patch:

        def killed(*_, **__):
            raise KeyboardInterrupt

        patch.setattr(METHODS["stata"], "solve", killed)
        ran = cli("compare", features, "--methods", "stata")  # keeps nothing
        assert (ran.code, "goes on from here" in ran.err) == (1, False)
        ran = cli("compare", features, "--methods", FEW, "--out", out)
    assert ran.code == 1
    assert ran.err.count("stopped: the same command goes on from here") == 1
    assert not out.exists()
    succeeds("compare", features, "--methods", FEW, "--out", out)
    assert counted == ["stata", "transclip", "zero-shot", "stata", "stata", "bd-cspn"]
    hidden = {path.name for path in contents(tmp_path) if path.name.startswith(".")}
    assert hidden == {".table.md.compare.json"}


def test_shots_are_drawn_from_the_support_rows(pets, cli, tmp_path):
    out = tmp_path / "table.json"
    for shots, kept in ((2, 12), (0, 0)):
        cli("compare", pets(), "--shots", shots, "--methods", "zlap,bd-cspn", "--out", out)
        summary = json.loads(out.read_text())
        assert (summary["n_shots"], summary["n_validation"]) == (kept, kept)
    assert {row["anchors"] for row in summary["rows"]} == {"texts"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "stata,nope"], "method 'nope' is not known; choose of transclip, zero-shot"),
        (["--out", "table.xlsx"], "table.xlsx: name a file that ends in .md, .json, .txt"),
        (["--shots", "2"], "shots: there are no support_features to draw them from"),
        (["--memory", "1MiB", "--methods", "stata"], "memory: stata keeps 3 arrays"),
        (["--logit-scale", "0"], "logit_scale must be greater than 0"),
        (["--gamma", "1"], "gamma: is the weight of the support, and there is none"),
        (["--graph", "nowhere"], "nowhere: is not a graph folder"),
    ],
)
def test_compare_refuses(save, arrays, refused, options, message):
    assert message in refused("compare", save(arrays), *options)


def test_prior_is_named_as_unused(save, arrays, cli):
    prior = np.full((77, 6), 1 / 6, np.float32)
    ran = cli("compare", save(arrays | {"prior": prior}), "--methods", "zero-shot")
    assert ran.err == "warning: prior: no method of a comparison uses it\n"


@pytest.mark.parametrize("stored", [False, True])
def test_rows_off_the_unit_sphere_are_warned_of_once(save, arrays, cli, stored, tmp_path):
    arrays["image_features"] = 7 * arrays["image_features"]
    file, options = save(arrays), []
    if stored:
        file = tmp_path / "rows.npy"
        np.save(file, arrays["image_features"])
        np.save(tmp_path / "texts.npy", arrays["text_features"])
        options = ["--text-features", tmp_path / "texts.npy"]
    compared = cli("compare", file, *options, "--methods", FEW)
    solved = cli("solve", file, *options, "--method", "stata", "--out", tmp_path / "result")
    for ran in (compared, solved):
        assert ran.code == 0
        assert ran.err.count("warning: ") == ran.err.count("rows were not unit vectors") == 1
