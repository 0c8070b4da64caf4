"""What a block has printed has arrived, or a line says that it has not."""

import errno
import os
import subprocess
import sys

import pytest

from abft_fast.errors import RunError
from abft_fast.runtime.streams import stdout_complete

pytestmark = pytest.mark.unit


def test_a_pipe_whose_reader_leaves_is_named(tmp_path):
    with pytest.raises(RunError, match="out was closed before all was written"), stdout_complete():
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE), "out")


def test_a_reader_of_standard_output_that_leaves():
    code = (
        "from abft_fast.runtime.streams import stdout_complete\n"
        "with stdout_complete():\n"
        "    print('x' * 100_000)\n"
    )
    result = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -c "$1" | true', "sh", code],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    last = result.stderr.splitlines()[-1]
    assert last.endswith("RunError: standard output was closed before all was written")
    assert "Exception ignored" not in result.stderr
