"""Which model, how prompts are written for it, and what runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from abft_fast.options.base import CommandOptions, name_or_count


class ModelOptions(CommandOptions):
    """Which model, and how its weights are kept."""

    model: str = Field(
        "builtin",
        description="`builtin`, a local folder, a hub id, or `synthetic:` and the name of a known "
        "shape for random weights of true size.",
    )
    quantized: bool = Field(
        False, description="Quantize the weights as they are loaded (bitsandbytes); see bits."
    )
    bits: int = Field(4, description="Of a quantized weight: 4 (NF4, double quantization) or 8.")
    config: Path | None = Field(
        None, exclude=True, description="YAML file of options; flags override it."
    )

    @model_validator(mode="after")
    def _check_quantized(self) -> Self:
        if self.bits != 4 and not self.quantized:
            raise ValueError(f"--bits {self.bits} needs --quantized")
        return self

    @field_validator("bits")
    @classmethod
    def _check_bits(cls, value: int) -> int:
        if value not in (4, 8):
            raise ValueError("use 4 or 8")
        return value


class PromptOptions(ModelOptions):
    """How prompts are written, and what runs the model on them."""

    prompt_form: Literal["ours", "staicc"] = Field(
        "ours",
        description="How prompts are written: one space belongs to the label token everywhere, "
        "or StaICC's own string.",
    )
    label_token: Literal["single", "first"] = Field(
        "single",
        description="Refuse label words of several tokens, or use their first token "
        "(in StaICC's form at the query the last, as StaICC does).",
    )
    on_long_prompt: Literal["refuse", "drop", "fewer-demonstrations"] = Field(
        "refuse", description="What to do with prompts beyond the model's context length."
    )
    token_budget: str | int = Field(
        "auto",
        description="Tokens a packed batch, at most; auto tries in training what a GPU holds and "
        "is 8192 elsewhere, less where the plan says so. Results do not depend on it.",
    )
    attention_backend: Literal[
        "auto", "flash-attn", "varlen", "sdpa", "flash-attn-3", "separate"
    ] = Field("auto", description="What computes attention; `abft-fast doctor` says what there is.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to run.")
    device_map: Literal["none", "auto"] = Field(
        "none",
        description="auto splits a model larger than one GPU, by layers, over all GPUs of this "
        "machine.",
    )
    mixed_precision: Literal["auto", "no", "bf16"] = Field(
        "auto",
        description="Arithmetic of the forward: bfloat16, or no for float32 throughout. "
        "auto is bf16 on a GPU, no on a CPU.",
    )

    @field_validator("token_budget", mode="before")
    @classmethod
    def _check_token_budget(cls, value: Any) -> str | int:
        return name_or_count(value, ("auto",), "auto or a number of tokens from 1")

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _yaml_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads `no` as false
