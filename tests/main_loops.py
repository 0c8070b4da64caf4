"""What the compiled kernels' main loops are made of, by disassembly; run as a process of its own.

`python -m tests.main_loops TARGET…` prints one JSON object a line, for a model of head dimension
128 in bfloat16 with four query heads a key head. Needs no GPU, and no TRITON_INTERPRET.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from compile_report import PROCESSORS, Variant, compile_launch, compiled_kernel, recorded_launches
from compile_report import run_all as run_every_launcher

DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
VARIANT = Variant(128, torch.bfloat16, 4, None)


def disassemble(cubin):
    """Instructions in order, and the index of the one that each label stands before."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [DISASSEMBLER, "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(re.sub(r"^@!?U?P\w+\s+", "", found[1]))
    return instructions, labels


def main_loop(instructions, labels):
    """The longest stretch that a branch jumps back over, with no such stretch inside."""
    loops = []
    for index, instruction in enumerate(instructions):
        target = re.match(r"BRA\b.*?(\.L_x_\d+)", instruction)
        if target and labels[target[1]] <= index:
            loops.append(range(labels[target[1]], index + 1))
    inner = [
        loop
        for loop in loops
        if not any(o != loop and o.start >= loop.start and o.stop <= loop.stop for o in loops)
    ]
    longest = max(inner, key=len, default=range(0))
    return instructions[longest.start : longest.stop]


def names(instructions, pattern):
    return [i.split()[0] for i in instructions if re.match(pattern, i)]


def describe(target, kernel, launch):
    processor = PROCESSORS[target]
    compiled = compiled_kernel(processor, kernel, launch)
    instructions, labels = disassemble(compiled.asm["cubin"])
    loop = main_loop(instructions, labels)
    needs = compile_launch(processor, kernel, launch)
    return {
        "target": target,
        "kernel": kernel.__name__.strip("_").removesuffix("_kernel"),
        "warps": launch["num_warps"],
        "stages": launch["num_stages"],
        "programs": needs.programs,
        "spilled": needs.spilled,
        "local": names(instructions, r"LDL|STL"),
        "loop": len(loop),
        "loads": names(loop, r"LDG\b|LDG\."),
        "copies": names(loop, r"LDGSTS"),
        "stores": names(loop, r"STG"),
    }


if __name__ == "__main__":
    for name in sys.argv[1:]:
        launches = recorded_launches(PROCESSORS[name].target, lambda: run_every_launcher(VARIANT))
        for jit_function, recorded in launches:
            print(json.dumps(describe(name, jit_function, recorded)), flush=True)
