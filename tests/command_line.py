"""The command line as a user runs it, each time in a process of its own."""

import ctypes
import multiprocessing
import os
import resource
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None

COMMAND = Path(sys.executable).with_name("abft-fast")

QUICK = [
    "--dataset", "trec", "--k", "2", "--train-samples", "40",
    "--epochs", "2", "--device", "cpu",
]  # fmt: skip

FEW_QUERIES = ["--test-samples", "64"]  # of 512, where figures are only compared

# A server imports once what a command takes ten seconds to import, and forks a process a command.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    [f"abft_fast.commands.{name}" for name in ("train", "plan", "predict", "merge", "doctor")]
    + [f"abft_fast.commands.analyze.{name}" for name in ("attention", "restrict", "show")]
    + ["abft_fast.experiments.sweep", "transformers.models.smollm3.modeling_smollm3"]
)


def environment():
    return {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def abft_fast(*arguments, cwd=None, largest_file=None):
    """Run to the end; the completed process with its output as text.

    `largest_file` bytes is all a file may hold, as on a disk without room. Permissions hold for
    root too.
    """
    arguments = [str(COMMAND), *map(str, arguments)]
    readers, writers = zip(*(_PROCESSES.Pipe(duplex=False) for _ in range(2)), strict=True)
    process = _PROCESSES.Process(
        target=_main, args=(arguments, cwd or Path.cwd(), environment(), largest_file, writers)
    )
    process.start()
    for writer in writers:
        writer.close()
    timer = threading.Timer(400, process.kill)
    timer.start()
    with ThreadPoolExecutor() as pool:
        stdout, stderr = pool.map(_read_to_the_end, readers)
    process.join()
    timer.cancel()
    return subprocess.CompletedProcess(arguments, process.exitcode, stdout, stderr)


def _read_to_the_end(reader):
    with reader, open(reader.fileno(), closefd=False) as file:
        return file.read()


def _main(arguments, cwd, environment, largest_file, writers):
    """What the installed command does, in a process forked for it."""
    from abft_fast.cli import main

    for descriptor, writer in enumerate(writers, start=1):
        os.dup2(writer.fileno(), descriptor)
        writer.close()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    if _LIBC is not None:
        _heed_permissions()
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = arguments
    main()


def _heed_permissions():
    """Give up root's CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, the second and the third bit."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3; this process
    capabilities = (ctypes.c_uint32 * 6)()
    assert _LIBC.capget(header, capabilities) == 0
    for held in (0, 1):  # effective, permitted
        capabilities[held] &= ~0b110
    assert _LIBC.capset(header, capabilities) == 0


def abft_fast_afresh(*arguments, cwd=None):
    """As `abft_fast`, with nothing imported yet: for what the environment decides at import."""
    return subprocess.run(
        [COMMAND, *map(str, arguments)], capture_output=True, text=True, cwd=cwd,
        env=environment(), timeout=400, check=False,
    )  # fmt: skip


def start(*arguments):
    """Start and return at once."""
    return subprocess.Popen(
        [COMMAND, *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
