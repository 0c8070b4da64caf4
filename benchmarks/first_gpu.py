"""The first ten minutes on a GPU: is it right, and how fast is it?

    python benchmarks/first_gpu.py --results DIR [--budget 500] [--from PHASE] [--commit NAME]
    python benchmarks/first_gpu.py --results DIR --dry-run

Six phases, the most telling first; docs/performance/first-gpu.md says what each one proves. A
Python with torch, triton, transformers, peft and accelerate is enough; `large` needs bitsandbytes
and pydantic too, `streamed` also StaICC, and both are skipped without them. Each row is added to
DIR/PHASE.csv as it is measured. A phase that takes too long leaves less to the later ones; what is
cut is named, and `--from` continues there. `--dry-run` goes through all of it on a CPU in tiny
sizes, kernels interpreted. The exit code is 1 if something was wrong; a missed goal is not.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

BEGAN = time.monotonic()
ROOT = Path(__file__).parents[1]
PHASES = {  # seconds
    "correctness": 90, "bandwidth": 60, "fused": 60, "steps": 150, "large": 150, "streamed": 60,
}  # fmt: skip


def main() -> int:
    options = parsed()
    if options.dry_run:
        os.environ.update(CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.path[:1] = [str(ROOT), str(ROOT / "kernels")]  # in place of benchmarks/ itself
    from benchmarks import record
    from benchmarks.on_gpu import run

    if not (options.dry_run or record.GPU):
        print("first_gpu: torch sees no GPU; use --dry-run on a CPU", file=sys.stderr)
        return 2
    record.RESULTS, record.COMMIT = options.results, options.commit
    names = list(PHASES)
    chosen = names[names.index(options.first) :]
    return run.run({name: PHASES[name] for name in chosen}, options.budget, BEGAN)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="folder of the rows")
    parser.add_argument("--budget", type=seconds, default=500, help="seconds of the run")
    parser.add_argument(
        "--from", dest="first", choices=PHASES, default="correctness", help="begin with this phase"
    )
    parser.add_argument("--commit", default="", help="the code's, where there is no git")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, in tiny sizes")
    return parser.parse_args()


def seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
