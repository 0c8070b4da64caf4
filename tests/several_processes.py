"""Runs of two processes, and what one of them does: `torchrun ... -m tests.several_processes`."""

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from abft_fast.commands.train import set_up, to_train
from abft_fast.errors import SaidByMain, UserError
from abft_fast.models.trainable import trained_parameters
from abft_fast.options import TrainConfig
from abft_fast.options.resolve import resolve
from abft_fast.runtime import processes
from abft_fast.runtime.launch import is_main, rank
from abft_fast.runtime.progress import Progress
from abft_fast.training.loop import optimize
from abft_fast.training.run_folder import RunFolder
from tests.command_line import environment

BIN = Path(sys.executable).parent
TORCHRUN = [BIN / "torchrun", "--nproc_per_node", "2", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", "localhost:0"]  # fmt: skip
ACCELERATE = [BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
              "--main_process_port", "0"]  # fmt: skip


def launch(launcher, *arguments, cwd=None):
    """Run two processes to the end."""
    return subprocess.run(
        [*launcher, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={"OMP_NUM_THREADS": "1", **environment()},
        timeout=400,
        check=False,
    )


def said(stderr):
    """The lines that are abft-fast's own."""
    return [line for line in stderr.splitlines() if line.startswith("abft-fast: ")]


def kill_one(process, rank):
    """Kill one process of a launched run; the run ends, and says so in one line."""
    (victim,) = (
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.environ().get("RANK") == str(rank)
    )
    victim.send_signal(signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    (line,) = said(stderr)
    assert "another process of this run ended" in line
    assert "abft-fast train --resume RUN" in line


def adapter_error(folder, expected):
    """Relative error of a run's adapter."""
    name = "adapter/adapter_model.safetensors"
    ours, theirs = (load_file(f / name) for f in (folder, expected))
    assert set(ours) == set(theirs)
    flat = [
        torch.cat([tensors[n].flatten() for n in sorted(tensors)]) for tensors in (ours, theirs)
    ]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


def metrics(folder):
    """Rows of metrics.jsonl, less what is measured rather than computed."""
    measured = ("tokens_per_second", "peak_memory_bytes", "seconds")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if name not in measured} for row in rows]


SMALL = {"train_samples": 17, "pseudo_batch_size": 4, "k": 2}  # in the end a batch of one prompt
LONG = {"train_samples": 8, "pseudo_batch_size": 8, "k": 48, "token_budget": 10**6}


def train_in_float64(folder, *, memory=None, **options):
    """A run of the built-in model; its trained weights.

    `memory` bytes is all that the second of two processes may add.
    """
    options |= {"dataset": "trec", "epochs": 1, "device": "cpu", "no_eval": True}
    config, run = resolve(TrainConfig, options), RunFolder(folder)
    with processes.fail_together():
        session, prompts, _ = set_up(config, run, Progress())
    session.model.double()
    if memory is not None and rank() == 1:
        size = int(Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (size + memory, resource.RLIM_INFINITY))
    optimize(to_train(session, run, prompts))
    return {name: p.detach() for name, p in trained_parameters(session.model).items()}


def fail_on_one_process():
    """What each process gets when the second one fails."""
    try:
        with processes.fail_together():
            if rank() == 1:
                raise UserError("only here")
    except (UserError, SaidByMain) as error:
        return processes.gather(repr(error))
    return None


def main(folder):
    with processes.running(cpu=True):
        runs = {gradient: SMALL | {"gradient": gradient} for gradient in ("full", "local", "2")}
        runs["memory"] = LONG | {"memory": 200 * 2**20}
        for name, options in runs.items():
            trained = train_in_float64(folder / name, **options)
            same = processes.gather(torch.cat([p.flatten() for p in trained.values()]))
            assert all(torch.equal(other, same[0]) for other in same)
            if is_main():
                torch.save(trained, folder / f"{name}.pt")
        errors = fail_on_one_process()
        group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        timeouts = processes.gather(group.options._timeout.total_seconds())
        if is_main():
            (folder / "errors.json").write_text(json.dumps(errors))
            (folder / "timeouts.json").write_text(json.dumps(timeouts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
