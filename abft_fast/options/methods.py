"""Describe the methods of `--method` without torch: their options, not how they train.

`training.methods` adds the prompts and the loss of each method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

MethodName = Literal["ABFT", "E2E", "MetaICL", "PICL"]
Trainable = Literal["lora", "full", "model"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """Facts about a method that options, the plan of memory and reports need.

    Attributes:
        name: the value of `--method`.
        trains_whole_model: whether every weight is trained where `--trainable` is not given.
        uses_penalty: whether the loss has A and B, the control of A, and the filter of heads
            (`--penalty`, `--reward`, `--adaptation`, `--head-filter`).
        loss_at_output: whether the loss is computed from the model's output. Such a loss reaches
            every layer and needs the LM head; the loss of ABFT is in the layers themselves.
        trains_on_tested_dataset: whether the training prompts come from the dataset that
            `--dataset` names.
        data_option: the option that names the training data of this method alone, or None.
    """

    name: MethodName
    trains_whole_model: bool
    uses_penalty: bool
    loss_at_output: bool
    trains_on_tested_dataset: bool
    data_option: str | None = None

    @property
    def gradient_can_be_local(self) -> bool:
        """Return whether `--gradient` may be other than full."""
        return not self.loss_at_output


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            Method(
                name="ABFT",
                trains_whole_model=False,
                uses_penalty=True,
                loss_at_output=False,
                trains_on_tested_dataset=True,
            ),
            Method(
                name="E2E",
                trains_whole_model=False,
                uses_penalty=False,
                loss_at_output=True,
                trains_on_tested_dataset=True,
            ),
            Method(
                name="MetaICL",
                trains_whole_model=True,
                uses_penalty=False,
                loss_at_output=True,
                trains_on_tested_dataset=False,
                data_option="meta_datasets",
            ),
            Method(
                name="PICL",
                trains_whole_model=True,
                uses_penalty=False,
                loss_at_output=True,
                trains_on_tested_dataset=False,
                data_option="plain_text",
            ),
        )
    }
)
"""Every method, by its name."""
