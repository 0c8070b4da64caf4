"""Draw the documentation's figures: `python docs/figures/draw.py` (`make figures`).

Each function returns one drawing; its file is FUNCTION.svg beside this script. What a figure says
in numbers is computed here, so it cannot disagree with the method.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

from svg import Drawing

HERE = Path(__file__).parent

# The layers of the library, highest first; a package imports only from lines below its own.
LAYERS = (
    ("cli", "parses options and calls a command"),
    ("commands   ·   experiments", "one module a verb   ·   sweeps and tables"),
    ("memory   ·   reporting", "plans what fits, without weights   ·   the page of runs"),
    ("streaming", "training and tests, block by block"),
    ("training   ·   analysis", "the loop, the methods   ·   what training did to heads"),
    ("evaluation", "StaICC's tests, calibration"),
    ("prompts", "text → token ids and label positions"),
    ("models   ·   options", "reads and adapts a model   ·   every option once"),
    ("builtin   ·   plots", "the small model in the box   ·   the style of pictures"),
    ("core   ·   data   ·   runtime", "packing and the loss   ·   datasets   ·   files, processes"),
    ("errors", "one line for the user"),
    ("abft_kernels", "one layer's attention and loss; torch and triton alone"),
)


def method() -> Drawing:
    """Show the last row of one head's attention, its label columns, the filter and the loss."""
    tokens = "dull plot : negative warm fun : positive so moving : positive a joy :".split(" ")
    label_at = [i for i, word in enumerate(tokens) if word in ("negative", "positive")]
    correct = [tokens[i] == "positive" for i in label_at]
    attention = [0.02, 0.02, 0.03, 0.09, 0.03, 0.05, 0.03, 0.31, 0.02, 0.04, 0.02, 0.22]
    attention += [0.03, 0.05, 0.04]
    k, n = len(label_at), len(tokens)
    mass, threshold = sum(attention[i] for i in label_at), k / (k + math.log(n))

    drawing = Drawing(760, 0, "The attention-behavior loss of one head on one prompt")
    widths = {":": 20, "negative": 70, "positive": 70}
    edges = [24.0]
    for word in tokens:
        edges.append(edges[-1] + widths.get(word, 54 if len(word) > 4 else 42))
    scale = (drawing.width - 48) / (edges[-1] - 24)
    edges = [24 + (x - 24) * scale for x in edges]
    top, step = 78, 8

    drawing.text(24, 30, "One head's attention on one prompt", bold=True)
    drawing.text(736, 30, "the query's label is “positive”", "muted", anchor="end")
    for row in range(n - 1):
        for left, right in pairwise(edges[: row + 2]):
            drawing.rect(left + 1, top + row * step, right - left - 2, step - 2, radius=1)
    last = top + (n - 1) * step + 2
    colors = {i: "good" if right else "bad" for i, right in zip(label_at, correct, strict=True)}
    for i, (left, right) in enumerate(pairwise(edges)):
        strength = 0.08 + 0.92 * attention[i] / max(attention)
        drawing.rect(left + 1, last, right - left - 2, 30, radius=2)
        drawing.rect(left + 1, last, right - left - 2, 30, colors.get(i, "row"), opacity=strength)
        middle = (left + right) / 2
        drawing.text(
            middle, last + 50, tokens[i], colors.get(i, "text"), anchor="middle", bold=i in colors
        )
    for i, color in colors.items():
        left, right = edges[i], edges[i + 1]
        drawing.rect(left, top - 4, right - left, last - top + 36, "", edge=color, radius=4)
        middle = (left + right) / 2
        sign = "+" if color == "good" else "−"
        drawing.text(middle, top - 12, sign, color, size=20, anchor="middle", bold=True)
        drawing.text(middle, last + 70, f"α = {attention[i]:.2f}", color, anchor="middle", size=13)
    drawing.text(25, last + 70, "last row, α", "row", size=13)

    below = last + 90
    parts = " + ".join(f"{attention[i]:.2f}" for i in label_at)
    wrong = " + ".join(f"{attention[i]:.2f}" for i, c in colors.items() if c == "bad")
    missing = " + ".join(f"{1 - attention[i]:.2f}" for i, c in colors.items() if c == "good")
    drawing.rect(24, below, 350, 92, "cell", edge="edge", radius=6)
    drawing.text(38, below + 24, "Filter: is it an induction head?", bold=True)
    drawing.text(38, below + 48, f"S = {parts} = {mass:.2f}, on labels")
    drawing.text(38, below + 72, f"T = k / (k + ln n) = {k} / ({k} + ln {n}) = {threshold:.2f}")
    drawing.line(374, below + 46, 402, below + 46, arrow=True)
    drawing.rect(404, below, 332, 92, "cell", edge="edge", radius=6)
    verdict = "Yes, S > T: its loss is" if mass > threshold else "No, S ≤ T: its loss is 0"
    drawing.text(418, below + 24, verdict, bold=True)
    drawing.text(418, below + 48, f"A · {wrong}", "bad", bold=True)
    drawing.text(722, below + 48, "attention on wrong labels", "bad", size=13, anchor="end")
    drawing.text(418, below + 72, f"+ B · ({missing})", "good", bold=True)
    drawing.text(722, below + 72, "missing on right ones", "good", size=13, anchor="end")
    drawing.height = below + 92 + 24
    return drawing


