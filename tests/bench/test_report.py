"""README states measured figures, and no others."""

import json
import shutil

import pytest

from bench import million_tables, report, tables
from bench.common import RESULTS, ROOT


def line(date="2026-01-01", dirty=False, **row):
    facts = {"cpu": "a CPU", "cores": 2, "memory_gb": 8.0, "gpu": None, "python": "3.11"}
    machine = {**facts, "torch": "2.15", "commit": "abcdef123456", "dirty": dirty}
    return json.dumps({"date": date, "command": "python -m bench.x", "machine": machine, **row})


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """What the report reads and writes, to be spoilt."""
    for name in report.DOCUMENTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for folder in ("results", "plots"):
        shutil.copytree(ROOT / "bench" / folder, tmp_path / "bench" / folder)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    return tmp_path


def test_documents_and_plots_are_what_the_results_say():
    assert report.check(ROOT) == []


def test_every_block_has_its_place():
    text = "".join((ROOT / name).read_text() for name in report.DOCUMENTS)
    names = [found[2] for found in report.MARKED.finditer(text)]
    assert sorted(names) == sorted(report.BLOCKS)
    lines = text.splitlines()
    assert len([x for x in lines if x.startswith("<!-- report:")]) == len(names)
    assert lines.count("<!-- end -->") == len(names)


def test_a_figure_that_was_changed_by_hand_is_found(copy, capsys):
    page = copy / "docs" / "speed.md"
    figure = tables.seconds(tables.newest("graph", "case", "queries", "dim")[-1]["seconds"])
    assert figure in page.read_text()
    page.write_text(page.read_text().replace(figure, "1 s"))
    assert report.main(["--check"]) == 1
    assert "docs/speed.md differs from bench/results" in capsys.readouterr().out


def test_a_new_result_makes_documents_and_plots_stale(copy, capsys):
    file = copy / "bench" / "results" / "sparse.jsonl"
    row = json.loads(file.read_text().splitlines()[-1])
    row["date"], row["arms"]["sparse"]["median"] = "2999-01-01", 123.0
    file.write_text(file.read_text() + json.dumps(row) + "\n")
    assert report.main(["--check"]) == 1
    printed = capsys.readouterr().out
    assert "docs/speed.md differs from bench/results" in printed
    assert "bench/plots/sparse.png is stale" in printed
    assert "speed.png" not in printed
    pytest.importorskip("matplotlib")
    assert report.main([]) == 0
    assert "| 123 s |" in (copy / "docs" / "speed.md").read_text()
    assert report.main(["--check"]) == 0


def test_drawing_again_makes_no_difference(tmp_path):
    pytest.importorskip("matplotlib")
    from bench.drawing import DRAWN, draw

    found = report.drawn_from(RESULTS)
    assert found.keys() == DRAWN.keys()
    found["stream"] = [json.loads(stream_line(n)) for n in (1000, 2000)]
    for name, rows in found.items():
        files = [tmp_path / f"{name}-{i}.png" for i in range(2)]
        for file in files:
            draw(name, rows, file, report.digest(rows))
        assert files[0].read_bytes() == files[1].read_bytes()


def test_newest_clean_line_of_each_measurement(tmp_path):
    lines = [
        line("2026-01-03", n=10, x="newest"),
        line("2026-01-01", n=10, x="older, appended later"),
        line("2026-01-09", n=10, dirty=True, x="uncommitted code"),
        line("2026-01-09", n=10, dirty=None, x="no repository"),
        line("2026-01-02", n=5, x="smaller"),
    ]
    (tmp_path / "some.jsonl").write_text("\n".join(lines) + "\n")
    assert [row["x"] for row in tables.newest("some", "n", folder=tmp_path)] == [
        "smaller",
        "newest",
    ]
    assert tables.newest("none", "n", folder=tmp_path) == []


def test_machine_date_and_commit_are_named():
    rows = [json.loads(line("2026-02-03T10:00", n=1)), json.loads(line("2026-02-03T11:00", n=2))]
    note = tables.source(rows)
    assert "a CPU, 2 cores, 8 GB" in note
    assert note.count("`python -m bench.x` at abcdef1, 2026-02-03") == 1


@pytest.mark.parametrize(
    "text", ["took 12 s", "in 0.5 ms", "uses 3 GB", "is 20x faster", "4 minutes"]
)
def test_a_figure_outside_the_markers_is_found(text):
    assert report.stated(f"It {text}.\n") == [f"It {text}."]
    assert (
        report.stated(f"`{text}`\n```\n{text}\n```\n<!-- report: gpu -->\n{text}\n<!-- end -->")
        == []
    )


def test_an_unknown_name_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="no report is named 'nothing'"):
        report.rewritten("<!-- report: nothing -->\n<!-- end -->", tmp_path, "README.md")


def stream_line(classes):
    done = {"seconds": 50.0, "peak_bytes": 2e9, "planned_bytes": 2.5e9}
    done |= {"read_bytes": 3e9, "feature_bytes": 1e9}
    sizes = [done, done | {"seconds": 101.0}]
    return line(queries=[100_000, 200_000], classes=classes, dim=512, sizes=sizes)


def test_streams_beside_their_plan(tmp_path):
    assert "Not recorded yet" in million_tables.stream(tmp_path)
    (tmp_path / "stream.jsonl").write_text(stream_line(1000) + "\n")
    found = million_tables.stream(tmp_path)
    assert "| 50.0 s | 500 µs | 2.00 GB | 2.50 GB | 1.00 GB | 3.0 times |" in found
    assert "| 101 s |" in found


@pytest.mark.parametrize(
    ("share", "text"), [(1.0, "100.00 %"), (0.99996, "99.99 %"), (0.5, "50.00 %")]
)
def test_nearly_all_is_not_all(share, text):
    assert tables.percent(share) == text


def test_a_million_images_take_what_was_measured(tmp_path):
    def write(name, **row):
        (tmp_path / f"{name}.jsonl").write_text(line(**row) + "\n")

    write("encode", median={"encode": 100.0}, options={"model": "m"})
    write("graph", case="million", dim=64, seconds=12.34)
    sizes = [{"seconds": 5.0}, {"seconds": 61.5}]
    shape = {"classes": 1000, "dim": 64, "present": 0, "published": False}
    write("stream", queries=[1000, 10**6], sizes=sizes, **shape)
    text = million_tables.million(tmp_path)
    assert "| encode with m, extrapolated from fewer images | 3 hours |" in text
    assert "| find neighbours, d = 64 | 12.3 s |" in text
    assert "| then label with 1,000 classes, d = 64 | 61.5 s |" in text


def test_kills_of_one_of_several_processes_are_told(tmp_path):
    rows = []
    for what in ("graph", "solve"):
        options = {"what": what, "ranks": [2, 3], "kills": 10}
        rows.append(line(what=what, options=options, runs=10, identical=10, kills=[1] * 10))
    (tmp_path / "kill_ranks.jsonl").write_text("\n".join(rows) + "\n")
    for what in ("graph", "solve"):
        assert f"| `{what}` on 2 or 3 processes | 10 | 10 | 10 |" in tables.kills(tmp_path)
