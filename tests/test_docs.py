"""README, docs and --help: links lead somewhere, commands, snippets and examples run."""

import importlib
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click
import pytest

from tests import scene
from transclip_fast import TransCLIP, demo
from transclip_fast.cli import COMMANDS, _cli
from transclip_fast.cli import demo as demo_command
from transclip_fast.cli.plan import plan_of_size
from transclip_fast.demo.data import SHIFTS
from transclip_fast.encode.weights import WatchedFiles
from transclip_fast.heads import SETTINGS
from transclip_fast.methods.base import Setting
from transclip_fast.methods.tim import TIM

ROOT = Path(__file__).parents[1]
NAMES = "README.md", "CONTRIBUTING.md", "CHANGELOG.md"
PAGES = [*(ROOT / name for name in NAMES), *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
CODE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
EXAMPLES = sorted(file.name for file in (ROOT / "examples").glob("*.py"))
SCREEN_LINES, SCREEN_COLUMNS = 40, 80
NOT_OURS = {  # starts of shell lines that no test runs, and what does
    "git clone ": "a reader's own copy",
    "cd ": "a reader's own copy",
    "pip install ": ".ci/run installs into a fresh environment",
    "pre-commit install": "changes the reader's repository",
    "pytest ": ".ci/run",
    "python -m bench.gpu.check ": "needs a GPU; tests/bench/gpu runs its parts in the interpreter",
    "bash .ci/run": "runs this test",
}


def helps():
    """The context of each --help, by the command's words."""
    root = click.Context(_cli, info_name="transclip-fast", **_cli.context_settings)
    root.terminal_width = SCREEN_COLUMNS
    found = {"": root}
    for name in COMMANDS:
        command = _cli.get_command(root, name)
        found[name] = click.Context(command, root, name)
        for part, subcommand in getattr(command, "commands", {}).items():
            found[f"{name} {part}"] = click.Context(subcommand, found[name], part)
    return found


HELPS = helps()


def shell(page):
    """The lines of shell in a page."""
    return "".join(code for language, code in CODE.findall(page.read_text()) if language == "bash")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = [found for found in LINK.findall(page.read_text()) if "://" not in found[0]]
    assert links or page.name not in ("README.md", "method.md")
    for target, _ in links:
        assert (page.parent / target).exists(), target


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_anchors_exist(page):
    for target, anchor in LINK.findall(page.read_text()):
        if anchor and "://" not in target:
            assert anchor in anchors((page.parent / target).resolve()), (target, anchor)


@pytest.mark.parametrize("words", HELPS)
def test_help_fits_on_a_screen(words):
    lines = HELPS[words].get_help().splitlines()
    height = sum(max(1, -(-len(line) // SCREEN_COLUMNS)) for line in lines)
    assert height <= SCREEN_LINES, "leave options out of `shown`, move text behind the form feed"


@pytest.mark.parametrize("words", [words for words in HELPS if words])
def test_help_all_has_every_option(words, monkeypatch, capsys):
    command = HELPS[words].command
    options = [part for part in command.params if isinstance(part, click.Option)]
    flag = "--help-all" if any(part.name == "help_all" for part in options) else "--help"
    with pytest.raises(SystemExit) as stopped:
        _cli.main([*words.split(), flag], "transclip-fast")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for option in options:
        assert re.search(rf"^  (-\w, )?{option.opts[0]}\b", text, re.MULTILINE), option.name


def test_help_all_has_sections():
    context = helps()["solve"]
    assert "--kl-weight" not in context.get_help()
    context.meta["help_all"] = True
    text = context.get_help()
    titles = [line for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert titles[:2] == ["Options:", "Advanced:"]
    places = [text.index(x) for x in ("--recall", titles[2], "--prior-logits", titles[3])]
    places += [text.index(x) for x in ("--kl-weight", titles[4], "--backend")]
    assert places == sorted(places)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with everything that the documents name, and a runner of commands in it."""
    backbone = demo.backbone()
    patches = {
        "load_backbone": lambda *_, **__: backbone,
        "identify": lambda *_: backbone.identity,
        "watch_weights": lambda *_: WatchedFiles({}),
    }
    folder = tmp_path_factory.mktemp("documents")
    with pytest.MonkeyPatch.context() as patch:
        for name, function in patches.items():
            patch.setattr(f"transclip_fast.encode.models.{name}", function)
        patch.setattr("transclip_fast.cli.towers.load_backbone", patches["load_backbone"])
        patch.setattr("transclip_fast.encode.batch_size.TIMED_SECONDS", 0)
        for name, (prompt, schedule) in SETTINGS.items():
            short = replace(prompt, n_ctx=4), replace(schedule, epochs=1)
            patch.setitem(SETTINGS, name, short)
        patch.setitem(TIM.grid, "max_iter", Setting(2, whole=True))  # 125 of these solves
        patch.chdir(folder)
        scene.make(folder, run)
        yield folder


def run(words):
    """Run a command in this process; it must succeed."""
    added = [] if "--synthetic" in words else scene.ADDED.get(words[0], [])
    context = _cli.make_context("transclip-fast", [*words, *added])
    with context:
        _cli.invoke(context)


@pytest.fixture
def copy(workplace, tmp_path, monkeypatch):
    """A copy of the folder, and the current one."""
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_all(code):
    """Run the commands in lines of shell, one after the other."""
    for words in scene.commands(code):
        if words[0] not in scene.NOT_RUN:
            run(words)


@pytest.mark.parametrize("words", HELPS)
def test_examples_of_help_run(words, copy, one_thread):
    assert list(scene.commands(HELPS[words].command.help))
    run_all(HELPS[words].command.help)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_pages_run(page, copy, one_thread):
    run_all(shell(page))
    variables = scene.variables(copy)
    for language, code in CODE.findall(page.read_text()):
        assert language in ("", "bash", "python")
        if language == "python":
            exec(code, variables)  # noqa: S102 - our own pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_of_shell_is_passed_over(page):
    lines = re.sub(r"\\\n\s*", "", shell(page)).splitlines()
    for part in (part.strip() for line in lines for part in line.split("&&") if part.strip()):
        assert list(scene.commands(part)) or part.startswith(tuple(NOT_OURS)), part


def test_benchmarks_exist():
    pages = (ROOT / "bench/README.md").read_text()
    modules = set(re.findall(r"^    python -m (bench[\w.]+)", pages, re.MULTILINE))
    assert len(modules) > 20
    for module in modules:
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize(
    "words",
    [[name, "3000"] if name == "stream.py" else [name] for name in EXAMPLES]
    + [["label_folder.py", "photos", "names.txt"]],
    ids=" ".join,
)
@pytest.mark.filterwarnings("ignore")
def test_examples_run(words, copy, monkeypatch, capfd):
    """Their commands run in this process, and the demo on one of its sets."""
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(demo_command, "SHIFTS", {"blur": SHIFTS["blur"]})

    def in_this_process(command, check):
        assert command[:3] == [sys.executable, "-m", "transclip_fast.cli"]
        run([*map(str, command[3:])])

    monkeypatch.setattr(subprocess, "run", in_this_process)
    found = runpy.run_path(str(ROOT / "examples" / words[0]), run_name="__main__")
    assert capfd.readouterr().out.count("\n") >= 3
    if words[0] == "stream.py":  # the million rows of its docstring would take minutes
        shape = 10**6, found["n_classes"], found["dim"]
        plan = plan_of_size(shape, TransCLIP(memory=found["memory_of"](10**6)), "faiss")
        assert not plan.layout.held
