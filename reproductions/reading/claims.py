"""What this answers."""

from __future__ import annotations

from collections.abc import Sequence

from reproductions.harness.claims import Claim
from reproductions.harness.rows import Row

OPTIONS = "--model PATH --texts FILE ... --validation FILE FILE"


def _sequence(rows: Sequence[Row], method: str) -> Row:
    """On whole texts."""
    return next(r for r in rows if (r["part"], r["method"], r["sizes"]["tokens"]) == ("sequence", method, None))


def _lost(rows: Sequence[Row], method: str) -> float:
    held = _sequence(rows, method)["held"]
    return float(held[1][0] - held[0][0])


def _learns(rows: Sequence[Row]) -> str:
    frozen = _sequence(rows, "frozen")["second_halves"]
    own = _sequence(rows, "one_level")["second_halves"]
    return (
        f"135M parameters, nats a token while reading, one level against frozen: a book {own[0]:.3f}, {frozen[0]:.3f}; "
        f"an unseen language {own[1]:.3f}, {frozen[1]:.3f}"
    )


def _levels(rows: Sequence[Row]) -> str:
    names = {"one": "one_level", "two": "cms_2", "three": "cms_3", "four": "cms_4"}
    lost = ", ".join(f"{name} {_lost(rows, method):.3f}" for name, method in names.items())
    learned = ", ".join(f"{_sequence(rows, method)['held'][1][1]:.3f}" for method in names.values())
    return f"nats lost of a first text by levels: {lost}; but of the second text held out {learned}"


def _adapters(rows: Sequence[Row]) -> str:
    shown = []
    for name, method in {"LoRA": "lora", "full": "full"}.items():
        learned = _sequence(rows, "frozen")["held"][0][0] - _sequence(rows, method)["held"][0][0]
        shown.append(f"{name} {_lost(rows, method):.3f} of {learned:.3f} nats")
    return "of what a first text taught, a second text takes: " + ", ".join(shown)


CLAIMS = (
    Claim(
        "NL section 7.3",
        "a pre-trained transformer's MLPs as levels go on learning from what they read",
        "",
        "confirmed",
        _learns,
        OPTIONS,
    ),
    Claim(
        "NL section 9.1",
        "several levels forget less of a first text and learn the second as well",
        "",
        "in part",
        _levels,
        OPTIONS,
    ),
    Claim(
        "arXiv:2510.15103 (Sparse Memory Finetuning)",
        "full fine-tuning and LoRA forget most of what was known",
        "89% and 71% on NaturalQuestions",
        "in part",
        _adapters,
        OPTIONS,
    ),
)
