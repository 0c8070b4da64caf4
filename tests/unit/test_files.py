"""What an output leads to is written as a shell would write it, and whole or not at all."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from abft_fast.errors import UserError
from abft_fast.runtime.files import atomic_file, atomic_folder, check_output, write_text

pytestmark = pytest.mark.unit


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    real, link = tmp_path / "far/real.md", tmp_path / "link.md"
    link.symlink_to("far/real.md")
    for text in ("first", "second"):  # to a free name, and to a file
        check_output(link)
        write_text(link, text)
        assert link.is_symlink()
        assert real.read_text() == text
    assert os.listdir(tmp_path / "far") == ["real.md"]


def test_a_link_in_a_circle_is_refused(tmp_path):
    link = tmp_path / "link.md"
    link.symlink_to("link.md")
    with pytest.raises(UserError, match=r"link.md: Too many levels of symbolic links"):
        check_output(link)


def test_a_link_to_a_missing_folder_is_refused(tmp_path):
    (tmp_path / "link.md").symlink_to("far/real.md")
    with pytest.raises(UserError, match=r"far does not exist"):
        check_output(tmp_path / "link.md")


def test_mode_and_owner_stay(tmp_path):
    path = tmp_path / "a.md"
    path.touch()
    path.chmod(0o620)
    owner = (1, 2) if os.geteuid() == 0 else (os.getuid(), os.getgid())
    os.chown(path, *owner)
    write_text(path, "new")
    status = path.stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o620, *owner)


def test_a_new_file_has_the_mode_that_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a.md", "new")
    finally:
        os.umask(before)
    assert (tmp_path / "a.md").stat().st_mode & 0o777 == 0o640


def test_a_pipe_is_written_to_and_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True)
    check_output(pipe)
    write_text(pipe, "through\n")
    assert reader.communicate(timeout=20)[0] == "through\n"
    assert pipe.is_fifo()


@pytest.mark.skipif(not os.path.lexists("/proc/self/fd"), reason="no /proc/self/fd here")
def test_an_open_descriptor_keeps_what_was_written_before_and_after(tmp_path):
    """By a link as /dev/stdout is, which a fault would replace for the whole machine."""
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    code = (
        "from pathlib import Path\n"
        "from abft_fast.runtime.files import check_output, write_text\n"
        f"path = Path({str(tmp_path / 'stdout')!r})\n"
        "print('before', flush=True)\n"
        "check_output(path)\n"
        "write_text(path, 'between\\n')\n"
        "print('after')\n"
    )
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "before\nbetween\nafter\n"


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "same.csv"
    with atomic_file(path) as first, atomic_file(path) as second:
        for row in range(3):
            first.write(f"first {row}\n")
            second.write(f"second {row}\n")
    assert path.read_text() == "first 0\nfirst 1\nfirst 2\n"  # it ends last
    assert os.listdir(tmp_path) == ["same.csv"]


def test_a_folder_that_another_process_made_is_not_replaced(tmp_path):
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "a") as temporary:
        (temporary / "mine").touch()
        (tmp_path / "a").mkdir()
        (tmp_path / "a/theirs").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "theirs"]


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127])
def test_the_longest_name_is_written(name, tmp_path):
    write_text(tmp_path / name, "long")
    assert os.listdir(tmp_path) == [name]


def test_a_file_that_is_mounted_by_itself_is_overwritten(tmp_path):
    """As `docker run -v FILE:FILE` mounts it: no other file can take its place."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.touch()
    outside.write_text("old and longer")
    mount = ["unshare", "--mount", "--map-root-user", "sh", "-ec"]
    code = (
        "from pathlib import Path; from abft_fast.runtime.files import write_text;"
        f"write_text(Path({str(inside)!r}), 'new')"
    )
    bind = f"mount --bind {outside} {inside}"
    if not shutil.which("unshare") or subprocess.run([*mount, bind], check=False).returncode:
        pytest.skip("nothing may be mounted here")
    subprocess.run([*mount, f'{bind}; exec "$@"', "sh", sys.executable, "-c", code], check=True)
    assert outside.read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["inside", "outside"]


def test_a_hard_link_to_an_input_is_refused(tmp_path):
    (tmp_path / "input.csv").write_text("text\nfine\n")
    os.link(tmp_path / "input.csv", tmp_path / "other.csv")
    with pytest.raises(UserError, match="is a file that the command reads"):
        check_output(tmp_path / "other.csv", read=[tmp_path / "input.csv"])


def test_a_socket_is_refused(tmp_path):
    import socket

    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(tmp_path / "s"))
        with pytest.raises(UserError, match="cannot be written to"):
            check_output(Path(tmp_path / "s"))