def packing() -> Drawing:
    """Show four prompts padded, and the same four packed."""
    lengths = (9, 4, 6, 3)
    colors = ("row", "good", "warm", "bad")
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    total, cell = offsets[-1], 26
    drawing = Drawing(760, 0, "Four prompts padded, and the same four packed")
    places = len(lengths) * max(lengths)
    padded = f"Padded: {len(lengths)} × {max(lengths)} places, {places - total} hold no token"
    drawing.text(24, 32, padded, bold=True)
    y = 46
    for length, color in zip(lengths, colors, strict=True):
        for i in range(max(lengths)):
            if i < length:
                drawing.rect(24 + i * cell, y, cell - 3, 16, color, opacity=0.75)
            else:
                drawing.rect(24 + i * cell, y, cell - 3, 16, "", edge="muted", dashed=True)
        y += 22
    y += 30
    drawing.text(24, y, f"Packed: {total} places, {total} tokens", bold=True)
    y += 14
    for (start, end), color in zip(pairwise(offsets), colors, strict=True):
        for i in range(start, end):
            drawing.rect(24 + i * cell, y, cell - 3, 16, color, opacity=0.75)
    y += 38
    rows = {
        "position_ids": [i for length in lengths for i in range(length)],
        "cu_seqlens": offsets,
    }
    for i, position in enumerate(rows["position_ids"]):
        drawing.text(24 + i * cell + 11, y, str(position), anchor="middle", size=12)
    drawing.text(24 + total * cell + 8, y, "position_ids", "muted", size=12)
    y += 22
    for offset in offsets:
        drawing.text(24 + offset * cell, y, str(offset), "row", anchor="start", size=12, bold=True)
    drawing.text(24 + total * cell + 28, y, "cu_seqlens", "muted", size=12)
    y += 34
    drawing.text(24, y, "Attention: each prompt sees itself alone.", bold=True)
    drawing.text(24, y + 22, "Only the last row of each prompt has a loss.", "muted", size=13)
    small, left = 9, 420
    y -= 12
    for (start, end), color in zip(pairwise(offsets), colors, strict=True):
        for row in range(start, end):
            for column in range(start, row + 1):
                drawing.rect(
                    left + column * small, y + row * small, small - 1.5, small - 1.5, color,
                    opacity=0.95 if row == end - 1 else 0.25, radius=1,
                )  # fmt: skip
    drawing.rect(left - 3, y - 3, total * small + 5, total * small + 5, "", edge="edge")
    drawing.height = y + total * small + 24
    return drawing


