"""Draw the blocks of docs/architectures.md, all in the same way, into docs/pictures.

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
HEIGHT, GAP, WIDTH = 0.62, 0.34, 5.2

# kind: "step", "memory" or "attention"; text; note. A list of two steps is drawn side by side.
Step = tuple[str, str, str]
FEED_FORWARD: Step = ("step", "+ SwiGLU(norm)", "")
BLOCKS: dict[str, list[Step | list[Step]]] = {
    "transformer": [
        ("step", "norm; q, k, v = x W; rotary positions", ""),
        ("attention", "softmax attention", "every earlier token\nand itself"),
        ("step", "W_out, + x", ""),
        FEED_FORWARD,
    ],
    "linear": [
        ("step", "norm; q, k, v, gate, rates = x W", ""),
        ("step", "short convolution, feature map, length 1", "DeltaNets; rotary\npositions in RetNet"),
        ("memory", "W_t = a W (I - beta k k^T) + beta v k^T", "W_t: after the\ntoken's own write"),
        ("step", "denominator or norm of every head", ""),
        ("step", "* gate, W_out, + x", ""),
        FEED_FORWARD,
    ],
    "mamba2": [
        ("step", "norm; z, x, B, C, dt = x W", ""),
        ("step", "short convolution and SiLU of x, B, C", ""),
        ("memory", "W_t = exp(-A dt) W + dt x B^T;  W_t C", "W_t: after the\ntoken's own write"),
        ("step", "+ D x, * silu(z), norm of every group", ""),
        ("step", "W_out, + x", "no channel mixer"),
    ],
    "samba": [
        ("memory", "Mamba-2 and + x", "W_t: after the\ntoken's own write"),
        FEED_FORWARD,
        ("attention", "sliding-window attention and + x", "the last `window`\ntokens"),
        FEED_FORWARD,
    ],
    "ttt": [
        ("step", "norm; qk, v = x W; two short convolutions", ""),
        ("step", "rotary positions within the mini-batch", ""),
        ("memory", "f(q_t; W_t),  W -= l grad |LN f(k) + k - v|^2", "gradients: start of the\nmini-batch; read: W_t"),
        ("step", "LayerNorm, * gelu(x W_g), W_out, + x", ""),
        FEED_FORWARD,
    ],
    "titans_lmm": [
        ("step", "norm; q, k, v = silu(conv(x W)); q, k of length 1", ""),
        ("memory", "M_t = a M + S_t,  S_t = b S - l grad|M(k) - v|^2", "gradients: start of the\nchunk; read: M_t"),
        ("step", "norm, * silu(x W_g), W_out, + x", ""),
        FEED_FORWARD,
    ],
    "titans_mac": [
        ("step", "norm", ""),
        ("memory", "h = M*(q): retrieve", "memory BEFORE the\nsegment"),
        ("attention", "attention over persistent | h | segment", "h and tokens up to\nitself"),
        ("memory", "write y, the attention's answers", "gradients: start of\nthe segment"),
        ("memory", "read M*(y)", "memory after its own\nwrite"),
        ("step", "y * silu(read), W_out, + x", ""),
        FEED_FORWARD,
    ],
    "titans_mag": [
        ("step", "norm", ""),
        [
            ("attention", "sliding window\nand persistent", ""),
            ("memory", "neural memory", "memory: M_t, after\nits own write"),
        ],
        ("step", "norm(y) * silu(norm(M)), W_out, + x", ""),
        FEED_FORWARD,
    ],
    "titans_mal": [
        ("step", "norm", ""),
        ("memory", "neural memory (persistent tokens first)", "M_t: after its\nown write"),
        ("attention", "sliding window over the memory's answers", "the last `window`\nand the persistent"),
        ("step", "W_out, + x", ""),
        FEED_FORWARD,
    ],
    "hope": [
        ("step", "norm; u = silu(conv(x W)), q", ""),
        ("memory", "k, v, rates = M_k, M_v, M_eta, M_alpha (u)", "start of the chunk"),
        ("memory", "write every M with (k, M(v)); o = M(q)", "M: after its own write"),
        ("step", "norm, * silu(x W_g), W_out, + x", ""),
        ("memory", "continuum: + MLP of period 64, 256, ...", "each: start of its\nperiod"),
    ],
}


def draw(steps: list[Step | list[Step]]) -> Figure:
    """One block."""
    height = len(steps) * (HEIGHT + GAP) + 1.0
    figure = Figure(figsize=(WIDTH + 2.6, height * 0.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlim(0, WIDTH + 2.6)
    axes.set_ylim(-height, 0.1)
    axes.set_axis_off()
    y = -0.4
    axes.text(WIDTH / 2, y + 0.18, "x", ha="center", style="italic")
    for step in steps:
        _arrow(axes, y, y - GAP)
        y -= GAP
        parts = step if isinstance(step, list) else [step]
        width = (WIDTH - 0.4 - 0.2 * (len(parts) - 1)) / len(parts)
        for i, (kind, text, note) in enumerate(parts):
            _box(axes, 0.2 + i * (width + 0.2), y, width, kind, text)
            if note:
                axes.text(WIDTH + 0.05, y - HEIGHT / 2, note, va="center", fontsize=9, color="#3c4149")
        y -= HEIGHT
    _arrow(axes, y, y - GAP)
    return figure


def _arrow(axes: Axes, top: float, bottom: float) -> None:
    axes.add_patch(
        FancyArrowPatch((WIDTH / 2, top), (WIDTH / 2, bottom), arrowstyle="-|>", mutation_scale=11, color="#8a8f98")
    )


def _box(axes: Axes, left: float, top: float, width: float, kind: str, text: str) -> None:
    color = {"step": PLAIN, "memory": MEMORY, "attention": ATTENTION}[kind]
    axes.add_patch(
        FancyBboxPatch(
            (left, top - HEIGHT), width, HEIGHT, boxstyle="round,pad=0,rounding_size=0.1", fc=color, ec="#c3c8cf"
        )
    )
    ink = "#20242a" if kind == "step" else "white"
    axes.text(left + width / 2, top - HEIGHT / 2, text, ha="center", va="center", color=ink, fontsize=9.5)


def main() -> None:
    """All pictures."""
    folder = HERE / "pictures"
    folder.mkdir(exist_ok=True)
    with rc_context(STYLE):
        for name, steps in BLOCKS.items():
            draw(steps).savefig(folder / f"{name}.svg", format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
