"""A model and a batch of prompts, and one gradient on them by any contender.

The model is a transformers decoder with PEFT's LoRA on W_Q and W_K, or these themselves. A
contender leaves the gradient of its loss, mean over prompts, in what is trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, PreTrainedConfig

from abft_fast import EncodedPrompt
from abft_fast.core.backbone import backbone, prepare
from abft_fast.core.language_model_loss import TargetedPrompt, label_target
from abft_fast.models.shapes import known_shape, with_layers
from abft_fast.models.synthetic import is_quantized, random_model
from abft_fast.models.trainable import add_lora, enable_checkpointing, unfreeze_query_key
from abft_fast.runtime.batching import micro_batches
from benchmarks import stored
from benchmarks.exactness import DTYPE, WIDE, assert_exact
from benchmarks.peak_memory import peak_of
from benchmarks.record import DEVICE, GPU, SEED

VOCABULARY = 4096  # of random models, and of random prompts for all


@dataclass(frozen=True)
class Case:
    """A model and a batch.

    Attributes:
        model: one of stored.py, with prompts of SUBJ; `LAYERSxWIDTH`, a random Llama; or a known
            shape, with random weights.
        prompts: of the batch.
        length: tokens of each; SUBJ's have their own.
        k: demonstrations a prompt.
        layers: of a known shape, the first ones only; 0 is all.
        bits: 4 or 8 quantizes what is frozen; 0 does not.
        full: trains W_Q and W_K themselves, not LoRA on them.
    """

    model: str
    prompts: int = 32
    length: int = 0
    k: int = 4
    layers: int = 0
    bits: int = 0
    full: bool = False

    @property
    def head_filter(self) -> bool:
        """Random models have no induction heads."""
        return stored.is_stored(self.model)

    @property
    def config(self) -> PreTrainedConfig:
        """Of a model of random weights."""
        shape = known_shape(self.model)
        if shape is not None:
            return with_layers(shape, self.layers or shape.num_hidden_layers)
        layers, width = map(int, self.model.split("x"))
        return LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=width * 11 // 4,
            num_hidden_layers=layers, num_attention_heads=width // 64,
            num_key_value_heads=max(1, width // 256), max_position_embeddings=1 << 17,
        )  # fmt: skip

    def __str__(self) -> str:
        layers = f"-{self.layers}layers" if self.layers else ""
        bits = f"-{self.bits}bits" if self.bits else ""
        length = f"x{self.length}" if self.length else ""
        full = "-full" if self.full else ""
        return f"{self.model}{layers}{bits}{full}-{self.prompts}{length}-k{self.k}"


class Contender(NamedTuple):
    """A way to a gradient.

    Attributes:
        attention: transformers' name of the attention it runs on.
        run: leaves the gradient.
        checkpointing: whether layers are recomputed.
        tokens: how many are packed at once, where it packs; 0 is all.
    """

    attention: str
    run: Callable[[Step], None]
    checkpointing: bool = False
    tokens: int = 0


class Step:
    """A case's model, LoRA not at zero, and its prompts, each with its label as target."""

    def __init__(self, case: Case):
        torch.manual_seed(SEED)
        self.case = case
        if stored.is_stored(case.model):
            model = stored.load(case.model)
        else:
            model = random_model(case.config, torch.device(DEVICE), DTYPE, case.bits or None)
        self.model = unfreeze_query_key(model.eval()) if case.full else add_lora(model.eval(), 16)
        prepare(self.model)  # before any way runs: it keeps gradients through NF4 on a CPU
        for parameter in self.trained:
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)  # B; a zero one would hide A's gradient
        self.prompts = list(_prompts(case))
        self.tokens_at_once = 0

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def lengths(self) -> list[int]:
        return [len(prompt) for prompt in self.prompts]

    def micro_batches(self) -> Iterator[tuple[list[TargetedPrompt], float]]:
        """Prompts to be packed together, and their share of all."""
        for batch in micro_batches(self.lengths, self.tokens_at_once or sum(self.lengths)):
            yield [self.prompts[i] for i in batch], len(batch) / len(self.prompts)

    def set_up(self, contender: Contender) -> None:
        """Bring the model into the state a contender runs in."""
        if contender.checkpointing:
            enable_checkpointing(self.model)
        else:
            self.model.gradient_checkpointing_disable()
            self.model.eval()
        self.tokens_at_once = contender.tokens
        backbone(self.model).set_attn_implementation(contender.attention)

    def run(self, contender: Contender) -> None:
        """A contender, once the model is in its state; on a GPU in bfloat16 as training is."""
        with torch.autocast(DEVICE, DTYPE, enabled=GPU):
            contender.run(self)

    def peaks(self, contenders: Mapping[str, Contender]) -> dict[str, int]:
        """Most bytes of each beyond model, prompts and gradients, after one prompt of each."""
        prompts, self.prompts = self.prompts, self.prompts[:1]
        for contender in contenders.values():
            self.set_up(contender)
            self.run(contender)  # gradients, and what libraries take once
        self.prompts = prompts
        found = {}
        for name, contender in contenders.items():
            self.set_up(contender)
            found[name] = peak_of(lambda contender=contender: self.run(contender))
        return found

    def gradient(self, contender: Contender) -> Tensor:
        """What a contender leaves, as one vector."""
        self.model.zero_grad()
        self.set_up(contender)
        self.run(contender)
        return self._gradient()

    def exact_gradient(self, contender: Contender) -> Tensor:
        """The same from the same weights, in wider arithmetic."""
        self.model.zero_grad()
        self.set_up(contender)
        with wider(self.model):
            contender.run(self)
            found = self._gradient()
            self.model.zero_grad()
        return found

    def _gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.trained])

    def check(self, reference: Contender, others: Mapping[str, Contender]) -> float:
        """The largest error of others' gradients.

        Exact is the reference's in wider arithmetic, and the reference is the plain one.

        Raises:
            AssertionError: one is wrong; nothing may be timed.
        """
        exact, plain = self.exact_gradient(reference), self.gradient(reference)
        assert exact.norm() > 0, "no gradient"
        return max(
            assert_exact(f"{name}: gradient", self.gradient(way), plain, exact)
            for name, way in others.items()
        )


