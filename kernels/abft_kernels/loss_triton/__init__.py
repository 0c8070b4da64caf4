"""Compute the last rows' softmax, label loss and gradient on a GPU, in Triton.

One program serves all query heads of one key head, so the forward reads keys once whatever the GQA
ratio, and the backward once for every 16 heads of a group that have a loss. Long rows are split
over programs, and the parts are combined in a fixed order. There are no atomics, so results repeat
bit by bit. Lengths and counts never specialize a kernel.

The forward reads all keys only to find a normalizer that nobody knows yet. The backward reads keys
for both gradients together.

Shapes: R rows, Hq query heads, Hkv key heads, D head dimension, T keys, M labels.

`jit_helpers` has what kernels of both directions share, and `launch` what the host computes for a
launch. `forward` and `backward` have the kernels and their launchers. `query_gradient` is the part
of the backward that adds the gradients of queries.
"""

from abft_kernels.loss_triton.backward import add_gradients
from abft_kernels.loss_triton.forward import label_loss
from abft_kernels.loss_triton.launch import INTERPRETED

__all__ = ["INTERPRETED", "add_gradients", "label_loss"]
