"""Random rows for the loss, its gradients, and what eager attention loses on them."""

import torch
from abft_kernels import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Compiled `exp` and `/` are each off by 2 units, and exp rounds its argument: by half a unit times
# |score - maximum| * log2(e), where scores down to some 16 below the maximum have weight.
KERNEL_ROUNDING = 16 * torch.finfo(torch.float32).eps
_ORDERS = 6
FEATURES = {
    "plain": {},
    "no-filter": {"head_filter": False},
    "softcap": {"softcap": 3.0},
    "window": {"window": 5},
    "sinks": {"sinks": True},
    "all": {"softcap": 3.0, "window": 7, "sinks": True, "scale": 0.7, "head_filter": False},
}


def make_case(
    lengths,
    labels,
    query_heads=4,
    key_heads=2,
    head_dim=8,
    dtype=torch.float64,
    seed=0,
    sinks=False,
    sharpness=1.0,
    **options,
):
    """Packed random rows; `labels[r]` label tokens in row r, sharpened so that heads pass S > T.

    Drawn on the CPU in float64, so that a case is the same numbers, rounded, in every dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor(lengths).cumsum(0)
    starts = ends - torch.tensor(lengths)
    positions, correct = [], []
    for start, n, k in zip(starts.tolist(), lengths, labels, strict=True):
        chosen = torch.randperm(n, generator=generator)[:k].sort().values + start
        positions += chosen.tolist()
        correct += (torch.rand(k, generator=generator) < 0.5).tolist()
    draw = {"generator": generator, "dtype": torch.float64}
    query = torch.randn(len(lengths), query_heads, head_dim, **draw)
    key = torch.randn(sum(lengths), key_heads, head_dim, **draw)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(labels))
    group = query_heads // key_heads
    key[positions] += sharpness * query[owner].unflatten(1, (key_heads, group))[:, :, 0]
    case = {
        "query": query.to(dtype),
        "key": key.to(dtype),
        "key_start": starts.int(),
        "key_end": ends.int(),
        "label_positions": torch.tensor(positions, dtype=torch.int32),
        "label_offsets": torch.tensor([0, *labels]).cumsum(0).int(),
        "label_is_correct": torch.tensor(correct, dtype=torch.bool),
    }
    if sinks:
        case["sinks"] = torch.randn(query_heads, **draw).to(dtype)
    case = {name: tensor.to(DEVICE) for name, tensor in case.items()}
    return {**case, "penalty": 0.5, "reward": 1.0, **options}


def in_float64(case):
    """The same numbers, exactly, in float64."""
    return {
        name: value.double() if name in ("query", "key", "sinks") else value
        for name, value in case.items()
    }


def gradients(function, case, **options):
    """Results, and gradients of query, key and sinks from unequal weights of the losses."""
    leaves = {
        name: case[name].detach().clone().requires_grad_()
        for name in ("query", "key", "sinks")
        if case.get(name) is not None
    }
    result = function(**{**case, **options, **leaves})
    weights = torch.linspace(0.5, 1.5, result.loss.numel(), dtype=torch.float64).to(result.loss)
    grads = torch.autograd.grad(
        (result.loss * weights.view_as(result.loss)).sum(), list(leaves.values()), allow_unused=True
    )
    return result, grads


def eager(query, key, key_start, key_end, label_positions, label_offsets, label_is_correct, *,
          penalty, reward, scale=None, head_filter=True, softcap=None, window=None, sinks=None,
          threshold_from=None):  # fmt: skip
    """The loss as transformers' eager attention yields it: products in the inputs' dtype.

    `threshold_from` gives the filter's answers, so that rounding at S = T cannot decide.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    group = query.shape[1] // key.shape[1]
    losses, label_masses, correct_masses = [], [], []
    for row in range(len(query)):
        start, end = int(key_start[row]), int(key_end[row])
        keys = key[start:end].repeat_interleave(group, dim=1).transpose(0, 1)
        # As in eager attention, the last row is one of many: a product of a single row is summed in
        # another order, and more exactly on some processors.
        many_rows = query[row][:, None].expand(-1, 16, -1)
        scores = (many_rows @ keys.transpose(1, 2))[:, -1] * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if window is not None and end - start > window:
            scores[:, : end - start - window] = -torch.inf
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None]], dim=1)
        wide = torch.promote_types(query.dtype, torch.float32)
        alpha = torch.softmax(scores, dim=-1, dtype=wide).to(query.dtype)
        owned = slice(int(label_offsets[row]), int(label_offsets[row + 1]))
        on_labels = alpha[:, (label_positions[owned] - start).long()].to(wide)
        correct = label_is_correct[owned]
        loss = penalty * on_labels[:, ~correct].sum(1) + reward * (1 - on_labels[:, correct]).sum(1)
        losses.append(loss)
        label_masses.append(on_labels.sum(1))
        correct_masses.append(on_labels[:, correct].sum(1))
    loss = torch.stack(losses)
    if head_filter:
        loss = torch.where(threshold_from, loss, 0.0)
    masses = torch.stack(label_masses).detach(), torch.stack(correct_masses).detach()
    return reference.LastRowLoss(loss, *masses, threshold_from)


