"""`abft_fast.__version__` is the version of the package, the citation and the changelog."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import abft_fast

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]


def test_the_installed_package_has_it():
    assert version("abft-fast") == abft_fast.__version__


def test_the_kernels_alone_have_it():
    kernels = tomllib.loads((ROOT / "kernels" / "pyproject.toml").read_text())
    assert kernels["project"]["version"] == abft_fast.__version__


def test_citation_and_changelog_have_it():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == abft_fast.__version__
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert abft_fast.__version__ in headings[:2]  # above it only [Unreleased]
    assert headings[0] in {abft_fast.__version__, "Unreleased"}
