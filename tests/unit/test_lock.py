"""A folder is held by one process, as long as that process lives."""

import errno
import fcntl
import subprocess
import sys

import pytest

from abft_fast.errors import UserError
from abft_fast.runtime import lock

pytestmark = pytest.mark.unit

HOLD = """
import sys
from pathlib import Path
from abft_fast.runtime.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]), "busy", print)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lock_ends_with_its_process(tmp_path):
    lock.check_free(tmp_path, "busy")
    assert not list(tmp_path.iterdir())
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="busy"):
            lock.FolderLock(tmp_path, "busy", print)
        with pytest.raises(UserError, match="busy"):
            lock.check_free(tmp_path, "busy")
        holder.kill()
    lock.check_free(tmp_path, "busy")
    lock.FolderLock(tmp_path, "busy", print).close()


def test_a_file_system_without_locks_is_used_and_named(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    lines = []
    lock.check_free(tmp_path, "busy")
    lock.FolderLock(tmp_path, "busy", lines.append).close()
    (line,) = lines
    assert line.startswith(f"{tmp_path} cannot be locked (No locks available)")
