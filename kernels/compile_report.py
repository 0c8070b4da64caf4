"""Compile every variant of the kernels for every GPU target; no GPU is needed.

    python kernels/compile_report.py [--quick] [--output docs/performance/kernels.md]

The launchers run on CPU tensors, with a driver that only names a target. Each launch is recorded,
then compiled ahead of time. The compiled code tells its registers, spills and shared memory; from
these follows how many programs a processor can hold. The exit code is 1 if a kernel does not
compile or does not fit on its processor.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from abft_kernels import loss_triton
from abft_kernels.types import Normalizer, Rows, Scores
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
HEAD_DIMS = (64, 128, 256)  # all others are padded to one of these
GROUPS = (4, 32)  # query heads a key head: up to 16 share one tile size, 32 have the next
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Processor(NamedTuple):
    """The target of one GPU, and the shared memory and warps that one of its processors holds."""

    target: GPUTarget
    shared_kib: int
    warps: int


PROCESSORS = {
    "sm_80": Processor(GPUTarget("cuda", 80, 32), 164, 64),
    "sm_86": Processor(GPUTarget("cuda", 86, 32), 100, 48),
    "sm_89": Processor(GPUTarget("cuda", 89, 32), 100, 48),
    "sm_90": Processor(GPUTarget("cuda", 90, 32), 228, 64),
    "sm_100": Processor(GPUTarget("cuda", 100, 32), 228, 64),
    "gfx90a": Processor(GPUTarget("hip", "gfx90a", 64), 64, 32),
    "gfx942": Processor(GPUTarget("hip", "gfx942", 64), 64, 32),
}


class Variant(NamedTuple):
    """The properties of a user's model that a kernel is compiled for."""

    head_dim: int
    dtype: torch.dtype
    group: int
    softcap: float | None


class Resources(NamedTuple):
    """The needs of one compiled kernel, and how many of its programs a processor holds at once.

    On AMD, registers are counted for a lane.
    """

    registers: int
    spilled: int
    shared: int
    programs: int


