"""One model, many users, a memory each: what one user teaches it is never seen by another.

python examples/one_memory_per_user.py MODEL DIRECTORY      MODEL: a directory, a GGUF file or a hub name
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import PreTrainedModel

from nestling.continual.learn_documents import frozen_loss
from nestling.continual.learner.learner import Learner
from nestling.continual.learner.options import Level
from nestling.continual.store.store import MemoryStore, load_memory
from nestling.models.pretrained import load_pretrained

SAYS = {
    "ann": "My boat is called Petrel. She lies in Falmouth, and her engine is a Yanmar from 1998.\n" * 8,
    "ben": "The oven runs twenty degrees hot, so the rye bread bakes at 210 for fifty minutes.\n" * 8,
}


def teach(model: PreTrainedModel, store: MemoryStore, ids: torch.Tensor, lr: float) -> None:
    """Go on with a user's memory, or begin it; the model is left as it was found."""
    with store.lock():
        if store.exists():
            learner = Learner.restore(model, store.load())
        else:
            learner = Learner(model, {"all": Level(64, ("*.mlp.*",))}, lr=lr, context=128)
        with learner:
            learner.observe(ids)
            store.save(learner.memory())


def main(source: str, place: str, lr: float = 1e-4, says: dict[str, str] = SAYS) -> dict[tuple[str, str], float]:
    """Both users teach in turns; returns the loss of what each said under the memory of each."""
    model, tokenizer = load_pretrained(source)
    ids = {user: torch.tensor(tokenizer(text).input_ids) for user, text in says.items()}
    for part in range(4):  # the turns of several conversations interleave, as on a server
        for user, tokens in ids.items():
            teach(model, MemoryStore(Path(place) / user), tokens.chunk(4)[part], lr)
    losses = {}
    for user in says:
        with load_memory(Path(place) / user).applied(model):
            losses |= {(user, about): frozen_loss(model, tokens, 128) for about, tokens in ids.items()}
    for (user, about), loss in losses.items():
        print(f"{user}'s memory, {about}'s words: {loss:.3f} (without: {frozen_loss(model, ids[about], 128):.3f})")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("source", "place"):
        parser.add_argument(name)
    main(**vars(parser.parse_args()))
