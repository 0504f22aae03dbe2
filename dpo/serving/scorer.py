"""Tokenised answers -> their log-probs under policy and reference, by the scorer that training uses.

Takes examples, gives one value per answer token. Knows no text. The models it runs are twins of the engines': other
objects with configurations of their own around the very same weights, so that neither sees what the other sets on its
model during a forward, and no stream waits for a score.
"""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo.batch import Batch, Example, collate
from dpo.logps import score
from dpo.sharing import share_if_exact

ROW_TOKENS = 4096  # of one forward; longer work is cut, and others come in between

Scores = dict[str, list[float]]
"""Log-prob of each token of one answer, nats, by name of the model."""


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Another object with the same tensors; it attends over shared prompts where that is exact."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    double = deepcopy(model, tensors)
    share_if_exact(double)
    return double


class Scorer:
    """Scores in a thread of its own, one forward at a time."""

    def __init__(self, models: Mapping[str, PreTrainedModel]) -> None:
        self.twins = {name: twin(model) for name, model in models.items()}
        self.thread = ThreadPoolExecutor(1, "scorer")

    async def __call__(self, examples: Sequence[Example]) -> list[Scores]:
        """Scores of every answer of every example, in order."""
        loop = asyncio.get_running_loop()
        parts = [await loop.run_in_executor(self.thread, self._score, collate(part)) for part in _cut(examples)]
        return [answer for part in parts for answer in part]

    @torch.no_grad()
    def _score(self, batch: Batch) -> list[Scores]:
        values: dict[str, Sequence[Tensor]] = {
            name: score(model, batch.to(model.device)).logps.cpu().split(batch.lengths)
            for name, model in self.twins.items()
        }
        return [{name: parts[i].tolist() for name, parts in values.items()} for i in range(len(batch.lengths))]


def _cut(examples: Sequence[Example]) -> list[list[Example]]:
    """Examples in parts of at most `ROW_TOKENS` tokens, at least one each."""
    parts: list[list[Example]] = []
    room = 0
    for example in examples:
        tokens = len(example.prompt) + sum(map(len, example.answers))
        if not parts or tokens > room:
            parts.append([])
            room = ROW_TOKENS
        parts[-1].append(example)
        room -= tokens
    return parts
