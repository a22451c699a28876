"""The command line used wrongly: what click and `main` say before a command begins."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
from PIL import Image

from transclip_fast import cli as command_line
from transclip_fast.cli import options, solve
from transclip_fast.cli.options import SeedType
from transclip_fast.encode.architectures import FOLDER_CONFIG


def commands(command: click.Command, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command below a command, with the words that call it."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        below = command.get_command(context, name)
        assert below is not None
        yield from commands(below, *path, name)


def test_what_is_required_and_left_out_is_named(cli):
    tried = 0
    for path, command in commands(command_line._cli):
        needed = [parameter for parameter in command.params if parameter.required]
        for missing in needed:
            words = {
                parameter: [parameter.opts[0], "x"] if parameter.opts[0][0] == "-" else ["x"]
                for parameter in needed
                if parameter is not missing
            }
            ran = cli(*path, *(word for pair in words.values() for word in pair))
            (line,) = ran.err.splitlines()
            assert (ran.code, ran.out) == (2, ""), (path, missing)
            what, name = line.removeprefix("error: Missing ").split()[:2]
            assert what == missing.param_type_name
            if what == "option":
                assert name == f"'{missing.opts[0]}';"
            assert line.endswith(f"see `{' '.join(('transclip-fast', *path))} --help`")
            tried += 1
    assert tried > len(command_line.COMMANDS)


def test_options_are_kept_as_files_or_as_names(tmp_path, monkeypatch):
    """Files start at the result, by the names they were given: caches link to files without one."""
    monkeypatch.chdir(tmp_path)
    for model in ("tuned", "ViT-B-32"):
        (tmp_path / model).mkdir()
    (tmp_path / "tuned" / FOLDER_CONFIG).write_text("{}")
    (tmp_path / "blob").touch()
    (tmp_path / "weights.pt").symlink_to("blob")

    def kept(*words):
        arguments = ["features.npz", "--out", "out/result", *words]
        with solve.command.make_context("solve", arguments):
            found = options.given_options("out/result", {"model", "pretrained"})
            return [option.get("file", option.get("value")) for option in found]

    files = ["../../tuned", "../../weights.pt"]
    assert kept("--model", "tuned", "--pretrained", "weights.pt") == files
    assert kept("--model", "ViT-B-32", "--pretrained", "openai") == ["ViT-B-32", "openai"]


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (SeedType, ("-1", "99999999999999999999"), "is no seed; they are whole numbers from 0"),
        (click.FloatRange, ("nan",), "got nan"),
    ],
)
def test_numbers_that_nothing_computes_with_are_refused(kind, values, message, cli):
    """Of each option of that kind: they end in a traceback, or in a file that cannot be read."""
    tried = 0
    for path, command in commands(command_line._cli):
        required = [parameter for parameter in command.params if parameter.required]
        words = [x for p in required for x in ([p.opts[0]] if p.opts[0][0] == "-" else []) + ["x"]]
        for option in command.params:
            if not isinstance(option.type, kind):
                continue
            for value in values:
                ran = cli(*path, *words, option.opts[0], value)
                assert (ran.code, ran.err.count("\n")) == (2, 1), (path, option)
                assert f"{option.opts[0]}" in ran.err
                assert message in ran.err
                tried += 1
    assert tried > 3


@pytest.mark.parametrize(
    ("word", "meant"),
    [("solv", "solve"), ("evalute", "evaluate"), ("train_head", "train-head"), ("xyz", None)],
)
def test_a_command_that_is_none(word, meant, cli):
    ran = cli(word)
    assert (ran.code, ran.out) == (2, "")
    hint = f". Did you mean {meant}?" if meant else ""
    assert ran.err == f"error: No such command '{word}'{hint}; see `transclip-fast --help`\n"


def test_no_words_are_answered_with_the_help(cli):
    ran = cli()
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("Usage: transclip-fast [OPTIONS] COMMAND")
    assert "Start here" in ran.err
    assert "error:" not in ran.err


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--max-iter", "nan"), "Invalid value for '--max-iter': 'nan' is not a valid integer"),
        (("--class-cost", "maybe"), "Invalid value for '--class-cost': 'maybe' is not one of"),
        (("--nothing",), "No such option '--nothing'"),
        (("y",), "Got unexpected extra argument (y)"),
    ],
)
def test_words_that_do_not_fit_are_one_line(words, what, refused):
    message = refused("solve", "x.npz", "--out", "out", *words)
    assert what in message
    assert message.endswith("see `transclip-fast solve --help`\n")


@pytest.mark.parametrize("command", ["solve", "compare", "train-head"])
def test_class_names_have_one_more_name(command, cli):
    """That of `run` and `encode`; help shows one."""
    for words in (("--classes",), ("x", "x", "--class-names", "x", "--classes")):
        ran = cli(command, *words)
        assert ran.code == 2
        assert ran.err.startswith("error: Option '--class-names' requires an argument; see ")
    assert "--classes" not in cli(command, "--help-all").out


def test_a_folder_of_another_kind_says_what_it_is(folder, solved, refused, tmp_path):
    """And what to name instead, as far as one can see."""
    out = tmp_path / "out"
    out.mkdir()
    folder.rename(out / "features")
    solved.rename(out / "result")
    (tmp_path / "photos/cats").mkdir(parents=True)
    (tmp_path / "photos/cats/1.JPG").write_bytes(b"x")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/notes.txt").write_text("x")
    result, features, new = out / "result", out / "features", ("--out", tmp_path / "new")
    assert f"did you mean {features}?" in refused("solve", out, *new)
    assert "it is a result folder; name the features" in refused("solve", result, *new)
    assert "it holds images; run or encode them" in refused("solve", tmp_path / "photos", *new)
    assert "is it a feature folder?" in refused("solve", tmp_path / "texts", *new)
    for command in ("evaluate", "suggest", "report"):
        assert f"did you mean {result}?" in refused(command, out)
    expected = f"error: {result}: is a result folder; the order is RESULT NEW_FEATURES"
    for other in (features, tmp_path / "features.npz"):
        assert refused("predict", other, result, *new).startswith(expected)


@pytest.mark.parametrize(
    "words",
    [
        "encode photos --classes names.txt --model RN50 --pretrained none --out names.txt",
        "run photos --classes names.txt --model RN50 --pretrained none --out names.txt",
        "demo --out names.txt",
    ],
)
def test_a_file_where_a_folder_is_to_be_written(words, cli, tmp_path, monkeypatch):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (9, 7)).save(tmp_path / "photos" / "x.png")
    monkeypatch.chdir(tmp_path)
    ran = cli(*words.split())
    assert ran.code == 2
    assert ran.err.splitlines()[-1].startswith("error: names.txt")
    assert ran.err.endswith(": is a file, or in one; name a folder\n")
    assert (tmp_path / "names.txt").read_text() == "cat\ndog\n"


def test_a_folder_where_a_file_is_to_be_written(solved, refused, tmp_path):
    (tmp_path / "page.html").mkdir()
    message = refused("report", solved, "--out", tmp_path / "page.html")
    assert message == f"error: {tmp_path / 'page.html'}: is a folder; name a file\n"


BROKEN = {  # a module's file that fails, and the line about it
    "torchvision": (
        'raise RuntimeError("operator torchvision::nms does not exist")',
        "torchvision: cannot be imported (operator torchvision::nms does not exist); torch and "
        "torchvision must come from one index: pip install --force-reinstall torch torchvision",
    ),
    "open_clip": (
        'raise OSError("libfoo.so: cannot open shared object file")',
        "open_clip: cannot be imported (libfoo.so: cannot open shared object file); reinstall it: "
        "pip install --force-reinstall --no-deps open_clip_torch",
    ),
}
BROKEN["open_clip "] = (
    "import gone_elsewhere",
    "open_clip: cannot be imported (No module named 'gone_elsewhere'); install what it needs: pip "
    "install gone_elsewhere",
)

BROKEN["open_clip  "] = (
    'raise ValueError("numpy.dtype size changed")',
    "open_clip: cannot be imported (numpy.dtype size changed); reinstall it: ",
)


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """Put a file in a library's place, which is not imported yet."""

    def install(library, text):
        folder = tmp_path / "libraries"
        folder.mkdir()
        (folder / f"{library}.py").write_text(text)
        monkeypatch.syspath_prepend(folder)
        for name in [*command_line.sys.modules]:
            if name.partition(".")[0] in ("torchvision", "open_clip"):
                monkeypatch.delitem(command_line.sys.modules, name)
        monkeypatch.delitem(command_line.sys.modules, "transclip_fast.demo.model", raising=False)
        monkeypatch.delitem(command_line.sys.modules, "transclip_fast.cli.demo", raising=False)

    return install


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize(
    "words",
    [
        "demo --out out",
        "run photos --classes names.txt --model RN50 --out out",
        "encode photos --model RN50 --out out",
        "convert x.pt --model RN50 --out y.safetensors",
    ],
)
def test_a_library_that_cannot_be_imported(words, case, broken, cli, tmp_path, monkeypatch):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    (tmp_path / "x.pt").write_bytes(b"x")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (9, 7)).save(tmp_path / "photos" / "x.png")
    monkeypatch.chdir(tmp_path)
    text, expected = BROKEN[case]
    broken(case.strip(), text)
    ran = cli(*words.split())
    assert ran.code == 2
    assert ran.err.startswith(f"error: {expected}")
    assert ran.err.endswith("; `transclip-fast doctor` checks all of them\n")
    assert ran.err.count("\n") == 1


def test_errors_of_the_program_stay_errors(monkeypatch):
    def fail(**_):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(command_line, "_cli", fail)
    with pytest.raises(RuntimeError, match="a mistake"):
        command_line.main()


@pytest.mark.parametrize("case", BROKEN)
def test_doctor_blames_the_library_that_is_broken(case, broken, cli):
    text, expected = BROKEN[case]
    broken(case.strip(), text)
    ran = cli("doctor")
    problems = [line for line in ran.out.splitlines() if line.startswith("PROBLEM")]
    assert ran.code == 1
    assert problems[0].startswith(f"PROBLEM  {expected}")
    after = ["PROBLEM  open_clip: needs torchvision; repair that first"]
    assert problems[1:] == (after if case == "torchvision" else [])
