"""Let a pre-trained model read a book, and keep what it learned as a file.

python examples/learn_a_book.py MODEL BOOK MEMORY      MODEL: a directory, a GGUF file or a hub name
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from nestling.continual.learn_documents import frozen_loss
from nestling.continual.learner.learner import Learner
from nestling.continual.learner.options import Level
from nestling.continual.store.records import DocumentRecord
from nestling.continual.store.store import MemoryStore, load_memory
from nestling.continual.store.texts import text_digest
from nestling.levels.assignment import stream_levels
from nestling.models.pretrained import load_pretrained


def main(
    source: str, book: str, place: str, lr: float = 1e-4, context: int = 512, piece: int = 4096
) -> dict[str, float]:
    """Learn from a book; returns its mean loss in nats before, while and after."""
    if MemoryStore(place).exists():
        raise SystemExit(f"{place} is there already; nestling learn goes on with a memory")
    model, tokenizer = load_pretrained(source)
    text = Path(book).read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text).input_ids)
    before = frozen_loss(model, ids, context)

    # A converted model knows its levels; of any other the upper and lower half of the layers are made two.
    layers = model.config.num_hidden_layers
    upper = tuple(f"*.{i}.mlp.*" for i in range(layers // 2, layers))
    levels = None if stream_levels(model) else {"fast": Level(256, upper), "slow": Level(1024, ("*.mlp.*",))}
    learner = Learner(model, levels, "adamw", lr=lr, context=context)
    document = DocumentRecord(book, text_digest(text), 0, False, 0.0, "")
    losses = []
    for part in ids.split(piece):
        seen = learner.observe(part, document=document)
        losses.append(seen.losses)
        print(f"{learner.counters.tokens:,} tokens, loss {float(seen.losses.nanmean()):.3f}", *seen.notes)
    learner.end_document()
    after = frozen_loss(model, ids, context)
    snapshot = MemoryStore(place).save(learner.memory(), f"read {book}")
    learner.detach()  # the model is as it was, bit for bit; the memory brings it back
    with load_memory(place).applied(model):
        again = frozen_loss(model, ids, context)
    print(f"{place}: {snapshot.bytes:,} bytes; loss before {before:.3f}, after {after:.3f}, from the file {again:.3f}")
    return {"before": before, "while": float(torch.cat(losses).nanmean()), "after": after, "again": again}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("source", "book", "place"):
        parser.add_argument(name)
    main(**vars(parser.parse_args()))
