"""Token ids of examples, laid out as one flat row in which every prompt stands once.

The row is ``prompt1 answer1a answer1b prompt2 answer2a answer2b ...``. Position ids restart where the prompt ended at
every answer ("branch"), and `RowLayout` records which tokens belong together, so that each branch attends to its prompt
and itself only. The last token of an answer is a target and never an input: it predicts nothing and nothing attends to
it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from math import nan
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data._utils.collate import default_collate_fn_map  # where torch's documentation has it

_T = TypeVar("_T")


def move_to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to a device, to CUDA through pinned memory so that the host does not wait for the copy."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Example:
    """One tokenized preference pair, or a prompt with any number of answers.

    Attributes:
        id: Where the example came from, ``subset/split:line``.
        prompt: Token ids that all answers share, at least one.
        answers: Token ids of each answer (the chosen one first), at least one per answer; all are scored.
        weight: Factor of the example's loss.
        margin: How much better the chosen answer is; None if the data do not say.
        turns: Human turns of the prompt; None if the data do not say.
    """

    id: str
    prompt: Sequence[int]
    answers: tuple[Sequence[int], ...]
    weight: float = 1.0
    margin: float | None = None
    turns: int | None = None


# A DataLoader over examples gives lists of them; torch would refuse them, as it knows no way to stack them.
default_collate_fn_map[Example] = lambda examples, **_: examples


@dataclass(frozen=True)
class PromptGroup:
    """A prompt and its answers in the flat row.

    Attributes:
        start: Index in the row of the prompt's first token.
        prompt_length: Tokens of the prompt.
        branch_lengths: Input tokens of every answer, which is all but the last token of each.
    """

    start: int
    prompt_length: int
    branch_lengths: tuple[int, ...]

    @property
    def trunk_slice(self) -> slice:
        """The prompt and its first branch, which are contiguous and plainly causal."""
        return slice(self.start, self.start + self.segment_lengths[0])

    @property
    def segment_lengths(self) -> list[int]:
        """Lengths of the trunk and of every further branch: each of these segments attends as a whole."""
        return [self.prompt_length + self.branch_lengths[0], *self.branch_lengths[1:]]

    def other_branch_slices(self) -> list[slice]:
        """Return where the branches after the first one lie in the row."""
        ends = accumulate(self.segment_lengths, initial=self.start)
        return [slice(start, end) for start, end in pairwise(ends)][1:]


@dataclass(frozen=True)
class RowLayout:
    """The structure of a flat row: which tokens attend to which.

    Attributes:
        groups: Prompts with their answers, in the order of the row.
        position_ids: Position of every token in its own sequence of prompt and answer.
        computed: What `compute_once` keeps.
    """

    groups: tuple[PromptGroup, ...]
    position_ids: Int[Tensor, " tokens"]
    computed: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def segment_lengths(self) -> list[int]:
        """Lengths of the segments of all groups, in the order of the row."""
        return [length for group in self.groups for length in group.segment_lengths]

    def compute_once(self, key: object, compute: Callable[[], _T]) -> _T:
        """Return `compute()`, called for the first request of a key only, so that all layers share its result."""
        if key not in self.computed:
            self.computed[key] = compute()
        result: _T = self.computed[key]
        return result

    def to(self, device: torch.device | str) -> "RowLayout":
        """Return the layout on another device, without the results of `compute_once`."""
        return RowLayout(self.groups, move_to_device(self.position_ids, device))


@dataclass(frozen=True)
class Batch:
    """One micro-batch: a flat row of tokens, and which of them are scored.

    Attributes:
        ids: Ids of the examples, in order.
        tokens: Token ids of the flat row.
        layout: Structure of the row.
        predictor_indices: For every scored token, the index in the row of the token that predicts it.
        targets: Ids of the scored tokens, answer after answer.
        lengths: Scored tokens of every answer; kept on the host.
        weights: Factor of the loss of every example.
        margins: How much better the chosen answer of every example is; NaN if the data do not say.
        turns: Human turns of the prompt of every example; None if the data do not say.
    """

    ids: tuple[str, ...]
    tokens: Int[Tensor, " tokens"]
    layout: RowLayout
    predictor_indices: Int[Tensor, " scored"]
    targets: Int[Tensor, " scored"]
    lengths: tuple[int, ...]
    weights: Float[Tensor, " examples"]
    margins: Float[Tensor, " examples"]
    turns: tuple[int | None, ...]

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on another device."""
        tensors = ("tokens", "predictor_indices", "targets", "weights", "margins")
        moved: dict[str, Any] = {name: move_to_device(getattr(self, name), device) for name in tensors}
        return replace(self, layout=self.layout.to(device), **moved)

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.ids)

    def answer_sequences(self) -> list[Int[Tensor, " length"]]:
        """Return every answer as a sequence of its own: its prompt and its tokens without the last one."""
        sequences = []
        for group in self.layout.groups:
            sequences.append(self.tokens[group.trunk_slice])
            prompt = self.tokens[group.start : group.start + group.prompt_length]
            sequences.extend(torch.cat([prompt, self.tokens[branch]]) for branch in group.other_branch_slices())
        return sequences


def collate(examples: Sequence[Example], fillers: Sequence[Example] = ()) -> Batch:
    """Lay examples out as one flat row.

    Args:
        examples: The examples of the batch.
        fillers: Examples behind them that are read and not scored. With them, devices that have fewer examples than
            others run equally many forward passes, also those that have none.

    Raises:
        ValueError: A prompt is empty, so that nothing predicts the first token, or an answer is, or there are none.
    """
    tokens: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    groups = []
    for example in (*examples, *fillers):
        if not len(example.prompt) or not example.answers or not all(map(len, example.answers)):
            raise ValueError(
                f"{example.id}: expected a prompt and answers of at least one token each, got an empty one."
            )
        start = len(tokens)
        prompt = len(example.prompt)
        tokens.extend(example.prompt)
        positions.extend(range(prompt))
        for answer in example.answers:
            predictors.append(start + prompt - 1)
            predictors.extend(range(len(tokens), len(tokens) + len(answer) - 1))
            tokens.extend(answer[:-1])
            positions.extend(range(prompt, prompt + len(answer) - 1))
        groups.append(PromptGroup(start, prompt, tuple(len(answer) - 1 for answer in example.answers)))
    answers = [answer for example in examples for answer in example.answers]
    targets = [token for answer in answers for token in answer]
    return Batch(
        ids=tuple(example.id for example in examples),
        tokens=torch.tensor(tokens),
        layout=RowLayout(tuple(groups), torch.tensor(positions)),
        predictor_indices=torch.tensor(predictors[: len(targets)], dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        lengths=tuple(map(len, answers)),
        weights=torch.tensor([example.weight for example in examples]),
        margins=torch.tensor([nan if example.margin is None else example.margin for example in examples]),
        turns=tuple(example.turns for example in examples),
    )
