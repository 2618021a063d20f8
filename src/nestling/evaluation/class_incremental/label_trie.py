"""Answers that are one of given labels: all their exact probabilities in one pass, the best by search, or one by greedy
descent."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from heapq import heappop, heappush
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
SCORED_POSITIONS = 512
"""Positions whose logits over the whole vocabulary are held at once: 100 MB at 49,152 words."""
SCORED_ON_GPU = 1024
"""Likewise on another device than the CPU, where small batches waste it."""
EXPANDED = 8
"""Nodes that a search runs at once: more of them in vain, in fewer passes."""


class LabelTrie:
    """The prefix tree of the labels' tokens. Node 0 is the root; a node's parent has a lower number than it.

    Args:
        sequences: tokens by class; none empty, none the beginning of another one (let all end with an end token).

    Raises:
        ValueError: no sequences, an empty one, or one that is the beginning of another one.

    Attributes:
        classes: in the order given.
        tokens, parents, depths: of every node; those of the root are -1, -1 and 0.
        children: node by token, of every node.
        leaves: the last node of every class, in the order of `classes`.
        below: the classes below every node.
        inner: the nodes with children, without the root.
        sees: `[inner, inner]`, which inner nodes stand on the way from the root to which, itself included.
    """

    def __init__(self, sequences: Mapping[int, Sequence[int]]) -> None:
        if not sequences:
            raise ValueError("a label trie needs at least one label")
        self.classes = tuple(sequences)
        self.tokens, self.parents, self.depths = [-1], [-1], [0]
        self.children: list[dict[int, int]] = [{}]
        self.below: list[list[int]] = [[]]
        self.leaves = [self._insert(label, list(tokens)) for label, tokens in sequences.items()]
        bad = [c for c, leaf in zip(self.classes, self.leaves, strict=True) if self.children[leaf] or leaf == 0]
        if bad or len(set(self.leaves)) < len(self.leaves):
            raise ValueError(f"a label is empty or begins another one (classes {bad}); end each with an end token")
        self.inner = [node for node in range(1, len(self.tokens)) if self.children[node]]
        self.sees = torch.eye(len(self.inner), dtype=torch.bool)
        place = {node: i for i, node in enumerate(self.inner)}
        for node, i in place.items():
            if (parent := self.parents[node]) != 0:
                self.sees[i] |= self.sees[place[parent]]

    def _insert(self, label: int, tokens: list[int]) -> int:
        node = 0
        self.below[0].append(label)
        for token in tokens:
            if token not in self.children[node]:
                self.children[node][token] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(node)
                self.depths.append(self.depths[node] + 1)
                self.children.append({})
                self.below.append([])
            node = self.children[node][token]
            self.below[node].append(label)
        return node


class LabelScorer:
    """Scores labels as continuations of prompts with a causal language model.

    `scores` appends to a prompt every inner node of the trie at once: each sees the prompt and its own ancestors and
    stands at the position it would have in its label, so that one pass gives the exact log-probability of every label.
    It needs a model that takes `position_ids` and a four-dimensional `attention_mask` (transformers' Llama family).
    `best` needs the same and runs the nodes alone that may lead to the best label. `greedy` needs neither; it feeds a
    token at a time with the model's cache.

    Args:
        model: `model(input_ids, attention_mask, position_ids, past_key_values, use_cache, logits_to_keep)`.
        pad: a token to fill with; its value is of no consequence.
        batch: prompts at a time, sorted by length.
    """

    def __init__(self, model: torch.nn.Module, pad: int = 0, batch: int = 16) -> None:
        self.model, self.pad, self.batch = model, pad, batch

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def scores(
        self,
        prompts: Sequence[Sequence[int]],
        tries: LabelTrie | Sequence[LabelTrie],
        prefix: Sequence[int] = (),
    ) -> list[Tensor]:
        """Log-probability in nats of every label after every prompt, summed over its tokens.

        Args:
            prompts: tokens, none empty.
            tries: one for all, or one for each.
            prefix: tokens before all prompts, run once (examples in context).

        Returns:
            For each prompt a float32 tensor in the order of its trie's `classes`.
        """
        each = [tries] * len(prompts) if isinstance(tries, LabelTrie) else list(tries)
        past = self._run_prefix(prefix)
        found: list[Tensor] = [torch.empty(0)] * len(prompts)
        widest = max((len(trie.inner) + 1 for trie in each), default=1)
        held = SCORED_POSITIONS if self.device.type == "cpu" else SCORED_ON_GPU
        for rows in _batches(prompts, max(1, min(self.batch, held // widest))):
            logits = self._tree_logits([prompts[i] for i in rows], [each[i] for i in rows], past, len(prefix))
            for i, row in zip(rows, logits, strict=True):
                found[i] = _path_sums(row, each[i])
        return found

    @torch.no_grad()
    def best(
        self,
        prompts: Sequence[Sequence[int]],
        tries: LabelTrie | Sequence[LabelTrie],
        prefix: Sequence[int] = (),
    ) -> list[int]:
        """The class with the highest log-probability after every prompt; arguments as those of `scores`.

        Exact, and cheaper than all scores: a label is at most as probable as its beginnings, so that nodes less
        probable than the best whole label need no pass (best-first search).
        """
        each = [tries] * len(prompts) if isinstance(tries, LabelTrie) else list(tries)
        past = self._run_prefix(prefix)
        answers = [-1] * len(prompts)
        for rows in _batches(prompts, self.batch):
            found = self._search([prompts[i] for i in rows], [each[i] for i in rows], past, len(prefix))
            for i, label in zip(rows, found, strict=True):
                answers[i] = label
        return answers

    @torch.no_grad()
    def greedy(self, prompts: Sequence[Sequence[int]], trie: LabelTrie, prefix: Sequence[int] = ()) -> list[int]:
        """The class reached from the root by the most probable child, until one class is left.

        Costs a pass over the prompt and a token for every step that parts classes; it may miss the best label.
        """
        past = self._run_prefix(prefix)
        answers = [-1] * len(prompts)
        for rows in _batches(prompts, self.batch):
            for i, label in zip(rows, self._descend([prompts[i] for i in rows], trie, past, len(prefix)), strict=True):
                answers[i] = label
        return answers

    def _descend(self, prompts: list[Sequence[int]], trie: LabelTrie, past: Any, before: int) -> list[int]:
        tokens, mask = pad_left(prompts, self.pad)
        mask = torch.cat((torch.ones(len(prompts), before, dtype=mask.dtype), mask), 1)
        cache = _repeated(past, len(prompts))
        nodes = [0] * len(prompts)
        while True:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            logits, cache = self._run(tokens, mask, positions, cache, 1)
            nodes = [_step(trie, node, row) for node, row in zip(nodes, logits[:, -1].cpu(), strict=True)]
            if all(len(trie.below[node]) == 1 for node in nodes):
                return [trie.below[node][0] for node in nodes]
            tokens = torch.tensor([[trie.tokens[node]] for node in nodes])
            mask = torch.cat((mask, torch.ones(len(prompts), 1, dtype=mask.dtype)), 1)

    def _search(self, prompts: list[Sequence[int]], tries: list[LabelTrie], past: Any, before: int) -> list[int]:
        tokens, mask = pad_left(prompts, self.pad)
        mask = torch.cat((torch.ones(len(prompts), before, dtype=mask.dtype), mask), 1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, before:]
        logits, cache = self._run(tokens, mask, positions, _repeated(past, len(prompts)), 1)
        searches = [_Search(trie, before + len(prompt)) for trie, prompt in zip(tries, prompts, strict=True)]
        asked = [search.next(1) for search in searches]
        run = 0
        while True:
            _expand(searches, asked, logits.float())
            asked = [search.next(EXPANDED) for search in searches]
            width = max(map(len, asked))
            if width == 0:
                return [search.answer for search in searches]
            sees = torch.eye(width, run + width, dtype=torch.bool).roll(run, 1).repeat(len(searches), 1, 1)
            sees = torch.cat((mask[:, None].bool().expand(-1, width, -1), sees), -1)
            tokens, positions = torch.full((2, len(searches), width), self.pad)
            for row, (search, nodes) in enumerate(zip(searches, asked, strict=True)):
                for i, node in enumerate(nodes):
                    tokens[row, i], positions[row, i] = search.trie.tokens[node], search.place(node)
                    sees[row, i, mask.shape[1] + torch.tensor(search.run(node, run + i))] = True
            logits, cache = self._run(tokens, self._bias(sees), positions, cache, width)
            run += width

    def _run(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Any, keep: int) -> tuple[Tensor, Any]:
        """Logits `[rows, keep, vocabulary]` and the cache with these tokens in it."""
        out = self.model(
            input_ids=tokens.to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=positions.to(self.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        return out.logits, out.past_key_values

    def _bias(self, sees: Tensor) -> Tensor:
        """Of attention, `[rows, 1, queries, keys]`, from which query sees which key."""
        dtype = next(self.model.parameters()).dtype
        return torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)[:, None]

    def _tree_logits(self, prompts: list[Sequence[int]], tries: list[LabelTrie], past: Any, before: int) -> Tensor:
        """`[rows, 1 + widest, vocabulary]`: after the prompt, then after every inner node of the row's trie."""
        head, real = pad_left(prompts, self.pad)
        width, widest = head.shape[1], max(len(trie.inner) for trie in tries)
        tail = torch.full((len(prompts), widest), self.pad)
        sees = torch.eye(width + widest, dtype=torch.bool).repeat(len(prompts), 1, 1)
        sees[:, :width, :width] |= real[:, None, :].bool() & torch.ones(width, width).tril().bool()
        positions = torch.zeros(len(prompts), width + widest, dtype=torch.long)
        positions[:, :width] = (real.cumsum(-1) - 1).clamp(min=0)
        for row, trie in enumerate(tries):
            count = len(trie.inner)
            end = width + count
            tail[row, :count] = torch.tensor([trie.tokens[node] for node in trie.inner], dtype=torch.long)
            depths = torch.tensor([trie.depths[node] for node in trie.inner], dtype=torch.long)
            positions[row, width:end] = len(prompts[row]) - 1 + depths
            sees[row, width:end, :width] = real[row].bool()
            sees[row, width:end, width:end] = trie.sees
        sees = torch.cat((torch.ones(len(prompts), width + widest, before, dtype=torch.bool), sees), -1)
        tokens, cache = torch.cat((head, tail), 1), _repeated(past, len(prompts))
        return self._run(tokens, self._bias(sees), positions + before, cache, widest + 1)[0].float()

    @torch.no_grad()
    def _run_prefix(self, prefix: Sequence[int]) -> Any:
        if not prefix:
            return None
        ids = torch.tensor([list(prefix)], device=self.device)
        return self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


class _Search:
    """Of one prompt's best label: nodes not run yet, the most probable first, and what each that was run attends to."""

    def __init__(self, trie: LabelTrie, length: int) -> None:
        self.trie, self.length = trie, length
        self.open: list[tuple[float, int]] = [(0.0, 0)]
        self.value: dict[int, float] = {}
        self.seen: dict[int, list[int]] = {0: []}

    def next(self, most: int) -> list[int]:
        """Inner nodes to run, none once a whole label is the most probable of all that is open."""
        found: list[int] = []
        while self.open and len(found) < most and self.trie.children[self.open[0][1]]:
            negative, node = heappop(self.open)
            self.value[node] = -negative
            found.append(node)
        return found

    def run(self, node: int, slot: int) -> list[int]:
        """A node is run in this slot after the prompt: the slots that it sees."""
        self.seen[node] = [*self.seen[self.trie.parents[node]], slot]
        return self.seen[node]

    def place(self, node: int) -> int:
        """Position of a node's token."""
        return self.length - 1 + self.trie.depths[node]

    @property
    def answer(self) -> int:
        """The class of the best label, once `next` is empty."""
        return self.trie.below[self.open[0][1]][0]


def _expand(searches: Sequence[_Search], asked: Sequence[Sequence[int]], logits: Tensor) -> None:
    """Open the children of the nodes that were run, `logits` after them."""
    pairs = [(row, i, node) for row, nodes in enumerate(asked) for i, node in enumerate(nodes)]
    ends = [(row, i, node, token) for row, i, node in pairs for token in searches[row].trie.children[node]]
    rows, places, _, tokens = (torch.tensor(x, device=logits.device) for x in zip(*ends, strict=True))
    steps = (logits[rows, places, tokens] - logits.logsumexp(-1)[rows, places]).tolist()
    for (row, _, node, token), step in zip(ends, steps, strict=True):
        search = searches[row]
        heappush(search.open, (-(search.value[node] + step), search.trie.children[node][token]))


def answer_loss(
    model: torch.nn.Module, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad: int = 0
) -> Tensor:
    """Mean over the rows of an answer's negative log-probability in nats, summed over its tokens; differentiable.

    The sum, not the mean over tokens: it is the quantity that answers are chosen by.
    """
    longest, device = max(map(len, answers)), next(model.parameters()).device
    tokens, mask = pad_left([[*p, *a] for p, a in zip(prompts, answers, strict=True)], pad)
    targets = torch.full((len(prompts), longest), IGNORE)
    for row, answer in enumerate(answers):
        targets[row, longest - len(answer) :] = torch.tensor(list(answer))
    out = model(
        input_ids=tokens.to(device),
        attention_mask=mask.to(device),
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0).to(device),
        use_cache=False,
        logits_to_keep=longest + 1,
    )
    logits, wanted = out.logits[:, :-1].flatten(0, 1), targets.flatten().to(device)
    return torch.nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="sum") / len(prompts)


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Tokens `[rows, longest]` that end together, and the mask of what is not filling, both int64."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return tokens, mask


