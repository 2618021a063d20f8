"""The new process of the demo: it has the model and the state file, and has not read the text.

`python -m nestling.demo.recall MODEL STATE TOKENS` prints a JSON object with the losses of the continuation, token by
token: with the state, with only the last few hundred tokens read again, and with nothing.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from nestling import NestlingForCausalLM
from nestling.evaluation.language import token_losses
from nestling.models.cache import ModelState


def recall(model_dir: Path, state_file: Path, tokens_file: Path) -> dict[str, object]:
    """Read the continuation three times.

    Args:
        model_dir: a saved model.
        state_file: a state that this model saved; its last token is the one before `continuation[0]`.
        tokens_file: JSON with `recent` (the tokens just before the continuation) and `continuation`.

    Returns:
        `process` id, `position` (tokens the state has read), `bytes` of the state, and per-token losses in nats:
        `state`, `recent` (only the recent tokens read again) and `nothing`.
    """
    model = NestlingForCausalLM.from_pretrained(model_dir)
    assert isinstance(model, NestlingForCausalLM)
    loaded = ModelState.load(state_file, model)
    tokens = json.loads(tokens_file.read_text(encoding="utf-8"))
    recent, continuation = (torch.tensor(tokens[name]) for name in ("recent", "continuation"))
    # `token_losses` leaves the last token unread, so the state is the one before continuation[0].
    _, short = token_losses(model, torch.cat([recent, continuation[:1]]))
    starts = {"state": loaded, "recent": short, "nothing": None}
    losses = {name: token_losses(model, continuation, state=state)[0].tolist() for name, state in starts.items()}
    return {"process": os.getpid(), "position": loaded.get_seq_length(), "bytes": loaded.nbytes, **losses}


if __name__ == "__main__":
    print(json.dumps(recall(*(Path(argument) for argument in sys.argv[1:4]))))
