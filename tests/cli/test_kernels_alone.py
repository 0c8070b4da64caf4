"""The distribution abft-kernels, built from kernels/ and installed alone, runs its README."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from email.parser import HeaderParser
from pathlib import Path

import pytest

import abft_fast

pytestmark = pytest.mark.cli

ROOT = Path(__file__).parents[2]
# What runs after README's example, in the same process.
CHECK = """
import sys
import abft_kernels, abft_kernels.fused
imported = {name.partition(".")[0] for name in sys.modules}
print(abft_kernels.__file__, *sorted(imported & {"transformers", "abft_fast"}))
"""


def run(*command):
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Site-packages of a fresh environment with abft-kernels, and its python.

    torch is this environment's, by a path alone: editable installs and other hooks are not run.
    """
    folder = tmp_path_factory.mktemp("alone")
    ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    shutil.copytree(ROOT / "kernels", folder / "source", ignore=ignored)
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    site = Path(run(python, "-I", "-c", "import site; print(*site.getsitepackages())").strip())
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "install", *options, "--target", site, folder / "source")
    (site / "torch.pth").write_text(sysconfig.get_path("purelib"))
    return site, python


def test_the_readme_runs_without_transformers(installed):
    site, python = installed
    readme = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (expected,) = re.findall(r"```text\n(.*?)```", readme, re.DOTALL)
    printed = run(python, "-I", "-c", code + CHECK)  # no PYTHONPATH
    assert printed == f"{expected}{site / 'abft_kernels' / '__init__.py'}\n"


def test_the_wheel_has_the_whole_package_and_asks_what_abft_fast_asks(installed):
    site, _ = installed
    package = ROOT / "kernels" / "abft_kernels"
    files = {
        path.relative_to(package) for path in package.rglob("*") if "__pycache__" not in path.parts
    }
    assert {path for path in files if not (site / "abft_kernels" / path).exists()} == set()
    assert not list(site.glob("abft_fast*"))

    alone, whole = (
        tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for folder in (ROOT / "kernels", ROOT)
    )
    assert set(alone["dependencies"]) < set(whole["dependencies"])
    assert alone["version"] == abft_fast.__version__
    (metadata,) = site.glob("abft_kernels-*.dist-info")
    assert list(metadata.rglob("LICENSE"))
    fields = HeaderParser().parsestr((metadata / "METADATA").read_text())
    assert len(fields.get_all("Requires-Dist")) == len(alone["dependencies"])
