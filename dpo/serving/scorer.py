"""Tokenised answers -> their log-probs under policy and reference, by the scorer that training uses.

Takes examples, gives one value per answer token. Knows no text. The models it runs are twins of the engines', so that
neither sees what the other sets on its model during a forward, and no stream waits for a score.
"""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo.batch import Batch, Example, collate
from dpo.cached import packs
from dpo.logps import score
from dpo.sharing import share_if_exact, twin

ROW_TOKENS = 4096  # of one forward; longer work is cut, and others come in between

Scores = dict[str, list[float]]
"""Log-prob of each token of one answer, nats, by name of the model."""


class Scorer:
    """Scores in a thread of its own, one forward at a time."""

    def __init__(self, models: Mapping[str, PreTrainedModel]) -> None:
        self.twins = {name: twin(model) for name, model in models.items()}
        for model in self.twins.values():
            share_if_exact(model)
        self.thread = ThreadPoolExecutor(1, "scorer")

    async def __call__(self, examples: Sequence[Example]) -> list[Scores]:
        """Scores of every answer of every example, in order."""
        loop = asyncio.get_running_loop()
        found: dict[int, list[Scores]] = {}
        costs = np.array([len(example.prompt) + sum(map(len, example.answers)) for example in examples])
        for rows in packs(costs, ROW_TOKENS):
            part = [examples[row] for row in rows]
            scores = iter(await loop.run_in_executor(self.thread, self._score, collate(part)))
            found |= {row: list(islice(scores, len(examples[row].answers))) for row in rows}
        return [answer for row in range(len(examples)) for answer in found[row]]

    @torch.no_grad()
    def _score(self, batch: Batch) -> list[Scores]:
        found: list[Scores] = [{} for _ in batch.lengths]
        for name, model in self.twins.items():
            values = score(model, batch.to(model.device)).logps.cpu().split(batch.lengths)
            for answer, part in zip(found, values, strict=True):
                answer[name] = part.tolist()
        return found
