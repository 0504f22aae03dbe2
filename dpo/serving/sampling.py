"""Logits -> the next token of every request in a batch, each drawn in its own way.

Takes what `transformers` hands to its logits processors and gives scores whose argmax is the token. Knows no model.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList

GREEDY_BELOW = 1e-3  # dividing by less than this overflows, and a draw would be the most probable token anyway


class Draw:
    """How one request draws its tokens, and what it remembers of them.

    Adding Gumbel noise to log-probs and taking the largest is a draw from them. The noise depends on seed and position
    alone, so the same request gives the same answer whoever else is in the batch.

    Attributes:
        logprobs: Of every drawn token, if asked for: its true log-prob in nats, before temperature and top-p, and the
            most probable tokens with theirs.
    """

    def __init__(self, temperature: float, top_p: float, seed: int, top_logprobs: int | None) -> None:
        self.temperature, self.top_p, self.seed, self.top_logprobs = temperature, top_p, seed, top_logprobs
        self.generator = torch.Generator()
        self.logprobs: list[tuple[float, list[tuple[int, float]]]] = []

    @property
    def plain(self) -> bool:
        """The logits are their own scores, and nothing is remembered."""
        return self.temperature < GREEDY_BELOW and self.top_logprobs is None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Draw":
        return self  # a request that had to leave the cache comes back with the same draw

    def __call__(self, logits: Float[Tensor, " vocab"], position: int) -> Float[Tensor, " vocab"]:
        """Scores whose argmax is the token at `position`."""
        scores = logits if self.temperature < GREEDY_BELOW else self._perturbed(logits, position)
        if self.top_logprobs is not None:
            logps = logits.log_softmax(-1)
            top, tokens = logps.topk(self.top_logprobs)
            alternatives = list(zip(tokens.tolist(), top.tolist(), strict=True))
            self.logprobs.append((logps[scores.argmax()].item(), alternatives))
        return scores

    def _perturbed(self, logits: Tensor, position: int) -> Tensor:
        logps = (logits / self.temperature).log_softmax(-1)
        if self.top_p < 1:
            probabilities, order = logps.exp().sort(descending=True)
            beyond = probabilities.cumsum(-1) - probabilities >= self.top_p
            logps[order[1:][beyond[1:]]] = -torch.inf  # the most probable token always stays
        self.generator.manual_seed((self.seed * 1_000_003 + position) % 2**63)
        noise = torch.empty(logps.shape).exponential_(generator=self.generator)
        return logps - noise.log_().to(logps.device)


class Sampler(ContinuousBatchingLogitsProcessorList):
    """Calls the `Draw` of every request; those without one are greedy."""

    def __init__(self) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self.rows: list[tuple[Draw, int]] = []

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Every request brings a `Draw`."""

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: Tensor) -> Tensor:
        """Note whose logits the rows will be."""
        states = [request.state for request in requests_in_batch if request.has_new_token]
        self.rows = [
            (state.logit_processor_kwargs["draw"], len(state.initial_tokens) + len(state.generated_tokens))
            for state in states
        ]
        self.do_processing = not all(draw.plain for draw, _ in self.rows)
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        """One row of scores for every request."""
        for row, (draw, position) in enumerate(self.rows):
            if not draw.plain:
                scores[row] = draw(scores[row], position)
        return scores
