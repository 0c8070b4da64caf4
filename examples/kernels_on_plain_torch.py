"""Use abft_kernels alone: the loss of the last rows in an attention module of plain torch.

Every prompt is a few demonstrations `letter letter LABEL` and a query letter. Small letters have
one label, capitals the other, so the attention of the last row should go to the labels of its own
kind. The script computes the loss in three ways, compares their gradients, and trains.

Run: python examples/kernels_on_plain_torch.py [--steps 40]
"""

import argparse
import itertools

import torch
import torch.nn.functional as F
from abft_kernels import flash_attention_with_last_row_loss, last_row_loss, reference
from torch import nn

LETTERS, LABELS = 20, 2  # token ids: small letters 0-9, capitals 10-19, the labels 20 and 21
# An untrained model has no induction heads, so the loss must not be limited to them.
OPTIONS = {"penalty": 0.5, "reward": 1.0, "head_filter": False}


class Attention(nn.Module):
    """Causal attention of packed prompts with grouped key heads; it also returns the loss."""

    def __init__(self, width=64, query_heads=4, key_heads=2):
        super().__init__()
        self.heads = (query_heads, key_heads, key_heads)
        self.projections = nn.ModuleList(nn.Linear(width, h * 16, bias=False) for h in self.heads)
        self.output = nn.Linear(query_heads * 16, width, bias=False)

    def forward(self, x, starts, labels, how):
        q, k, v = (
            p(x).unflatten(-1, (h, 16)) for p, h in zip(self.projections, self.heads, strict=True)
        )
        if how == "fused":  # one op for the attention and the loss
            out, result = flash_attention_with_last_row_loss(q, k, v, starts, *labels, **OPTIONS)
        else:  # torch's attention, and the loss beside it
            out = torch.cat([attend(q[a:b], k[a:b], v[a:b]) for a, b in itertools.pairwise(starts)])
            loss = reference.last_row_loss if how == "reference" else last_row_loss
            last = starts[1:].long() - 1
            result = loss(q[last], k, starts[:-1], starts[1:], *labels, **OPTIONS)
        return x + self.output(out.flatten(1)), result


def attend(q, k, v):
    """Return torch's causal attention of one prompt, (tokens, heads, 16)."""
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1)


class Model(nn.Module):
    """Two layers of attention over embedded tokens."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(LETTERS + LABELS, 64)
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, batch, how):
        tokens, *where = batch
        x, results = self.embedding(tokens), []
        for layer in self.layers:
            x, result = layer(x, *where, how)
            results.append(result)
        prompts = len(results[0].loss)
        return sum(result.loss.sum() for result in results) / prompts, results


def make_batch(prompts=32):
    """Return token ids, the prompts' bounds, and their labels as the kernels take them."""
    tokens, starts, positions, offsets, correct = [], [0], [], [0], []
    for _ in range(prompts):
        kinds = torch.randint(2, (torch.randint(3, 7, ()),)).tolist()
        query = torch.randint(2, ()).item()
        for kind in kinds:
            letters = torch.randint(10, (torch.randint(1, 4, ()),)) + 10 * kind
            tokens += [*letters.tolist(), LETTERS + kind]
            positions.append(len(tokens) - 1)
            correct.append(kind == query)
        tokens.append(int(torch.randint(10, ())) + 10 * query)
        starts.append(len(tokens))
        offsets.append(len(positions))
    starts, positions, offsets = (
        torch.tensor(values, dtype=torch.int32) for values in (starts, positions, offsets)
    )
    return torch.tensor(tokens), starts, (positions, offsets, torch.tensor(correct))


def gradient(model, batch, how):
    """Return the gradient of all parameters as one vector."""
    loss, _ = model(batch, how)
    parameters = list(model.parameters())
    grads = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])


def main(steps):
    torch.manual_seed(0)
    model = Model()
    batch = make_batch()
    expected = gradient(model, batch, "reference")
    for how in ("beside", "fused"):
        error = (gradient(model, batch, how) - expected).norm() / expected.norm()
        print(f"{how}: gradient differs from the reference by {error:.1e}")

    learned = [w for layer in model.layers for p in layer.projections[:2] for w in p.parameters()]
    optimizer = torch.optim.Adam(learned, lr=3e-3)
    for step in range(steps):
        loss, results = model(make_batch(), "fused")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            mass, correct, heads = (
                torch.stack([getattr(result, name) for result in results]).float()
                for name in ("label_mass", "correct_mass", "is_induction")
            )
            print(
                f"step {step}  loss {loss:.3f}  induction heads {heads.sum() / 32:.2f} of 8  "
                f"correct share {correct.sum() / mass.sum():.1%}"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    main(parser.parse_args().steps)
