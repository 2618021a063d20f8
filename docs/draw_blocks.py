"""Draw the blocks of docs/architectures.md, all in the same way, into docs/pictures; Hope has draw_hope.py.

    python docs/draw_blocks.py

A column of steps from the input at the top to the output at the bottom. Dark boxes hold a memory that changes while it
reads; the note beside a box says which state a token reads. A box with two halves runs them side by side.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from nestling.plotting.curves import COLORS, STYLE

HERE = Path(__file__).parent
PLAIN, MEMORY, ATTENTION = "#eef0f3", COLORS[0], COLORS[2]
HEIGHT, GAP, WIDTH = 0.74, 0.34, 5.6

# kind: "step", "memory" or "attention"; what it is; its formula; note. A list of two steps is drawn side by side.
Step = tuple[str, str, str, str]
FEED_FORWARD: Step = ("step", "feed-forward network", "x + SwiGLU(norm(x))", "")
NORM: Step = ("step", "norm", "", "")
BLOCKS: dict[str, list[Step | list[Step]]] = {
    "transformer": [
        ("step", "projections", "q, k, v = norm(x) W, rotary positions", ""),
        ("attention", "softmax attention", "softmax(q k) v", "reads every earlier\ntoken and itself"),
        ("step", "output", "x + o W", ""),
        FEED_FORWARD,
    ],
    "ada_transformer": [
        ("step", "projections", "q, k, v = norm(x) W, rotary positions", ""),
        ("attention", "softmax attention", "softmax(q k) v", "reads every earlier\ntoken and itself"),
        ("step", "output", "h = x + o W", ""),
        (
            "memory",
            "feed-forward network that learns",
            "W = W + l v φ(k)';  h + W φ(norm(h))",
            "the attention's k and v;\nafter the token's write",
        ),
    ],
    "linear": [
        ("step", "projections", "q, k, v, gate, rates = norm(x) W", ""),
        ("step", "short convolution, feature map, length 1", "", "DeltaNets; rotary\npositions in RetNet"),
        ("memory", "matrix memory", "W = a W (I - β k k') + β v k';  o = W q", "reads after the\ntoken's own write"),
        ("step", "denominator or norm of every head", "", ""),
        ("step", "gate, output", "x + (o * gate) W", ""),
        FEED_FORWARD,
    ],
    "rwkv7": [
        ("step", "token shift", "six mixes of x with the token before", ""),
        ("step", "projections", "r, k, v;  w, a, gate of low rank", ""),
        (
            "memory",
            "matrix memory",
            "W = W (diag(w) - κ (aκ)') + v k';  o = W r",
            "κ is k of length 1;\nreads after its write",
        ),
        ("step", "GroupNorm, the token's own value", "norm(o) + (r · ρ k) v", ""),
        ("step", "gate, output", "x + (o * gate) W", ""),
        FEED_FORWARD,
    ],
    "mamba2": [
        ("step", "projections", "z, x, B, C, dt = norm(x) W", ""),
        ("step", "short convolution of x, B, C", "", ""),
        ("memory", "matrix memory", "W = exp(-A dt) W + dt x B';  o = W C", "reads after the\ntoken's own write"),
        ("step", "skip, gate, norm of every group", "norm((o + D x) * silu(z))", ""),
        ("step", "output", "x + o W", "no channel mixer"),
    ],
    "samba": [
        ("memory", "Mamba-2", "x + Mamba-2(norm(x))", "reads after the\ntoken's own write"),
        FEED_FORWARD,
        ("attention", "sliding-window attention", "x + attention(norm(x))", "reads the last\n`window` tokens"),
        FEED_FORWARD,
    ],
    "ttt": [
        ("step", "projections, two short convolutions", "qk, v = norm(x) W", ""),
        ("step", "rotary positions within the mini-batch", "", ""),
        (
            "memory",
            "a small model f that is trained",
            "W -= l ∇|LN f(k) + k - v|²;  o = f(q)",
            "writes once a mini-batch,\nreads its own token's W",
        ),
        ("step", "norm, gate, output", "x + (LN(o) * gelu(x W)) W", ""),
        FEED_FORWARD,
    ],
    "titans_lmm": [
        ("step", "projections, short convolution", "q, k, v; q and k of length 1", ""),
        (
            "memory",
            "neural memory M",
            "M = a M + S;  S = b S - l ∇|M(k) - v|²;  o = M(q)",
            "output weight's gradient\ntoken by token;\nreads its own M",
        ),
        ("step", "norm, gate, output", "x + (norm(o) * silu(x W)) W", ""),
        FEED_FORWARD,
    ],
    "titans_mac": [
        NORM,
        ("memory", "retrieve", "h = M(q)", "M before the segment"),
        ("attention", "attention over persistent tokens, h, segment", "y", "sees h and tokens\nup to itself"),
        ("memory", "write the answers y into M", "", "gradients at the\nsegment's start"),
        ("memory", "read", "M(y)", "M after the token's\nown write"),
        ("step", "gate, output", "x + (y * silu(read)) W", ""),
        FEED_FORWARD,
    ],
    "titans_mag": [
        NORM,
        [
            ("attention", "sliding window", "and persistent tokens", ""),
            ("memory", "neural memory", "o = M(q)", "M after the token's\nown write"),
        ],
        ("step", "gate, output", "x + (norm(y) * silu(norm(o))) W", ""),
        FEED_FORWARD,
    ],
    "titans_mal": [
        NORM,
        ("memory", "neural memory", "persistent tokens first; o = M(q)", "M after the token's\nown write"),
        ("attention", "sliding window over the memory's answers", "", "sees the last `window`\nand the persistent"),
        ("step", "output", "x + o W", ""),
        FEED_FORWARD,
    ],
}


def draw(steps: list[Step | list[Step]]) -> Figure:
    """One block."""
    height = len(steps) * (HEIGHT + GAP) + 1.0
    figure = Figure(figsize=(WIDTH + 2.5, height * 0.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlim(0, WIDTH + 2.5)
    axes.set_ylim(-height, 0.1)
    axes.set_axis_off()
    y = -0.4
    axes.text(WIDTH / 2, y + 0.18, "x", ha="center", style="italic")
    for step in steps:
        _arrow(axes, y, y - GAP)
        y -= GAP
        parts = step if isinstance(step, list) else [step]
        width = (WIDTH - 0.4 - 0.2 * (len(parts) - 1)) / len(parts)
        for i, (kind, text, formula, note) in enumerate(parts):
            _box(axes, 0.2 + i * (width + 0.2), y, width, kind, text, formula)
            if note:
                axes.text(WIDTH + 0.05, y - HEIGHT / 2, note, va="center", fontsize=9.5, color="#3c4149")
        y -= HEIGHT
    _arrow(axes, y, y - GAP)
    return figure


def _arrow(axes: Axes, top: float, bottom: float) -> None:
    axes.add_patch(
        FancyArrowPatch((WIDTH / 2, top), (WIDTH / 2, bottom), arrowstyle="-|>", mutation_scale=11, color="#8a8f98")
    )


def _box(axes: Axes, left: float, top: float, width: float, kind: str, text: str, formula: str) -> None:
    color = {"step": PLAIN, "memory": MEMORY, "attention": ATTENTION}[kind]
    axes.add_patch(
        FancyBboxPatch(
            (left, top - HEIGHT), width, HEIGHT, boxstyle="round,pad=0,rounding_size=0.1", fc=color, ec="#c3c8cf"
        )
    )
    ink = "#20242a" if kind == "step" else "white"
    middle, x = top - HEIGHT / 2, left + width / 2
    axes.text(
        x, middle + (0.15 if formula else 0), text, ha="center", va="center", color=ink, fontsize=10.5, weight="bold"
    )
    axes.text(x, middle - 0.17, formula, ha="center", va="center", color=ink, fontsize=9)


def main() -> None:
    """All pictures."""
    folder = HERE / "pictures"
    folder.mkdir(exist_ok=True)
    with rc_context(STYLE):
        for name, steps in BLOCKS.items():
            draw(steps).savefig(folder / f"{name}.svg", format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
