"""Options that say which model is used, how prompts are written for it, and what runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from abft_fast.options.base import CommandOptions, name_or_count


class ModelOptions(CommandOptions):
    """Options that name the model and say how its weights are stored."""

    model: str = Field(
        "builtin",
        description="`builtin`, a local folder, a GGUF file, a hub id, or `synthetic:` and the "
        "name of a known shape, for random weights of that size (`synthetic:llama3-70b:4`: of its "
        "first four layers).",
    )
    quantized: bool = Field(
        False, description="Quantize the weights while they are loaded (bitsandbytes); see --bits."
    )
    bits: int = Field(
        4, description="Bits of a quantized weight: 4 (NF4, double quantization) or 8."
    )
    config: Path | None = Field(
        None,
        exclude=True,
        description="YAML file of options; options on the command line override it.",
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


class PlacementOptions(ModelOptions):
    """Options that say where the model is and with which arithmetic it runs."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Device to run on.")
    device_map: Literal["none", "auto"] = Field(
        "none",
        description="auto: split a model that is larger than one GPU by layers over all GPUs of "
        "this machine.",
    )
    mixed_precision: Literal["auto", "no", "bf16"] = Field(
        "auto",
        description="Arithmetic. bf16: weights that are not trained, and the forward pass, are in "
        "bfloat16. no: float32 throughout. "
        "auto: bf16 on a GPU, no on a CPU. A CPU with instructions for bfloat16 is faster with "
        "bf16.",
    )

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _yaml_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads `no` as false


def check_stream_placement(options: PlacementOptions) -> None:
    """Refuse a streamed model whose layers are all to be on GPUs.

    Raises:
        ValueError: `device_map` is `auto`.
    """
    if options.device_map == "auto":
        raise ValueError(
            "--stream and --device-map auto, which keeps all layers on GPUs: leave one of them out"
        )


class PromptOptions(PlacementOptions):
    """Options that say how prompts are written and what runs the model on them."""

    prompt_form: Literal["ours", "staicc"] = Field(
        "ours",
        description="How prompts are written. ours: the label token begins with one space "
        "everywhere. staicc: StaICC's own string.",
    )
    label_token: Literal["single", "first"] = Field(
        "single",
        description="What to do with a label word of several tokens. single: refuse it. first: "
        "use its first token (with --prompt-form staicc its last token at the query, as StaICC "
        "does).",
    )
    on_long_prompt: Literal["refuse", "drop", "fewer-demonstrations"] = Field(
        "refuse", description="What to do with a prompt that is longer than the model's context."
    )
    token_budget: str | int = Field(
        "auto",
        description="Most tokens in a packed batch. auto: a training run on a GPU tries what "
        "the GPU holds, and other work takes 8192 there; a CPU takes 2048, or fewer if the plan of "
        "memory says so. Results do not depend on this option.",
    )
    attention_backend: Literal[
        "auto", "flash-attn", "varlen", "sdpa", "flash-attn-3", "separate"
    ] = Field(
        "auto",
        description="What computes attention; `abft-fast doctor` lists what this machine has.",
    )

    @field_validator("token_budget", mode="before")
    @classmethod
    def _check_token_budget(cls, value: Any) -> str | int:
        return name_or_count(value, ("auto",), "auto or a number of tokens from 1")
