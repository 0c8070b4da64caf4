"""Make the built-in model: `python -m abft_fast.builtin.recipe` (`make builtin-model`).

Reads the texts of StaICC's calibration and demonstration parts, never a label and never the test
part; trains a small SmolLM3 on pseudo-tasks (tasks.py) until its heads find the labels in context.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, SmolLM3Config, SmolLM3ForCausalLM

from abft_fast import data
from abft_fast.builtin import builtin_model_path
from abft_fast.builtin.tasks import Corpus, PseudoTask, Vocabulary, sample_sequence
from abft_fast.builtin.tokenizer import train_tokenizer
from abft_fast.builtin.vectors import document_vectors, token_vectors

HIDDEN, HEADS, LAYERS, MLP, WINDOW = 192, 6, 4, 384, 32
CONTENT = 128  # embedding dimensions that start as word vectors; the others start random
DOCUMENT = 64  # dimensions of the whitened document space
CONTEXT = 2048
SEQUENCE, BATCH = 288, 24
LONGEST_TEXT = 60  # tokens; longer texts are cut, only while the base is made
GUIDED_HEADS = 4  # of the 6 of each full layer, drawn to label tokens; two stay free
EXTRA_FIELDS = ("text", "input", "message", "comment", "headline", "title", "story", "post")
EXTRA_LABEL_FIELDS = ("label", "class", "type", "kind", "answer", "group", "category", "tag")


def build(output: Path, steps: int, seed: int, learning_rate: float = 1.5e-3) -> None:
    """Train tokenizer and model and write them to `output`."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    tokenizer, corpus, vocabulary, vectors = prepare(random)
    model = initial_model(tokenizer, vectors)
    to_document = nn.ModuleList(nn.Linear(HIDDEN, DOCUMENT) for _ in range(2))
    parameters = [*model.parameters(), *to_document.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps + 1, pct_start=min(0.3, 100 / steps)
    )
    running, started = np.zeros(5), time.perf_counter()
    for step in range(steps):
        batch = [sample_sequence(corpus, vocabulary, SEQUENCE, random) for _ in range(BATCH)]
        loss, figures = objective(model, to_document, corpus, batch, step / steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        running = 0.98 * running + 0.02 * np.array(figures)
        if (step + 1) % 50 == 0:
            label, document, mass, correct, accuracy = running / (1 - 0.98 ** (step + 1))
            print(
                f"step {step + 1}/{steps}  label loss {label:.3f}  "
                f"document error {document:.3f}  label mass {mass:.3f}, correct {correct:.3f}  "
                f"accuracy where seen {accuracy:.3f}  "
                f"{(time.perf_counter() - started) / (step + 1):.2f} s a step",
                flush=True,
            )
        if (step + 1) % 200 == 0 or step + 1 == steps:
            save(model, tokenizer, output)


def prepare(
    random: np.random.Generator,
) -> tuple[PreTrainedTokenizerFast, Corpus, Vocabulary, np.ndarray]:
    """Return the tokenizer, the corpus, the prompt vocabulary and the first token vectors."""
    datasets = [data.load(name) for name in data.DATASETS]
    texts = [
        [example.text for example in (*dataset.training, *dataset.demonstrations)]
        for dataset in datasets
    ]
    label_words = sorted(
        {w for dataset in datasets for w in (*dataset.label_words, *dataset.staicc_label_words)}
    )
    input_fields = sorted({d.input_prefix.rstrip(" :") for d in datasets}) + list(EXTRA_FIELDS)
    label_fields = sorted({d.label_prefix.rstrip(" :") for d in datasets}) + list(
        EXTRA_LABEL_FIELDS
    )
    frame = sorted({word for name in (*input_fields, *label_fields) for word in name.split()})
    tokenizer = train_tokenizer(
        (text for part in texts for text in part), [*label_words, *frame], CONTEXT
    )
    documents = [tokenizer(part)["input_ids"] for part in texts]
    source = np.concatenate([np.full(len(part), i) for i, part in enumerate(documents)])
    documents = [ids[:LONGEST_TEXT] for part in documents for ids in part]
    keep = np.array([len(ids) >= 3 for ids in documents])
    source, documents = source[keep], [d for d, k in zip(documents, keep, strict=True) if k]

    vectors = token_vectors(documents, len(tokenizer), CONTENT)
    pool = [tokenizer(word)["input_ids"] for word in label_words]
    if any(len(ids) != 1 for ids in pool):
        raise AssertionError("a label word is not a single token")
    words = [i for t, i in tokenizer.get_vocab().items() if t[0] == "Ġ" and t[1:].isalpha()]
    others = random.choice([i for i in words if i > 1500], size=150, replace=False)
    label_ids = sorted({ids[0] for ids in pool} | {int(i) for i in others})
    vectors[label_ids] = 0.0  # a label word carries no content, only its own random direction

    def following(name: str) -> list[int]:
        return tokenizer(f"x\n{name}:")["input_ids"][2:]

    vocabulary = Vocabulary(
        label_words=label_ids,
        input_fields=[(tokenizer(f"{n}:")["input_ids"], following(n)) for n in input_fields],
        label_fields=[tokenizer(f"{n}:")["input_ids"] for n in label_fields],
        newline=tokenizer("x\ny")["input_ids"][1],
    )
    corpus = Corpus(documents, document_vectors(documents, vectors, DOCUMENT), source)
    return tokenizer, corpus, vocabulary, vectors


def initial_model(tokenizer: PreTrainedTokenizerFast, vectors: np.ndarray) -> SmolLM3ForCausalLM:
    """Return two sliding-window layers and two full ones; layer 0 begins as its window's mean."""
    config = SmolLM3Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=CONTEXT,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=["sliding_attention"] * 2 + ["full_attention"] * 2,
        no_rope_layers=[1, 1, 0, 0],  # 1 is with RoPE; what heads match has no position
        attention_bias=True,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    model = SmolLM3ForCausalLM(config)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.normal_(std=0.5)
        embedding[:, :CONTENT] = 0.5 * CONTENT**0.5 * torch.from_numpy(vectors)
        head = model.get_output_embeddings().weight
        head.zero_()
        head[:, CONTENT:] = 0.1 * embedding[:, CONTENT:]
        first = model.model.layers[0].self_attn
        for projection in (first.v_proj, first.o_proj):
            projection.weight.copy_(torch.eye(HIDDEN))
        for projection in (first.q_proj, first.k_proj):
            projection.weight.mul_(0.1)
    return model


def objective(
    model: SmolLM3ForCausalLM,
    to_document: nn.ModuleList,
    corpus: Corpus,
    batch: list[PseudoTask],
    progress: float,
) -> tuple[torch.Tensor, list[float]]:
    """Label loss + what a sentence is about after layer 2 + attention of some heads on labels."""
    longest = max(len(s.input_ids) for s in batch)
    ids = torch.tensor([s.input_ids + [0] * (longest - len(s.input_ids)) for s in batch])
    output = model.model(ids, use_cache=False, output_attentions=True, output_hidden_states=True)
    rows = torch.tensor([row for row, s in enumerate(batch) for _ in s.documents])
    queries = torch.tensor([position for s in batch for position in s.query_positions])
    labels = torch.tensor([position for s in batch for position in s.label_positions])
    documents = np.array([document for s in batch for document in s.documents])
    seen = torch.tensor([was_seen for s in batch for was_seen in s.seen])

    logits = model.lm_head(output.last_hidden_state[rows, queries])
    targets = ids[rows, labels]
    weight = torch.where(seen, 1.0, 0.1)
    label_loss = (F.cross_entropy(logits, targets, reduction="none") * weight).sum() / weight.sum()

    residual = output.hidden_states[2]
    residual = residual * residual.pow(2).mean(dim=-1, keepdim=True).add(1e-6).rsqrt()
    truth = torch.from_numpy(corpus.vectors[documents])
    query_error, label_error = (
        F.mse_loss(head(residual[rows, positions]), truth)
        for head, positions in zip(to_document, (queries, labels), strict=True)
    )
    document_error = query_error + label_error

    is_label = torch.zeros(ids.shape, dtype=torch.bool)
    is_label[rows, labels] = True
    later = queries > torch.tensor([s.label_positions[0] for s in batch])[rows]
    same_label = is_label[rows] & (ids[rows] == targets[:, None])
    masses, correct_masses = [], []
    for attention in output.attentions[LAYERS // 2 :]:
        last_rows = attention[rows, :GUIDED_HEADS, queries]
        masses.append((last_rows * is_label[rows, None])[later].sum(dim=-1))
        correct_masses.append((last_rows * same_label[:, None])[seen].sum(dim=-1))
    mass, correct = torch.stack(masses), torch.stack(correct_masses)
    guidance = (
        -mass.clamp_min(1e-6).log().mean()
        if progress < 0.1
        else (-0.5 * correct.clamp_min(1e-6).log().mean())
    )
    loss = label_loss + document_error + guidance
    accuracy = (logits.argmax(dim=-1) == targets)[seen].float().mean()
    return loss, [
        label_loss.item(),
        document_error.item() / 2,
        mass.mean().item(),
        correct.mean().item(),
        accuracy.item(),
    ]


def save(model: SmolLM3ForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write half-precision weights under a float32 config: half the file, the same numbers."""
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(output, state_dict=half)
    tokenizer.save_pretrained(output)


def main() -> None:
    """Build the model that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=builtin_model_path())
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    build(arguments.output, arguments.steps, arguments.seed)


if __name__ == "__main__":
    main()
