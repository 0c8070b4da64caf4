from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="abft-fast",
    version="0.1.0",
    description="Attention Behavior Fine-Tuning of language models: packed, fused, on GPUs",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages("kernels", include=["abft_kernels", "abft_kernels.*"]),
        *find_packages(include=["abft_fast", "abft_fast.*"]),
    ],
    # `kernels` itself must never be a package: transformers imports the published one of that name.
    package_dir={"abft_kernels": "kernels/abft_kernels"},
    package_data={
        "abft_kernels": ["py.typed"],
        "abft_fast": ["py.typed"],
        "abft_fast.models": ["shapes.json"],
        "abft_fast.builtin": ["model/*"],
    },
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",
        "transformers>=5.17",
        "peft>=0.19",
        "accelerate>=1.10",
        "bitsandbytes>=0.49",
        "StaICC==0.1.1",
        "numpy>=1.26",
        "safetensors>=0.6",
        "pydantic>=2.7",
        "typer>=0.29",
        "rich>=13.7",
        "PyYAML>=6.0",
        "psutil>=5.9",
    ],
    extras_require={
        "gpu": ["flash-attn>=2.7"],
        "ray": ["ray>=2.40"],
        "track": ["wandb>=0.19", "tensorboard>=2.18"],
        "picl": ["bm25s>=0.2"],
        "mauve": ["mauve-text>=0.4"],
        "data": ["datasets>=3.0", "pyarrow>=17.0"],
        "bench": ["matplotlib>=3.9", "pytest-benchmark>=5.0", "trl>=1.0"],
        "dev": [
            "abft-fast[picl,mauve,data,bench]",
            "hypothesis>=6.100",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
        ],
    },
    entry_points={"console_scripts": ["abft-fast = abft_fast.cli:main"]},
)
