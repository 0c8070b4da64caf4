"""Options of `abft-fast doctor`."""

from __future__ import annotations

from pydantic import Field

from abft_fast.options.base import CommandOptions


class DoctorConfig(CommandOptions):
    """Options of `abft-fast doctor`."""

    measure: str | None = Field(
        None,
        description="Measure the speeds that `plan --stream` divides by: how fast this file, the "
        "largest file of this folder, or this model is read from its disk, copies to the GPU, and "
        "products of matrices. Takes up to half a minute.",
    )
