"""README and the pages: their links lead somewhere, their drawings are what the scripts draw."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REPOSITORY = PYPROJECT["project"]["urls"]["Repository"]
RAW = REPOSITORY.replace("https://github.com", "https://raw.githubusercontent.com")
FIGURES = ROOT / "docs" / "figures"


def name_of(page):
    return str(page.relative_to(ROOT))


def test_readme_is_read_in_five_minutes():
    assert len(README.splitlines()) <= 150


def test_every_link_of_readme_is_absolute():
    """On the package index there is no file beside README."""
    for target in re.findall(r"\]\(([^)]*)\)", README):
        assert target.startswith("https://"), target


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=name_of
)
def test_links_into_the_repository_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(rf"{REPOSITORY}/(?:blob|tree)/main/([^)#\s]*)", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(rf"{RAW}/main/([^)#\s]*)", text):
        assert (ROOT / path).exists(), path
    addresses = re.findall(r"https://(?:raw\.)?github(?:usercontent)?\.com/abft-fast/[\w-]*", text)
    assert set(addresses) <= {REPOSITORY, RAW}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_between_pages_lead_to_files(page):
    """The site's build also checks anchors; this runs without its packages."""
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]*)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_site_lists_every_page():
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in PAGES}


def test_the_drawings_are_what_the_script_draws_and_its_layers_the_contract(tmp_path):
    code = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import draw\n"
        "for name, content in draw.contents().items():\n"
        "    (pathlib.Path(sys.argv[2]) / name).write_text(content, encoding='utf-8')\n"
        "print(*(names for names, _ in draw.LAYERS), sep='\\n')"
    )
    command = [sys.executable, "-c", code, FIGURES, tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    drawn = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    for name, content in drawn.items():
        assert (FIGURES / name).read_text(encoding="utf-8") == content, "run `make figures`"
    assert {path.name for path in FIGURES.glob("*.svg")} == {*drawn, "icon.svg"}
    contracts = PYPROJECT["tool"]["importlinter"]["contracts"]
    [layers] = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    shown = [re.findall(r"\w+", line) for line in result.stdout.splitlines()]
    assert shown == [re.findall(r"\w+", layer.replace("abft_fast.", "")) for layer in layers]


def test_the_architecture_page_names_every_package_and_files_that_exist():
    page = (ROOT / "docs/contributing/architecture.md").read_text(encoding="utf-8")
    folders = {path.parent.name for path in (ROOT / "abft_fast").glob("*/__init__.py")}
    described = set(re.findall(r"^\*\*`(\w+)`\*\*", page, re.MULTILINE))
    assert described == folders | {"prompts", "errors", "abft_kernels"}
    packages, changes = page.split("## Where does a change go?")
    for package, text in re.findall(r"^\*\*`(\w+)`\*\*(.*?)\n\n", packages, re.M | re.DOTALL):
        folder = ROOT / (
            "kernels/abft_kernels" if package not in folders else f"abft_fast/{package}"
        )
        for module in re.findall(r"`([\w/]+)`", text):
            path = folder / module
            assert path.is_dir() or path.with_suffix(".py").is_file(), f"{package}: {module}"
    paths = re.findall(r"`((?:abft_fast|kernels|tests|docs)/[^`]*)`", changes)
    assert len(paths) >= 5
    for path in paths:
        assert (ROOT / path).exists(), path
