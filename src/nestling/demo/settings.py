"""What the demo trains and reads, and the files it writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MODELS = ("transformer", "hope")
MINUTES = 8.0


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo. The defaults fit into `minutes` on two slow cores.

    Attributes:
        out: directory of all output.
        minutes: time the whole demo may take; the token budget shrinks until it fits.
        tokens: budget of each model at most. Bytes are the tokens, so this is also bytes of text.
        size: of both presets.
        sequence_length: tokens a training step reads; also how often "state reset" resets.
        batch_size: rows of a step. Few, since on so few tokens both models learn more from many small steps.
        carry_tokens: a row's state lives so long in training; None carries it to the end of the row's stream (a
            quarter of the corpus, longer than what the demo reads). Memories trained for 4,096 bytes helped for about
            that long and did harm after it.
        validate: tokens of the held-out text.
        read: tokens of the unseen text that are read before the state is saved.
        continuation: tokens after them that the new process reads.
        sample: tokens that each trained model writes.
        bins: points of every loss curve.
        seed: of weights and data order.
    """

    out: Path
    minutes: float = MINUTES
    tokens: int = 600_000
    size: str = "tiny"
    sequence_length: int = 256
    batch_size: int = 4
    carry_tokens: int | None = None
    validate: int = 16_384
    read: int = 24_576
    continuation: int = 8_192
    sample: int = 160
    bins: int = 24
    seed: int = 0

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.sequence_length * self.batch_size

    @property
    def state_file(self) -> Path:
        """Where the state of the unseen text goes."""
        return self.out / "state.safetensors"

    @property
    def tokens_file(self) -> Path:
        """The token ids handed to the new process."""
        return self.out / "continuation.json"

    @property
    def report_file(self) -> Path:
        """The page."""
        return self.out / "report.html"

    def model_dir(self, name: str) -> Path:
        """Where a model is trained and saved."""
        return self.out / name