class _TargetDriver:
    """The part of a Triton driver that a recorded launch needs; the target's GPU is not here."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0


def recorded_launches(target: GPUTarget, run: Callable[[], None]) -> Iterable[tuple]:
    """Record the distinct compilations of `run` on a target: (kernel, specialized launch)."""
    recorded = {}

    def hook(*, key, fn, compile, **_):
        recorded[fn.name, key] = fn.jit_function, compile
        return True  # neither compile nor launch

    triton.runtime.driver.set_active(_TargetDriver(target))
    triton.knobs.runtime.jit_cache_hook = hook
    try:
        run()
    finally:
        triton.knobs.runtime.jit_cache_hook = None
    return recorded.values()


def run_all(variant: Variant) -> None:
    """Call every launcher, with and without each optional argument."""
    key_heads = 2
    tokens = 64
    shape = (tokens, key_heads * variant.group, variant.head_dim)
    query = torch.zeros(shape, dtype=variant.dtype)
    key = torch.zeros(tokens, key_heads, variant.head_dim, dtype=variant.dtype)
    indices = torch.zeros(3, dtype=torch.int32)
    rows = Rows(indices[:2], indices[:2], indices, indices, indices.bool())
    scores = Scores(1.0, variant.softcap, None)
    lse = torch.zeros(shape[:2])
    sinks = torch.zeros(shape[1], dtype=variant.dtype)
    factor = torch.zeros(())
    # As the ops call them: packed queries with and without a known log-sum-exp, and rows alone.
    # A row of `long` keys takes several splits.
    long = 1 << 20
    for packed, known, options, lengths in (
        (True, True, [(None, None), (None, factor)], (tokens, long)),
        (True, False, [(None, None)], (tokens,)),
        (False, False, [(None, None), (sinks, None), (None, factor)], (long,)),
    ):
        queries = query if packed else query[:2]
        for sink, hold in options:
            loss = loss_triton.label_loss(
                queries, key, rows, scores, sink, lse if known else None, factor, factor,
                head_filter=True, hold=hold, packed=packed,
            )  # fmt: skip
        normalizer = Normalizer(lse, None) if known else Normalizer(loss.peak, loss.total)
        for longest in lengths:
            loss_triton.add_gradients(
                torch.zeros_like(queries), torch.zeros_like(key), queries, key, rows, scores,
                normalizer, loss.mean_weight, loss.is_induction, loss.loss, factor, factor,
                head_filter=True, packed=packed, longest=longest,
            )  # fmt: skip


def compiled_kernel(
    processor: Processor, kernel: triton.JITFunction, launch: dict
) -> CompiledKernel:
    """Compile one recorded launch."""
    source = ASTSource(kernel, launch["signature"], launch["constants"], launch["configs"][0])
    options = {n: launch[n] for n in ("num_warps", "num_stages", "enable_fp_fusion")}
    return triton.compile(source, target=processor.target, options=options)


def compile_launch(processor: Processor, kernel: triton.JITFunction, launch: dict) -> Resources:
    """Compile one recorded launch, and read its needs from the binary."""
    compiled = compiled_kernel(processor, kernel, launch)
    shared, warps = compiled.metadata.shared, launch["num_warps"]
    if processor.target.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        registers = _amd_count(assembly, "vgpr_count") + _amd_count(assembly, "agpr_count")
        spilled = _amd_count(assembly, "vgpr_spill_count")
        # A processor has four SIMDs, and each SIMD has 512 registers a lane.
        by_registers = 4 * min(512 // _ceil(registers, 8), 8) // warps
    else:
        usage = _cuda_usage(compiled.asm["cubin"])
        registers = usage["REG"]
        # A stack alone may be the slow path of a division, which is called.
        spilled = _cuda_spills(compiled.asm["ptx"]) if usage["STACK"] + usage["LOCAL"] else 0
        by_registers = 65536 // (_ceil(registers, 8) * 32 * warps)
        shared += 1024  # the system takes these
    by_shared = processor.shared_kib * 1024 // max(shared, 1)
    programs = min(by_registers, by_shared, processor.warps // warps)
    return Resources(registers, spilled, shared, programs)


def _ceil(value: int, unit: int) -> int:
    return -(-max(value, 1) // unit) * unit


def _amd_count(assembly: str, name: str) -> int:
    match = re.search(rf"\.{name}:\s+(\d+)", assembly)
    return int(match[1]) if match else 0


def _cuda_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_TOOLS / "cuobjdump", "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}


def _cuda_spills(ptx: str) -> int:
    """Return the bytes that the assembler reports as spilled."""
    target = re.search(r"\.target\s+(\w+)", ptx)[1]
    assembler = _TOOLS / "ptxas-blackwell"  # the newer of the two, for every target
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [assembler, "-v", f"--gpu-name={target}", source, "-o", f"{source}.cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True)
    return sum(map(int, re.findall(r"(\d+) bytes spill stores", report.stdout + report.stderr)))


def compile_variant(job: tuple[str, Variant]) -> list[tuple[str, str, Variant, Resources | str]]:
    """Compile all kernels of one variant for one target.

    Returns:
        (target, kernel, variant, resources) for each kernel; if it does not compile, the first line
        of the error takes the place of the resources.
    """
    name, variant = job
    processor = PROCESSORS[name]
    results = []
    for kernel, launch in recorded_launches(processor.target, lambda: run_all(variant)):
        try:
            outcome = compile_launch(processor, kernel, launch)
        except Exception as error:
            outcome = str(error).splitlines()[0] if str(error) else repr(error)
        results.append((name, kernel.__name__.strip("_").removesuffix("_kernel"), variant, outcome))
    return results


def quick_jobs() -> list[tuple[str, Variant]]:
    """Return a few variants that stand for the rest."""
    variants = [
        Variant(128, torch.bfloat16, 4, None),
        Variant(80, torch.float16, 32, 50.0),
        Variant(64, torch.float32, 4, 50.0),
    ]
    jobs = [(name, variants[0]) for name in PROCESSORS]
    return jobs + [(name, variant) for name in ("sm_80", "sm_90") for variant in variants[1:]]


def all_jobs() -> list[tuple[str, Variant]]:
    """Return every variant on every supported target; AMD's is not."""
    variants = itertools.product(HEAD_DIMS, DTYPES, GROUPS, (None, 50.0))
    supported = [name for name, p in PROCESSORS.items() if p.target.backend == "cuda"]
    return [(name, Variant(*v)) for v in variants for name in supported]


