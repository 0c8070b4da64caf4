"""Standard streams that are closed, full, or of another encoding."""

import subprocess

import pytest

from tests.command_line import COMMAND, environment

pytestmark = pytest.mark.cli

PREDICT = "predict --demonstrations demos.csv --input queries.csv --device cpu"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "demos.csv").write_text("text,label\na delight,good\ntwo hours lost,bad\n")
    (tmp_path / "queries.csv").write_text("id,text\n1,café 😀 triumph\n")
    return tmp_path


def in_shell(arguments, folder, **variables):
    """Run the command as a shell does, with its redirections; the output is bytes."""
    return subprocess.run(
        ["sh", "-c", f"'{COMMAND}' {arguments}"], cwd=folder, capture_output=True, timeout=300,
        env={**environment(), **variables}, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("command", [PREDICT, "plan", "doctor", "table .", "eval"])
def test_what_is_only_printed_is_not_computed_for_a_closed_output(command, folder):
    result = in_shell(f"{command} >&-", folder)
    line = "abft-fast: standard output is closed, so the result would be lost: send it to a file"
    assert (result.returncode, result.stderr.decode().splitlines()) == (2, [line])


def test_a_file_is_written_with_all_streams_closed(folder):
    result = in_shell(f"{PREDICT} --output out.csv <&- >&- 2>&-", folder)
    assert result.returncode == 0
    header, row = (folder / "out.csv").read_text().splitlines()
    assert header == "id,text,prediction,p_bad,p_good"
    assert row.startswith("1,café 😀 triumph,")


@pytest.mark.parametrize("command", [PREDICT, "--help"])
def test_a_full_disk_behind_the_output(command, folder):
    result = in_shell(f"{command} > /dev/full", folder)
    assert result.returncode == 1
    last = result.stderr.decode().splitlines()[-1]
    assert last == "abft-fast: the disk is full: standard output"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_help_in_any_encoding(encoding, folder):
    result = in_shell("train --help", folder, PYTHONIOENCODING=encoding)
    assert (result.returncode, result.stderr) == (0, b"")
    assert "--penalty" in result.stdout.decode(encoding)


def test_help_cuts_nothing_in_80_columns(folder):
    lines = in_shell("train --help", folder, COLUMNS="80").stdout.decode().splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) < 300
    assert "(`synthetic:llama3-70b:4`: of its first four layers)" in " ".join(map(str.strip, lines))


def test_predictions_are_utf8_in_any_locale(folder):
    result = in_shell(PREDICT, folder, PYTHONIOENCODING="latin-1")
    assert result.returncode == 0
    assert "\n1,café 😀 triumph," in result.stdout.decode()


def test_a_name_that_is_not_utf8_is_printed(folder):
    result = in_shell("plan --model \"$(printf 'no\\377')/a/b\"", folder)
    assert result.returncode == 2
    assert result.stderr.decode().startswith("abft-fast: model folder no\\udcff/a/b does not exist")


def test_an_empty_world_size(folder):
    assert in_shell(PREDICT, folder, WORLD_SIZE="", RANK="", LOCAL_RANK="").returncode == 0
    result = in_shell("doctor", folder, WORLD_SIZE="two")
    line = "abft-fast: environment variable WORLD_SIZE is 'two', not a number: unset it"
    assert (result.returncode, result.stderr.decode().splitlines()) == (2, [line])
