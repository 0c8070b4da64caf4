"""Check what a run needs here, and say what it would use."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from abft_kernels import choose_attention, choose_backend
from transformers import AutoConfig

from abft_fast import data
from abft_fast.builtin import builtin_model_path
from abft_fast.errors import UserError
from abft_fast.runtime.environment import describe, multiplies_bfloat16


def diagnose() -> tuple[list[tuple[str, str]], list[str]]:
    """Return the findings as (what, found), and the problems among them, one line each."""
    environment = describe()
    problems: list[str] = []
    findings = [("python", environment["python"])]
    findings += [
        (name, found or "not installed") for name, found in environment["versions"].items()
    ]
    if environment["gpus"]:
        findings.append(("device", f"{', '.join(environment['gpus'])}, CUDA {torch.version.cuda}"))
    else:
        findings.append(("device", f"CPU, {environment['threads']} threads (no usable GPU)"))
        faster = "; --mixed-precision bf16 is faster here" if multiplies_bfloat16() else ""
        findings.append(("arithmetic", f"float32{faster}"))
    if len(environment["gpus"]) > 1:
        findings.append(("several GPUs", _several(len(environment["gpus"]))))
    findings += _attention()
    for name in data.DATASETS:
        try:
            good = data.hash_is_pinned(name)
        except (UserError, OSError) as error:
            good, problem = False, str(error)
        else:
            problem = f"StaICC's file of {name} is not the pinned one: reinstall StaICC==0.1.1"
        findings.append((f"data {name}", "as pinned" if good else "BAD"))
        if not good:
            problems.append(problem)
    findings.append((f"data {', '.join(data.BOXES)}", "generated"))
    try:
        config = AutoConfig.from_pretrained(builtin_model_path())
        findings.append(
            ("built-in model", f"{config.model_type}, {config.num_hidden_layers} layers")
        )
    except (OSError, ValueError) as error:
        problems.append(f"the built-in model cannot be read: {str(error).splitlines()[0]}")
    free = shutil.disk_usage(Path.cwd()).free
    findings.append(("disk here", f"{free / 2**30:.1f} GiB free"))
    if free < 2**30:
        problems.append(f"only {free / 2**20:.0f} MiB free where runs are written")
    return findings, problems


def _several(gpus: int) -> str:
    """Return how many GPUs each way to start a run uses."""
    return (
        f"a run by itself uses 1, with --device-map auto all {gpus} for one model, "
        f"under `torchrun --nproc_per_node {gpus}` one a process"
    )


def _attention() -> list[tuple[str, str]]:
    """Say what would compute a model's attention and its loss here, and why."""
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    query = torch.zeros(1, 1, 128, dtype=dtype, device="cuda" if gpu else "cpu")
    findings = []
    for what, softcap in (("attention", None), ("with soft-cap", 50.0)):
        name, reasons = choose_attention(query, softcap=softcap)
        findings.append((what, f"{name} ({reasons})" if reasons else name))
    return [*findings, ("its loss", choose_backend(query))]
