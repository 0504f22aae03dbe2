"""Tokenised examples -> one flat row of tokens in which every prompt stands once.

Takes token ids, gives a `Batch`. Knows nothing of text, models or losses.

The row of a batch is ``p1 c1 r1 p2 c2 r2 ...``: each prompt, then its answers, branch after branch. Position ids
restart for every branch where the prompt ended, and `Layout` says which tokens belong together, so that the attention
can let each branch see its prompt and itself only. The last token of an answer predicts nothing and nobody attends to
it: it is a target, never an input.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import nan
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

_T = TypeVar("_T")


def move_to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device; to CUDA through pinned memory, so that nobody waits for the copy."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Example:
    """One tokenised preference pair, or one prompt with any number of answers.

    Attributes:
        id: Where it came from, ``subset/split:line``.
        prompt: Token ids that all answers share; at least one.
        answers: Token ids of each answer (chosen first), all of them scored; at least one each.
        weight: By what its loss is multiplied.
        margin: By how much the chosen answer is better; None where the data do not say.
    """

    id: str
    prompt: Sequence[int]
    answers: tuple[Sequence[int], ...]
    weight: float = 1.0
    margin: float | None = None


@dataclass(frozen=True)
class PromptGroup:
    """A prompt and its branches in the flat row: lengths in tokens, ``start`` the index of the first."""

    start: int
    prompt_length: int
    branch_lengths: tuple[int, ...]

    @property
    def trunk_slice(self) -> slice:
        """The prompt and the first branch: contiguous, causal."""
        return slice(self.start, self.start + self.prompt_length + self.branch_lengths[0])

    @property
    def segment_lengths(self) -> list[int]:
        """Lengths of the trunk and of every further branch: the pieces of the row that attend as one."""
        return [self.prompt_length + self.branch_lengths[0], *self.branch_lengths[1:]]

    def other_branch_slices(self) -> list[slice]:
        """Every further branch."""
        starts = [self.trunk_slice.stop]
        for length in self.branch_lengths[1:]:
            starts.append(starts[-1] + length)
        return [slice(a, b) for a, b in pairwise(starts)]


@dataclass(frozen=True)
class RowLayout:
    """Which tokens of a flat row attend to which; `positions` are the position ids of the tokens."""

    groups: tuple[PromptGroup, ...]
    position_ids: Int[Tensor, " tokens"]
    computed: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def segment_lengths(self) -> list[int]:
        """Lengths of the pieces of the row that attend as one, all groups after each other."""
        return [length for group in self.groups for length in group.segment_lengths]

    def compute_once(self, key: object, compute: Callable[[], _T]) -> _T:
        """What `make` gives, made when it is first asked for under this key: all layers share it."""
        if key not in self.computed:
            self.computed[key] = compute()
        made: _T = self.computed[key]
        return made

    def to(self, device: torch.device | str) -> "RowLayout":
        """The same on another device; what was made once is made again there."""
        return RowLayout(self.groups, move_to_device(self.position_ids, device))


@dataclass(frozen=True)
class Batch:
    """One micro-batch: a flat row of tokens and what is to be scored in it.

    Attributes:
        ids: Of the examples, in order.
        tokens: The flat row.
        layout: Its structure.
        predictors: For every scored token, the index in the row of the token that predicts it.
        targets: The scored tokens, answer after answer.
        lengths: Scored tokens of every answer, on the host.
        weights: By what the loss of every example is multiplied.
        margins: By how much the chosen answer of every example is better; NaN where the data do not say.
    """

    ids: tuple[str, ...]
    tokens: Int[Tensor, " tokens"]
    layout: RowLayout
    predictor_indices: Int[Tensor, " scored"]
    targets: Int[Tensor, " scored"]
    lengths: tuple[int, ...]
    weights: Float[Tensor, " examples"]
    margins: Float[Tensor, " examples"]

    def to(self, device: torch.device | str) -> "Batch":
        """The same on another device."""
        tensors = ("tokens", "predictor_indices", "targets", "weights", "margins")
        moved: dict[str, Any] = {name: move_to_device(getattr(self, name), device) for name in tensors}
        return replace(self, layout=self.layout.to(device), **moved)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.ids)

    def answer_sequences(self) -> list[Int[Tensor, " length"]]:
        """Each answer behind its prompt as token ids of its own (without its last token, which predicts nothing)."""
        rows = []
        for group in self.layout.groups:
            rows.append(self.tokens[group.trunk_slice])
            prompt = self.tokens[group.start : group.start + group.prompt_length]
            rows.extend(torch.cat([prompt, self.tokens[branch]]) for branch in group.other_branch_slices())
        return rows


def collate(examples: Sequence[Example]) -> Batch:
    """Lay examples out as one flat row.

    Raises:
        ValueError: A prompt or an answer is empty: there would be nothing to predict it from, or nothing to score.
    """
    tokens: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    groups = []
    for example in examples:
        if not len(example.prompt) or not example.answers or not all(map(len, example.answers)):
            raise ValueError(
                f"{example.id}: expected a prompt and answers of at least one token each, got an empty one."
            )
        start, prompt = len(tokens), len(example.prompt)
        tokens.extend(example.prompt)
        positions.extend(range(prompt))
        for answer in example.answers:
            predictors.append(start + prompt - 1)
            predictors.extend(range(len(tokens), len(tokens) + len(answer) - 1))
            tokens.extend(answer[:-1])
            positions.extend(range(prompt, prompt + len(answer) - 1))
        groups.append(PromptGroup(start, prompt, tuple(len(answer) - 1 for answer in example.answers)))
    answers = [answer for example in examples for answer in example.answers]
    return Batch(
        ids=tuple(example.id for example in examples),
        tokens=torch.tensor(tokens),
        layout=RowLayout(tuple(groups), torch.tensor(positions)),
        predictor_indices=torch.tensor(predictors),
        targets=torch.tensor([token for answer in answers for token in answer]),
        lengths=tuple(map(len, answers)),
        weights=torch.tensor([example.weight for example in examples]),
        margins=torch.tensor([nan if example.margin is None else example.margin for example in examples]),
    )
