"""README and docs: links lead somewhere, commands and options exist, examples run."""

import re
import runpy
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest

from transclip_fast.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
CODE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
EXAMPLES = sorted(file.name for file in (ROOT / "examples").glob("*.py"))
STARTS = (["transclip-fast"], ["-m", "transclip_fast.cli"])


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


def commands(page):
    """The words of every command of ours in the code of a page."""
    for language, code in CODE.findall(page.read_text()):
        if language not in ("bash", "sh"):
            continue
        for line in code.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                for start in STARTS:
                    for i in range(len(words)):
                        if words[i : i + len(start)] == start:
                            yield words[i + len(start) :]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page):
    for name, *words in commands(page):
        assert name in COMMANDS
        command = import_module(f"transclip_fast.cli.{name.replace('-', '_')}").command
        command = getattr(command, "commands", {}).get(words[0] if words else "", command)
        known = {option for parameter in command.params for option in parameter.opts}
        known |= {option for parameter in command.params for option in parameter.secondary_opts}
        assert {word for word in words if word.startswith("-")} <= known, name


def test_there_are_commands_to_check():
    assert len([words for page in PAGES for words in commands(page)]) > 20


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.filterwarnings("ignore")
def test_examples_run(name, monkeypatch, capfd):
    arguments = ["3000"] if name == "stream.py" else []
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert capfd.readouterr().out.count("\n") >= 3
