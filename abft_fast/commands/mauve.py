"""Score by MAUVE (Pillutla et al. 2021) how close texts after training are to those before.

The mauve-text package computes the score. A second sample of the untrained model is scored too: it
shows which score a model reaches that training did not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from abft_fast.commands.session import Session
from abft_fast.core.backbone import backbone
from abft_fast.data import Dataset
from abft_fast.data.mauve_prefixes import prefixes
from abft_fast.errors import UserError
from abft_fast.models import loading
from abft_fast.options import TrainConfig
from abft_fast.training.run_folder import RunFolder

SAMPLES = {"before": 0, "before-again": 1, "after": 2}
"""The samples of text, and the seed of each."""

_NEW_TOKENS = 64
_BATCH = 32  # prefixes generated from, or texts looked at, together


def check(config: TrainConfig, dataset: Dataset) -> None:
    """Refuse a run that could not end with a score.

    Raises:
        UserError: there are too few prefixes, the model's context is too short for a continuation,
            or `--mauve-model` cannot be read.
    """
    prefixes(config.mauve_prefix, dataset)
    _room(loading.read_config(config.model))
    if config.mauve_model is not None:
        loading.read_config(config.mauve_model)
        loading.read_tokenizer(config.mauve_model)


def record_texts(config: TrainConfig, run: RunFolder, session: Session, sample: str) -> None:
    """Let the session's model continue every prefix, unless the run has this sample already."""
    if not run.texts(sample):
        beginnings = prefixes(config.mauve_prefix, session.dataset)
        tokenizer = session.encoder.tokenizer
        with session.accelerator.autocast():
            texts = generate(session.model, tokenizer, beginnings, SAMPLES[sample])
        run.record_texts(sample, texts)


def tokens_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts; special tokens that stand in a text stay text."""
    return tokenizer(list(texts), split_special_tokens=True, verbose=False)["input_ids"]


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prefixes: Sequence[str], seed: int
) -> list[str]:
    """Return each prefix with its continuation by the model, sampled at temperature 1.

    Raises:
        UserError: the model's context is too short for a continuation.
    """
    room = _room(backbone(model).config)
    encoded = [ids if room is None else ids[-room:] for ids in tokens_of(tokenizer, prefixes)]
    device = model.get_input_embeddings().weight.device
    model.eval()
    texts: list[str] = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for batch in _batches(encoded):
            longest = max(map(len, batch))
            ids = torch.tensor([[0] * (longest - len(p)) + p for p in batch], device=device)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
            output = model.generate(
                input_ids=ids,
                attention_mask=mask.to(device),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_p=0.0,
                repetition_penalty=1.0,
                max_new_tokens=_NEW_TOKENS,
                pad_token_id=tokenizer.eos_token_id or 0,
            )
            kept = [row[longest - len(p) :] for row, p in zip(output.tolist(), batch, strict=True)]
            texts += tokenizer.batch_decode(kept, skip_special_tokens=True)
    return texts


def _room(config: PreTrainedConfig) -> int | None:
    """Return how many tokens of a prefix a model can continue; None without a limit."""
    length = loading.context_length(config)
    if length is not None and length <= _NEW_TOKENS:
        raise UserError(
            f"--mauve-test continues texts by {_NEW_TOKENS} tokens, but the model's context has "
            f"{length}: use a model with a longer one"
        )
    return None if length is None else length - _NEW_TOKENS


def score_texts(config: TrainConfig, run: RunFolder, session: Session) -> None:
    """Score the run's samples and record the scores.

    The session's model is freed first, to make room for the model that reads the texts.
    """
    if run.mauve:
        return
    import mauve

    name = config.mauve_model or config.model
    session.model = None
    device, bits, placement = session.accelerator.device, None, None
    if config.mauve_model is None:  # load the model as training did
        bits = config.bits if config.quantized else None
        placement = session.placement
    model = loading.load(name, device, session.arithmetic.dtype, bits, placement)
    tokenizer = loading.read_tokenizer(name)
    with session.accelerator.autocast():
        features = {
            sample: text_features(model, tokenizer, run.texts(sample)).numpy() for sample in SAMPLES
        }

    def score(sample: str) -> float:
        return float(mauve.compute_mauve(features["before"], features[sample], verbose=False).mauve)

    scores = {"after": score("after"), "before_again": score("before-again")}
    run.record_mauve({**scores, "texts": len(features["after"]), "features": name})


def text_features(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> torch.Tensor:
    """Return the model's last hidden state at each text's last token, (texts, width) float32."""
    inner = backbone(model).eval()
    device = inner.get_input_embeddings().weight.device
    limit = loading.context_length(inner.config)
    encoded = [ids if limit is None else ids[-limit:] for ids in tokens_of(tokenizer, texts)]
    rows = []
    with torch.no_grad():
        for batch in _batches(encoded):
            longest = max(map(len, batch))
            ids = torch.tensor([p + [0] * (longest - len(p)) for p in batch], device=device)
            hidden = inner(ids, use_cache=False).last_hidden_state  # causal: padding is not seen
            last = torch.tensor([len(p) - 1 for p in batch], device=device)
            rows.append(hidden[torch.arange(len(batch), device=device), last].float().cpu())
    return torch.cat(rows)


def _batches(items: Sequence[list[int]]) -> Iterator[Sequence[list[int]]]:
    for start in range(0, len(items), _BATCH):
        yield items[start : start + _BATCH]