def _step(trie: LabelTrie, node: int, logits: Tensor) -> int:
    """The most probable child; a node with one class below it stays where it is."""
    if len(trie.below[node]) == 1:
        return node
    tokens = list(trie.children[node])
    return trie.children[node][tokens[int(logits[tokens].argmax())]]


def _path_sums(logits: Tensor, trie: LabelTrie) -> Tensor:
    """Log-probabilities of the labels from the logits after the prompt and after each inner node."""
    rows = {node: i for i, node in enumerate((0, *trie.inner))}
    above = torch.tensor([rows[parent] for parent in trie.parents[1:]], device=logits.device)
    tokens = torch.tensor(trie.tokens[1:], device=logits.device)
    steps = (logits[above, tokens] - logits.logsumexp(-1)[above]).tolist()
    total = [0.0]
    for parent, step in zip(trie.parents[1:], steps, strict=True):  # a parent comes before its children
        total.append(total[parent] + step)
    return torch.tensor(total)[trie.leaves]


def _batches(prompts: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    return [order[i : i + size] for i in range(0, len(order), size)]


def _repeated(past: Any, rows: int) -> Any:
    """A copy of a cache of one row for several."""
    if past is None:
        return None
    cache = copy.deepcopy(past)
    cache.batch_repeat_interleave(rows)
    return cache
