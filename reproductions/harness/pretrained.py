"""The pre-trained model that an experiment is given."""

from __future__ import annotations

import argparse

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestling.models.pretrained import load_pretrained
from reproductions.harness.machine import use_machine


def given_model(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """That of --model with its tokenizer, on --device, in a process set up by `use_machine`.

    Raises:
        SystemExit: no model was named.
    """
    if args.model is None:
        raise SystemExit("--model PATH is needed (or --quick)")
    use_machine(args)
    model, tokenizer = load_pretrained(args.model)
    model.to(args.device)
    return model, tokenizer
