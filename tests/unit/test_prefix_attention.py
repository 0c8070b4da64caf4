"""Attention after a kept prefix == the attention matrix of prefix and prompt written out."""

import itertools

import pytest
import torch
from abft_kernels import attention_after_prefix, choose_attention
from abft_kernels.attention.separate import explicit_attention, visible_keys
from abft_kernels.types import Scores

from tests.costs import Waits, moved
from tests.last_row_cases import DEVICE, error

pytestmark = [pytest.mark.unit, pytest.mark.kernels]
LENGTHS = [23, 1, 9, 40]
FEATURES = {
    "plain": {},
    "window": {"window": 7},
    "window-of-one": {"window": 1},
    "window-that-ends-in-the-prefix": {"window": 45},
    "window-beyond-all": {"window": 77},  # 37 + 40
    "sinks": {"sinks": True},
    "softcap": {"softcap": 3.0},
    "all": {"softcap": 3.0, "window": 7, "sinks": True},
}


def make_case(dtype, query_heads, key_heads, prefix=37, head_dim=16, sinks=False, **options):
    """Sharp scores, so that a wrong key shows."""
    tokens = sum(LENGTHS)
    heads = (query_heads, key_heads, key_heads)
    q, k, v = (torch.randn(tokens, n, head_dim).to(dtype).to(DEVICE) for n in heads)
    before = [torch.randn(prefix, key_heads, head_dim).to(dtype).to(DEVICE) for _ in "kv"]
    bounds = list(itertools.accumulate(LENGTHS, initial=0))
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    options |= {"scale": 0.7, "sinks": torch.randn(query_heads, device=DEVICE) if sinks else None}
    return (q, k, v, *before, cu_seqlens), options


def written_out(q, k, v, prefix_k, prefix_v, cu_seqlens, scale, sinks, softcap=None, window=None):
    """The specification."""
    outs = []
    for a, b in itertools.pairwise(cu_seqlens.tolist()):
        keys, values = torch.cat([prefix_k, k[a:b]]), torch.cat([prefix_v, v[a:b]])
        mask = visible_keys(len(keys), window, q.device)[-(b - a) :]
        parts = (t.transpose(0, 1)[None] for t in (q[a:b], keys, values))
        outs.append(explicit_attention(*parts, mask, Scores(scale, softcap, window), sinks)[0][0])
    return torch.cat([out.transpose(0, 1) for out in outs])


@pytest.mark.parametrize("attention", ["auto", "separate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("features", FEATURES)
def test_equal_to_the_matrix_written_out(features, heads, dtype, attention):
    tensors, options = make_case(dtype, *heads, **FEATURES[features])
    *_, cu_seqlens = tensors
    exact = {**options, "sinks": None if options["sinks"] is None else options["sinks"].double()}
    truth = written_out(*(t.double() for t in tensors[:-1]), cu_seqlens, **exact)
    base = error(written_out(*tensors, **options), truth)
    out = attention_after_prefix(*tensors, longest=max(LENGTHS), attention=attention, **options)
    assert out.dtype == dtype and out.shape == tensors[0].shape
    assert error(out, truth) <= max(2 * base, 4e-7)


@pytest.mark.parametrize("prefix", [1, 2, 500])
def test_prefixes_of_other_lengths(prefix):
    tensors, options = make_case(torch.float64, 4, 2, prefix=prefix)
    out = attention_after_prefix(*tensors, longest=max(LENGTHS), **options)
    assert error(out, written_out(*tensors, **options)) <= 1e-12


def test_an_attention_that_cannot_run_is_refused():
    tensors, options = make_case(torch.float32, 4, 2)
    assert choose_attention(tensors[0])[0] in ("sdpa", "separate")
    with pytest.raises(ValueError, match="flash-attn"):
        attention_after_prefix(*tensors, longest=40, attention="flash-attn", **options)


@pytest.mark.skipif(DEVICE == "cuda", reason="tests/gpu asks the GPU itself")
@pytest.mark.parametrize(
    ("attention", "expected"),
    # On a CPU alone: flash attention goes prompt by prompt, over the prompts and over the prefix.
    [("separate", {}), ("auto", {"tolist": 4})],
)
def test_what_the_host_waits_for(attention, expected):
    tensors, options = make_case(torch.float32, 4, 2)
    bounds = tensors[-1].tolist()
    with Waits() as waits:
        attention_after_prefix(
            *tensors, longest=max(LENGTHS), bounds=bounds, attention=attention, **options
        )
    assert not moved(waits, expected), moved(waits, expected)
