"""What a page holds, and what it says of what it cannot show."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib import rc_context
from PIL import Image

from tests.report.conftest import NAMES, label, make_result
from transclip_fast.errors import InputError
from transclip_fast.report import class_table
from transclip_fast.report.figures import STYLE, steps_plot
from transclip_fast.report.gallery import galleries, suggested_rows
from transclip_fast.report.page import write_report
from transclip_fast.report.thumbnails import pictures_in, thumbnails
from transclip_fast.report.view import View
from transclip_fast.store.results import load_mixture, load_result


def read(file):
    """The data of a page."""
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text())
    return json.loads(text[1])


def edited(result, **columns):
    """A result with other columns of predictions; None takes one out. Its hashes are dropped."""
    file = result / "predictions.parquet"
    table = pq.read_table(file)
    for name, values in columns.items():
        if name in table.column_names:
            table = table.drop_columns([name])
        if values is not None:
            table = table.append_column(name, pa.array(values))
    pq.write_table(table, file)
    run = json.loads((result / "run.json").read_text())
    run.pop("sha256", None)
    (result / "run.json").write_text(json.dumps(run))


def set_run(result, **entries):
    run = json.loads((result / "run.json").read_text()) | entries
    (result / "run.json").write_text(json.dumps(run))


def test_what_each_says(made, tmp_path):
    """Text and mixture by themselves, in float64; neighbours in both directions."""
    write_report(made.result, tmp_path / "page.html")
    data = read(tmp_path / "page.html")
    X = np.load(made.folder / "features/img_emb/img_emb_00000.npy").astype(float)
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    T = np.load(made.folder / "features/prototypes.npy").astype(float)
    mixture, _ = load_mixture(made.result)
    mu, variance = mixture.means.numpy(), mixture.variances.numpy()
    weight = load_result(made.result).run["config"]["likelihood_weight"]
    distance = -0.5 * (np.square(X[:, None] - mu) / variance).sum(2)
    neighbors = pq.read_table(made.result / "predictions.parquet")["neighbors"].to_pylist()
    shown = {int(row): image for row, image in data["images"].items() if "joint" in image}
    assert len(shown) > 20
    for row, image in shown.items():
        for name, scores in (("text", 100 * X[row] @ T.T), ("mixture", weight * distance[row])):
            p = np.exp(scores - scores.max())
            p /= p.sum()
            best = np.argsort(-p, kind="stable")[:3]
            np.testing.assert_allclose([p for _, p in image[name]], p[best], atol=2e-3)
            assert image[name][0][0] == best[0] or p[best[0]] - p[best[1]] < 1e-3
        linked = {other for other, some in enumerate(neighbors) if row in some}
        assert image["neighbors"][:3] == neighbors[row]
        assert set(image["neighbors"][3:]) <= linked - {*neighbors[row]}
        assert len(image["neighbors"]) == min(6, len(linked | {*neighbors[row]}))


def test_the_policy_lets_only_this_script_and_style_run(made, tmp_path):
    write_report(made.result, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1].replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; img-src data:; ")
    for kind, tag in (("script", "<script>(.*?)</script>"), ("style", "<style>(.*?)</style>")):
        found = re.findall(tag, page, flags=re.S)
        digests = [hashlib.sha256(content.encode()).digest() for content in found]
        sources = " ".join(f"'sha256-{base64.b64encode(one).decode()}'" for one in digests)
        assert f"; {kind}-src {sources}; " in policy
    assert "://" not in re.sub(r"http://www\.w3\.org/\S+", "", page)
    assert not re.search(r"\s(style|on\w+)=", re.sub(r"<script.*?</script>", "", page, flags=re.S))


def test_the_first_gallery_is_what_suggest_lists(made):
    view = View.open(made.result)
    first = galleries(view)[0]
    assert first.name == "suggested"
    assert first.rows == suggested_rows(load_result(made.result), len(view)).tolist()
    table = pq.read_table(made.result / "predictions.parquet")
    z, calibrated = (table[x].to_pylist() for x in ("confidence", "calibrated_confidence"))
    assert first.rows == sorted(range(len(view)), key=z.__getitem__)
    (least,) = (gallery for gallery in galleries(view) if gallery.name == "uncertain")
    assert least.rows == sorted(range(len(view)), key=calibrated.__getitem__)


def test_images_moved_deleted_and_replaced(tmp_path):
    made = make_result(tmp_path / "run", n_plain=3)
    images, out = made.folder / "images", tmp_path / "page.html"
    assert write_report(made.result, out)["thumbnails"] == len(made.keys)

    (images / "plain/00.png").write_bytes((images / "plain/00.png").read_bytes() + b" ")
    (images / "plain/01.png").unlink()
    summary = write_report(made.result, out)
    assert summary["thumbnails"] == len(made.keys) - 2
    assert sorted(summary["notes"]) == [
        "1 of 12 images are not shown: cannot be read (No such file or directory); if they have "
        "moved, give `report --images` where they are.",
        "1 of 12 images are not shown: not the image that was encoded.",
    ]
    images.rename(tmp_path / "moved")
    summary = write_report(made.result, out)
    assert (summary["thumbnails"], len(summary["notes"])) == (0, 1)
    summary = write_report(made.result, out, images=str(tmp_path / "moved"))
    assert summary["thumbnails"] == len(made.keys) - 2
    assert "1 of 12 images are not shown: not among the images." in summary["notes"]


def test_images_in_a_tar(images, tmp_path):
    folder = images(6)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for file in sorted(folder.rglob("*.png")):
            tar.add(file, f"{file.parent.name}-{file.name}")
    made, file = label(tmp_path / "all.tar", tmp_path / "out"), tmp_path / "page.html"
    write_report(made.result, file)
    keys = [f"all.tar/{kind}-{i:03}" for i in range(6) for kind in [("cat", "dog")[i % 2]]]
    shown = read(file)["images"].values()
    assert {image["key"] for image in shown} == {*keys}
    for image in shown:
        picture = np.array(
            Image.open(io.BytesIO(base64.b64decode(image["picture"]))).convert("RGB")
        )
        originals = {file: np.array(Image.open(file)) for file in folder.rglob("*.png")}
        nearest = min(originals, key=lambda one: np.square(picture - 1.0 * originals[one]).sum())
        assert image["key"] == f"all.tar/{nearest.parent.name}-{nearest.stem}"
    (tmp_path / "all.tar").unlink()
    summary = write_report(made.result, file)
    note = f"6 of 6 images are not shown: {tmp_path}/all.tar: no such file."
    assert summary["notes"] == [note]


def test_thumbnails_are_upright_small_and_limited(tmp_path):
    picture = Image.new("RGB", (400, 200), "red")
    picture.paste("blue", (0, 0, 200, 200))
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned to the right: blue comes to the top
    picture.save(tmp_path / "a.jpg", exif=exif)
    Image.new("RGB", (300, 300), "green").save(tmp_path / "b.jpg")
    (tmp_path / "c.jpg").write_bytes(b"no image")
    pictures = pictures_in(str(tmp_path), {5: "a.jpg", 7: "b.jpg", 8: "c.jpg", 9: "../a.jpg"})
    wanted = [(5, 160), (7, 80), (8, 80), (9, 80)]
    found, missing = thumbnails(pictures, wanted, 10**6)
    upright = Image.open(io.BytesIO(base64.b64decode(found[5])))
    assert upright.size == (80, 160)
    assert upright.getpixel((40, 20))[2] > 200 > 50 > upright.getpixel((40, 140))[2]
    assert Image.open(io.BytesIO(base64.b64decode(found[7]))).size == (80, 80)
    assert missing == {"damaged": 1, "not among the images": 1}
    found, missing = thumbnails(pictures, wanted[:2], len(found[5]))
    assert [*found] == [5]
    assert missing == {"the page would be too large": 1}


def test_features_that_have_changed_are_not_used(made, tmp_path):
    file = made.folder / "features/img_emb/img_emb_00000.npy"
    np.save(file, np.load(file)[::-1])
    (note,) = write_report(made.result, tmp_path / "page.html")["notes"]
    assert "differs from its manifest" in note
    set_run(made.result, features="../nowhere")
    (note,) = write_report(made.result, tmp_path / "page.html")["notes"]
    assert "the features are gone" in note
    set_run(made.result, features=None)
    (note,) = write_report(made.result, tmp_path / "page.html")["notes"]
    assert "does not name its features" in note


def test_an_older_result(made, tmp_path):
    """Without what a report added to results."""
    edited(made.result, neighbors=None, known=None, calibrated_confidence=None)
    set_run(made.result, changed=None, features=None)
    summary = write_report(made.result, tmp_path / "page.html")
    assert [note.split(":")[0] for note in summary["notes"]] == [
        "Neighbours are not shown",
        "What text and mixture say alone is not shown",
    ]
    assert summary["shown"]["suggested"] == 30
    assert "uncertain" not in summary["shown"]


@pytest.mark.parametrize("kind", ["dense", "sparse", "predicted", "on_head"])
def test_results_of_the_first_version(kind, tmp_path):
    from tests.formats.test_old_folders import CLASS_NAMES

    folder = tmp_path / kind
    shutil.copytree(f"tests/formats/v0/{kind}", folder)
    assert write_report(folder, tmp_path / "page.html")["shown"]["typical"]
    assert read(tmp_path / "page.html")["classes"]["name"] == CLASS_NAMES


def test_what_corrections_moved(made, tmp_path):
    zero_shot = load_result(made.result).labels("zero_shot_label")
    labels, after = zero_shot.copy(), zero_shot.copy()
    back, away, given = 3, 7, 9
    for row, some in ((back, labels), (away, after), (given, after)):
        some[row] = (zero_shot[row] + 1) % len(NAMES)
    edited(made.result, label=labels)
    shutil.copytree(made.result, tmp_path / "after")
    edited(tmp_path / "after", label=after, known=np.arange(len(labels)) == given)
    shown = {
        gallery.name: gallery.rows
        for gallery in galleries(View.open(tmp_path / "after", made.result))
    }
    assert shown["corrected"] == [given]
    assert shown["back"] == [back]
    assert shown["moved"] == [away]
    assert given not in shown["suggested"]
    write_report(tmp_path / "after", tmp_path / "page.html", before=str(made.result))
    assert read(tmp_path / "page.html")["images"][str(away)]["earlier"] == labels[away]


@pytest.fixture
def command(cli_in_process, tmp_path):
    """Solve the features of a result with options; the words of the command that the page shows."""

    def solve(made, *options):
        cli_in_process("solve", made.folder / "features", "--out", tmp_path / "a result", *options)
        write_report(tmp_path / "a result", tmp_path / "page.html")
        shown = next(iter(read(tmp_path / "page.html")["commands"]), None)
        return shown and shlex.split(shown)

    return solve


def test_the_command_repeats_the_solve(made, command, cli_in_process, tmp_path, monkeypatch):
    (tmp_path / "a 'quoted' file.csv").write_text("key,label\nplain/00.png,plain\n")
    monkeypatch.chdir(tmp_path)
    words = command(
        made, "--corrections", "a 'quoted' file.csv", "--no-unit-means", "--class-cost", "off",
        "--kl-weight", "0.75", "--n-neighbors", "2", "--csv", "--reject", "0.1", "--json",
    )  # fmt: skip
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/corrections.csv").write_text("key,label\nplain/01.png,plain\n")
    assert words[0] == "transclip-fast"
    cli_in_process(*words[1:])
    first, again = (load_result(tmp_path / f"a result{x}") for x in ("", "-corrected"))
    assert again.run["parameters"] == first.run["parameters"]
    assert again.run["parameters"]["kl_weight"] == 0.75
    assert again.run["parameters"]["class_cost"] is False
    assert (tmp_path / "a result-corrected/predictions.csv").is_file()
    assert again.run["rejected"]["n_rejected"] == first.run["rejected"]["n_rejected"] > 0
    both = [made.keys.index(f"plain/{i:02}.png") for i in (0, 1)]
    assert np.flatnonzero(first.flags("known")).tolist() == both[:1]
    assert np.flatnonzero(again.flags("known")).tolist() == both
    assert again.labels("label")[both].tolist() == [NAMES.index("plain")] * 2
    page = (tmp_path / "page.html").read_text()
    assert "with the other options" not in page


def test_a_result_that_does_not_say_its_options(made, tmp_path):
    for options in (None, "x", [{"option": 3}], [{"option": "--csv", "run": "x"}], [["--csv"]]):
        set_run(made.result, options=options)
        write_report(made.result, tmp_path / "page.html")
        words = shlex.split(read(tmp_path / "page.html")["commands"][0])
        assert words[2:4] == [str(made.folder / "features"), "--corrections"]
        assert "with the other options" in (tmp_path / "page.html").read_text()


def test_the_page_of_another_method(made, command, tmp_path):
    assert command(made, "--method", "tim-gd") is None
    page = (tmp_path / "page.html").read_text()
    assert "<dt>labelled by</dt><dd>tim-gd</dd>" in page
    assert "Labelled by the method tim-gd, which takes no corrections" in page
    data = read(tmp_path / "page.html")
    assert data["galleries"][0]["title"] == "Check these first"
    assert all("picture" in image and "mixture" not in image for image in data["images"].values())


def test_the_page_of_predict(made, cli_in_process, tmp_path):
    """Pictures, text and mixture are those of the new rows."""
    cli_in_process("predict", made.result, made.folder / "features", "--out", tmp_path / "new")
    summary = write_report(tmp_path / "new", tmp_path / "page.html")
    (note,) = summary["notes"]
    assert note.startswith("Labelled by predict: each row by itself")
    assert summary["thumbnails"] == len(made.keys)
    data = read(tmp_path / "page.html")
    assert data["commands"] == []
    write_report(made.result, tmp_path / "solved.html")
    solved = read(tmp_path / "solved.html")["images"]
    said = {row: image for row, image in data["images"].items() if "mixture" in image}
    assert len(said) == len(made.keys)
    for row, image in said.items():
        assert (image["text"], image["mixture"]) == (solved[row]["text"], solved[row]["mixture"])


def test_a_result_in_a_folder_that_is_no_utf8(made, tmp_path):
    folder = tmp_path / os.fsdecode(b"new\xff")
    shutil.copytree(made.folder, folder)
    summary = write_report(folder / "result", tmp_path / os.fsdecode(b"\xff.html"))
    page = (tmp_path / os.fsdecode(b"\xff.html")).read_text(encoding="utf-8")
    assert r"<title>new\udcff/result" in page
    assert summary["thumbnails"] == len(made.keys)
    assert summary["bytes"] == len(page.encode())
    assert '"mixture":[' in page


def test_images_that_could_not_be_read_are_counted(tmp_path):
    made = make_result(tmp_path / "run", n_plain=3)
    write_report(made.result, tmp_path / "page.html")
    assert "could not be read" not in (tmp_path / "page.html").read_text()
    for name in ("two\nlines.png", "b.png"):
        (tmp_path / "run/images" / name).write_bytes(b"no image")
    made = label(tmp_path / "run/images", tmp_path / "run")
    (note,) = write_report(made.result, tmp_path / "page.html")["notes"]
    file = tmp_path / "run/features/failures.csv"
    assert note == f"2 images have no label, as they could not be read; {file} says why."


def test_a_result_of_other_images_is_refused(made, tmp_path):
    shutil.copytree(made.result, tmp_path / "other")
    set_run(tmp_path / "other", inputs_sha256={"image_features": "another"})
    with pytest.raises(InputError, match="is of other images or classes"):
        write_report(made.result, tmp_path / "page.html", before=str(tmp_path / "other"))
    with pytest.raises(InputError, match="is the result itself"):
        write_report(made.result, tmp_path / "page.html", before=f"{made.result}/../result")


@pytest.mark.parametrize("name", ["page.pdf", "page", "page.html.txt"])
def test_a_page_that_no_browser_would_open_is_refused(name, made, tmp_path):
    with pytest.raises(InputError, match=r"is for a page of HTML; name it page(\.html)+$"):
        write_report(made.result, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_many_long_names_fit(made, tmp_path, monkeypatch):
    """Names are cut, classes left out, and corrections still call each class unmistakably."""
    n_classes = 55_000
    long = [f"{'&' * 150}{k}" for k in range(n_classes)]
    names = [*NAMES, *long[len(NAMES) : -2], "7", "7"]
    set_run(made.result, n_classes=n_classes, class_names=names)
    summary = write_report(made.result, tmp_path / "page.html")
    assert summary["bytes"] < 20_000_000
    classes = read(tmp_path / "page.html")["classes"]
    assert len(classes["id"]) == class_table.LISTED_CLASSES
    assert classes["label"]["6"] == "6"
    assert classes["label"]["7"] is None  # a class has the name 7


def test_names_of_several_classes_show_their_positions(made, tmp_path):
    set_run(made.result, class_names=["kite", "crane", "", "crane", "4", "plain"])
    write_report(made.result, tmp_path / "page.html")
    classes = read(tmp_path / "page.html")["classes"]
    shown = ["kite", "crane (class 1)", " (class 2)", "crane (class 3)", "4", "plain"]
    assert classes["name"] == shown
    assert classes["label"] == {"1": "1", "2": "2", "3": "3"}


def test_rows_without_keys_of_their_own_are_corrected_by_number(made, tmp_path):
    for keys in ([None] * len(made.keys), ["one"] * len(made.keys)):
        edited(made.result, key=pa.array(keys, pa.string()))
        write_report(made.result, tmp_path / "page.html")
        assert read(tmp_path / "page.html")["keyColumn"] == "row"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("calibrated_confidence", np.full(30, np.nan)),
        ("calibrated_confidence", np.full(30, 7.0)),
        ("calibrated_confidence", ["high"] * 30),
        ("confidence", None),
        ("zero_shot_confidence", None),
        ("zero_shot_confidence", np.full(30, -0.1)),
        ("known", np.ones(30)),
        ("neighbors", [[30]] * 30),
        ("neighbors", [[-1]] * 30),
        ("neighbors", ["0"] * 30),
        ("label", np.full(30, 6)),
        ("true_label", np.full(30, -2)),
        ("top5_labels", [[6]] * 30),
        ("top5_labels", [[5]] * 30),
        ("top5_confidences", [[np.nan] * 5] * 30),
    ],
)
def test_damaged_predictions_are_refused(name, values, made, tmp_path):
    edited(made.result, **{name: values})
    with pytest.raises(InputError, match=name) as refused:
        write_report(made.result, tmp_path / "page.html")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", ["x", ["x"], [None], {"a": "b"}, 3, None, [float("nan")]])
def test_odd_entries_of_a_run_are_left_out(value, made, tmp_path):
    names = ("objective", "changed", "graph", "seconds", "warnings", "inputs_sha256", "accuracy")
    set_run(made.result, **dict.fromkeys(names, value), features=value)
    assert write_report(made.result, tmp_path / "page.html")["shown"]["typical"]


@pytest.mark.parametrize("changed", [[0, 0, 0], [1, 0, 0], [70, 3, 0]])
def test_labels_changed_are_counted_from_zero(changed):
    with rc_context(STYLE):
        plot = steps_plot([-1.0, -2.0, -2.5], changed)
    ticks = re.findall(r">([^<>]*)</text>", plot)
    right = [int(tick) for tick in ticks[: ticks.index("labels changed")]]
    assert right[0] == 0
    assert max(1, *changed) / 2 <= right[-1] <= max(1, *changed)