@contextlib.contextmanager
def wider(model: nn.Module) -> Iterator[None]:
    """Compute in a wider dtype; NF4 weights stay what they are."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    dtypes = [t.dtype for t in tensors]
    nf4 = [m for m in model.modules() if is_quantized(m) and hasattr(m.weight, "quant_state")]
    for tensor in tensors:
        tensor.data = tensor.data.to(WIDE)
    for module in nf4:
        module.forward = partial(_exact_product, module)
    try:
        yield
    finally:
        for tensor, dtype in zip(tensors, dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)
        for module in nf4:
            del module.forward


def _exact_product(module: nn.Module, inputs: Tensor) -> Tensor:
    """An NF4 layer's, which bitsandbytes does not do in every dtype; no float weight is kept."""
    from bitsandbytes.functional import dequantize_4bit

    def product(inputs: Tensor) -> Tensor:
        weight = dequantize_4bit(module.weight, module.weight.quant_state)
        return F.linear(inputs, weight.to(inputs.dtype), module.bias)

    return checkpoint(product, inputs, use_reentrant=False)


def _prompts(case: Case) -> Iterator[TargetedPrompt]:
    if stored.is_stored(case.model):
        from abft_fast import data  # the drawing of demonstrations needs StaICC
        from abft_fast.prompts import PromptEncoder

        dataset = data.load("subj")
        encoder = PromptEncoder(stored.read_tokenizer(case.model), dataset)
        drawn = dataset.training_prompts(case.k, case.prompts, SEED)
        for prompt, encoded in zip(drawn, encoder.encode(drawn).prompts, strict=True):
            yield label_target(encoded, encoder.label_ids[prompt.query.label])
        return
    yield from random_prompts(case)


def random_prompts(case: Case) -> Iterator[TargetedPrompt]:
    """Prompts of random tokens, k labels evenly in each."""
    every = case.length // (case.k + 1)
    labels = [every * (i + 1) - 1 for i in range(case.k)]
    correct = [i % 2 == 0 for i in range(case.k)]
    for _ in range(case.prompts):
        ids = torch.randint(VOCABULARY, (case.length,)).tolist()
        yield label_target(EncodedPrompt(ids, labels, correct), ids[labels[0]])