def error(actual, truth):
    """Relative error in norm, NaN where anything is NaN."""
    return ((actual.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def assert_as_good_as_eager(function, case, factor=2, **options):
    """Loss, masses and gradients lose at most `factor` times what eager does, or units of rounding.

    How much a sum loses depends on its order, so eager's loss is the worst of several orders of
    the head dimension, which leave the exact result as it is.
    """
    truth = _quantities(reference.last_row_loss, in_float64(case))
    is_induction = reference.last_row_loss(**in_float64(case)).is_induction
    unit = factor * torch.finfo(case["query"].dtype).eps
    if DEVICE == "cuda" and case["query"].dtype != torch.float64:
        unit = max(unit, KERNEL_ROUNDING)
    budgets = dict.fromkeys(truth, unit)
    generator = torch.Generator().manual_seed(0)
    for _ in range(_ORDERS):
        order = torch.randperm(case["query"].shape[-1], generator=generator).to(DEVICE)
        reordered = {**case, "query": case["query"][..., order], "key": case["key"][..., order]}
        for name, value in _quantities(eager, reordered, threshold_from=is_induction).items():
            exact = truth[name][..., order] if name in ("query", "key") else truth[name]
            budgets[name] = max(budgets[name], factor * error(value, exact))
    for name in ("label_mass", "correct_mass"):
        budgets[name] = max(budgets[name], rounding_of_mass(case))
    found = _quantities(function, case, **options)
    assert torch.equal(function(**case, **options).is_induction, is_induction)
    for name, exact in truth.items():
        if exact.norm() == 0:
            assert found[name].norm() == 0, name
            continue
        lost = error(found[name], exact)
        if name == "query" and lost > budgets[name]:
            budgets[name] = max(budgets[name], rounding_of_query_gradient(case, exact))
        assert lost <= budgets[name], (name, lost, budgets[name])


def rounding_of_mass(case):
    """A score's rounding is proportional to its terms; exp makes it the mass's relative error."""
    return torch.finfo(case["query"].dtype).eps * _largest_sum_of_terms(in_float64(case))


def rounding_of_query_gradient(case, exact):
    """What the gradient of queries loses where a label's score is rounded in two ways.

    The gradient has a label's part, its weight times alpha times its key, less the mean over all
    keys. The label's score is computed by itself for the mean, and in its row for its part; where
    nearly all attention is on labels, the two cancel but for their different rounding.
    """
    rounding, case = rounding_of_mass(case), in_float64(case)
    result = reference.last_row_loss(**case)
    scale = case["query"].shape[-1] ** -0.5 if case.get("scale") is None else case["scale"]
    weights = torch.linspace(0.5, 1.5, result.loss.numel()).to(result.loss).view_as(result.loss)
    if case.get("head_filter", True):
        weights = weights * result.is_induction
    wrong, correct = (torch.full_like(result.loss, case[n]) for n in ("penalty", "reward"))
    if case.get("objective") == "share":
        mass = result.label_mass.clamp_min(1e-30)  # rows without labels have no loss
        share = result.correct_mass / mass
        wrong, correct = (share + case["hold"]) / mass, (1 - share - case["hold"]) / mass
    parts = torch.zeros_like(case["query"])
    group = case["query"].shape[1] // case["key"].shape[1]
    offsets = case["label_offsets"].tolist()
    for row, owned in enumerate(map(range, offsets, offsets[1:])):
        for label in owned:
            ends = [0] * (row + 1) + [1] * (len(offsets) - row - 1)
            alone = {
                "label_positions": case["label_positions"][label : label + 1],
                "label_is_correct": case["label_is_correct"][label : label + 1],
                "label_offsets": torch.tensor(ends).to(case["label_offsets"]),
            }
            alpha = reference.last_row_loss(**{**case, **alone}).label_mass[row]
            weight = (correct if case["label_is_correct"][label] else wrong)[row].abs()
            key = case["key"][case["label_positions"][label]].repeat_interleave(group, dim=0)
            parts[row] += scale * (weights[row] * weight * alpha)[:, None] * key.abs()
    return rounding * (parts.norm() / exact.norm()).item()


def _largest_sum_of_terms(case):
    """The largest scale * sum |q_i k_i| of a score: rounding of a dot product is relative to it."""
    query, key = case["query"].abs(), case["key"].abs()
    scale = query.shape[-1] ** -0.5 if case.get("scale") is None else case["scale"]
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return scale * torch.einsum("rhd,thd->rht", query, keys).max().item()


def _quantities(function, case, **options):
    result, grads = gradients(function, case, **options)
    found = dict(zip(("query", "key", "sinks"), grads, strict=False))
    return {**result._asdict(), **found, "is_induction": result.is_induction.double()}
