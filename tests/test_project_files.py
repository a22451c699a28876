"""CHANGELOG, CITATION.cff and the issue templates agree with the package."""

from pathlib import Path

import pytest
import yaml

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
