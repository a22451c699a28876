"""CHANGELOG, CITATION.cff, pyproject.toml and the issue templates agree with the package."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib

from transclip_fast.cli import COMMANDS
from transclip_fast.version import __version__

ROOT = Path(__file__).parents[1]
TEMPLATES = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.md"))


def test_the_citation_names_the_software_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["type"], citation["license"]) == ("software", "Apache-2.0")
    assert citation["version"] == __version__
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == [
        "Zanella",
        "Gérin",
        "Ben Ayed",
    ]


def test_the_changelog_has_this_version_and_every_command():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert __version__ in text
    assert [name for name in COMMANDS if f"`{name}`" not in text] == []


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.name)
def test_templates_have_what_github_reads(file):
    _, front, body = file.read_text().split("---\n", 2)
    assert {"name", "about", "labels"} == set(yaml.safe_load(front))
    assert body.strip()


def test_there_are_templates():
    assert len(TEMPLATES) == 3


@pytest.mark.skipif(sys.version_info < (3, 11), reason="no tomllib")
def test_everything_that_is_imported_is_declared():
    """Also what another dependency happens to bring."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = [*project["project"]["dependencies"]]
    listed += [
        x for name in ("cpu", "cuvs") for x in project["project"]["optional-dependencies"][name]
    ]
    declared = {plain(re.match(r"[\w.-]+", line)[0]) for line in listed}
    distributions, missing = packages_distributions(), set()
    for file in (ROOT / "transclip_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            for module in {name.partition(".")[0] for name in names if name}:
                found = {plain(name) for name in distributions.get(module, [])}
                if module != "transclip_fast" and found and not found & declared:
                    missing.add(module)
    assert missing <= {"sklearn"}  # optional: its estimator tags


def plain(name):
    return name.lower().replace("_", "-")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="no tomllib")
def test_every_folder_of_code_is_packaged():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    files = (file.relative_to(ROOT) for file in (ROOT / "transclip_fast").rglob("*.py"))
    folders = {".".join(file.parent.parts) for file in files} | {"transclip_fast.kernels"}
    assert folders <= {*project["tool"]["setuptools"]["packages"]}