def report(results: list[tuple[str, str, Variant, Resources]]) -> str:
    """Format a Markdown table: kernel, dtype and head dimension by target; the worst variant."""
    worst = defaultdict(lambda: Resources(0, 0, 0, 1 << 30))
    for target, kernel, variant, resources in results:
        row = (kernel, str(variant.dtype).removeprefix("torch."), variant.head_dim, target)
        so_far = worst[row]
        worst[row] = Resources(
            *(max(a, b) for a, b in zip(so_far[:3], resources[:3], strict=True)),
            min(so_far.programs, resources.programs),
        )
    targets = [name for name in PROCESSORS if any(row[3] == name for row in worst)]
    lines = [
        "| kernel | dtype | D | " + " | ".join(targets) + " |",
        "|---|---|---|" + "---|" * len(targets),
    ]
    for kernel, dtype, head_dim in sorted({row[:3] for row in worst}):
        cells = []
        for target in targets:
            needs = worst.get((kernel, dtype, head_dim, target))
            if needs is None:
                cells.append("-")
                continue
            spill = f" **spills {needs.spilled}**" if needs.spilled else ""
            cells.append(f"{needs.registers} / {needs.shared / 1024:.0f} / {needs.programs}{spill}")
        lines.append(f"| {kernel} | {dtype} | {head_dim} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


HEADER = """# What the kernels need

`make kernels-report` wrote this page (Triton {version}). A cell is *registers a thread / shared
memory a program in KiB / programs that a processor can hold at once*. Each figure is the worst over
{groups} query heads a key head, with and without soft-cap, sinks and gradient. Spills are in bytes.
The figures describe the compiled code; no kernel was run for them. The kernels compile for AMD, too
(`--quick`), but abft-fast does not support AMD GPUs yet.

{variants} kernels were compiled. {spills} of them spill, and {small_spills} of those have a head
dimension up to 128.

"""


def main() -> None:
    """Compile, and print or write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few variants of each kind")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if loss_triton.INTERPRETED:
        sys.exit("TRITON_INTERPRET is set: kernels are interpreted, nothing can be compiled")

    jobs = quick_jobs() if options.quick else all_jobs()
    results = []
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for done, compiled_variant in enumerate(pool.imap(compile_variant, jobs, chunksize=1), 1):
            results += compiled_variant
            print(f"\r{done}/{len(jobs)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)

    failed = [row for row in results if isinstance(row[3], str)]
    for target, kernel, variant, line in failed:
        print(f"{target} {kernel} {variant}: {line}", file=sys.stderr)
    compiled = [row for row in results if not isinstance(row[3], str)]
    spills = [row for row in compiled if row[3].spilled]
    small_spills = [row for row in spills if row[2].head_dim <= 128]
    too_large = [row for row in compiled if not row[3].programs]
    for target, kernel, variant, resources in too_large:
        print(f"{target} {kernel} {variant} does not fit: {resources}", file=sys.stderr)
    for target, kernel, variant, resources in small_spills:
        print(f"{target} {kernel} {variant} spills {resources.spilled} bytes", file=sys.stderr)
    text = HEADER.format(
        version=triton.__version__,
        groups=" and ".join(map(str, GROUPS)),
        variants=len(compiled),
        spills=len(spills),
        small_spills=len(small_spills),
    ) + report(compiled)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    sys.exit(1 if failed or too_large else 0)


if __name__ == "__main__":
    main()