def gradient_modes() -> Drawing:
    """Show how far one layer's loss reaches in each gradient mode."""
    drawing = Drawing(760, 372, "How far a layer's loss reaches: full, N = 2 and local")
    modes = (
        ("full", "every earlier layer", "whole model", None),
        ("N = 2", "its block of 2 layers", "one block", 2),
        ("local", "its own layer", "one layer", 1),
    )
    layers, height = 4, 44
    for column, (name, reach, memory, block) in enumerate(modes):
        x = 24 + column * 242
        drawing.text(x, 34, f"gradient = {name}", bold=True, size=15)
        drawing.text(x, 54, f"a loss trains {reach}", "muted", size=13)
        for layer in range(layers):
            y = 76 + (layers - 1 - layer) * (height + 16)
            drawing.rect(x, y, 128, height, "cell", edge="edge", radius=5)
            drawing.text(x + 12, y + 27, f"layer {layer}")
            drawing.text(x + 116, y + 27, "W_Q W_K", "row", size=11, anchor="end")
            begins = block is not None and layer % block == 0
            if layer and begins:
                drawing.line(x - 8, y + height + 8, x + 228, y + height + 8, "bad", dashed=True)
            elif layer:
                drawing.line(x + 64, y + height + 16, x + 64, y + height + 1, "muted", arrow=True)
            drawing.text(x + 140, y + 20, "loss", "warm", size=12)
            first = 0 if block is None else layer // block * block
            lane = x + 150 + 18 * (layer - first)
            bottom = 76 + (layers - 1 - first) * (height + 16) + height - 8
            drawing.line(lane, y + 26, lane, bottom, "warm", arrow=True)
        drawing.text(x, 76 + layers * (height + 16) + 12, f"memory of training: {memory}", size=13)
    drawing.text(
        24,
        356,
        "Red dashes: the hidden states are detached; no gradient crosses.",
        "muted",
        size=12,
    )
    return drawing


def flow() -> Drawing:
    """Show the path of data from text to report."""
    drawing = Drawing(760, 0, "From text to report: what each package does to the data")
    steps = (
        ("data", "dataset of\ntexts and labels"),
        ("prompts", "token ids, label\npositions"),
        ("core.packing", "one flat batch of\nT tokens"),
        ("the model itself", "its own forward, with\ncore.attention inside"),
        ("core.objective", "sum of the layers'\nlosses"),
        ("training", "Adam, penalty\ncontrol, checkpoints"),
        ("evaluation", "StaICC's tests before\nand after"),
        ("commands.printing", "the table you\nread"),
    )
    width, height, gap = 160, 84, 24
    for i, (name, what) in enumerate(steps):
        row, column = divmod(i, 4)
        x, y = 24 + column * (width + gap), 48 + row * (height + 56)
        drawing.rect(x, y, width, height, "cell", edge="edge", radius=6)
        drawing.text(x + width / 2, y + 26, name, "row", anchor="middle", bold=True, size=14)
        for line, text in enumerate(what.split("\n")):
            drawing.text(x + width / 2, y + 50 + 18 * line, text, anchor="middle", size=13)
        if column < 3:
            drawing.line(x + width + 2, y + height / 2, x + width + gap - 2, y + height / 2,
                         arrow=True)  # fmt: skip
    turn = 48 + height + 28
    right, left = 24 + 3 * (width + gap) + width / 2, 24 + width / 2
    drawing.line(right, 48 + height + 2, right, turn)
    drawing.line(right, turn, left, turn)
    drawing.line(left, turn, left, turn + 26, arrow=True)
    drawing.text(24, 32, "Data flows one way", bold=True)
    drawing.text(
        736,
        32,
        "abft_kernels computes one layer's attention and loss",
        "muted",
        anchor="end",
        size=13,
    )
    drawing.height = 48 + 2 * height + 56 + 24
    return drawing


def layers() -> Drawing:
    """Show the packages in their order of import."""
    height = 40
    drawing = Drawing(
        760, 70 + len(LAYERS) * (height + 6), "The layers of abft-fast, highest first"
    )
    drawing.text(24, 34, "A package imports only from below its own line", bold=True)
    for i, (names, what) in enumerate(LAYERS):
        y = 52 + i * (height + 6)
        kernels = names == "abft_kernels"
        drawing.rect(24, y, 712, height, "row" if kernels else "cell", edge="edge",
                     opacity=0.16 if kernels else 1, radius=6)  # fmt: skip
        drawing.text(40, y + 25, names, "row", bold=True, size=14)
        drawing.text(720, y + 25, what, anchor="end", size=13)
    return drawing


FIGURES = (method, packing, gradient_modes, flow, layers)


def contents() -> dict[str, str]:
    """Return every figure's file by its name."""
    return {f"{figure.__name__}.svg": figure().svg() for figure in FIGURES}


if __name__ == "__main__":
    for name, content in contents().items():
        (HERE / name).write_text(content, encoding="utf-8")
