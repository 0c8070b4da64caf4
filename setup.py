"""Map the two packages to their folders; pyproject.toml has everything else."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages("kernels", include=["abft_kernels", "abft_kernels.*"]),
        *find_packages(include=["abft_fast", "abft_fast.*"]),
    ],
    # `kernels` itself must never be a package: transformers imports the published one of that name.
    package_dir={"abft_kernels": "kernels/abft_kernels"},
)
