"""Steps from a user's own data loaders, whose batches are lists of examples."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch

from dpo.data.sampler import Step
from dpo.models.batch import Example, collate

_EXPECTED = "expected batches of dpo.Example from a DataLoader, or a data module of dpo (HHRLHF, PreferencePairs)"


def step_from_loader(batch: Any, trainer: L.Trainer, answer_sides: Sequence[str]) -> Any:
    """Make a step of a list of examples; a batch of the data modules is a step already and stays as it is.

    Args:
        batch: What the loader has given.
        trainer: Its devices and accumulated batches share an optimizer step.
        answer_sides: The answers that every example must have.

    Raises:
        TypeError: The batch is of another kind.
        ValueError: An example has another number of answers.
    """
    if isinstance(batch, list | tuple) and batch and all(isinstance(each, Example) for each in batch):
        for example in batch:
            _require_answers(example, answer_sides)
        return _step_of_examples(batch, trainer)
    if not hasattr(batch, "micro_batches") and not hasattr(batch, "prompts"):
        raise TypeError(f"{_EXPECTED}, got batches of {type(batch).__name__}.")
    return batch


def _step_of_examples(examples: Sequence[Example], trainer: L.Trainer) -> Step:
    """Return a step with a single micro-batch, whose optimizer step spans all devices and accumulated batches."""
    scored = sum(len(answer) for example in examples for answer in example.answers)
    counts = torch.tensor([len(examples), scored], device=trainer.strategy.root_device)
    num_examples, num_tokens = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
    batches = trainer.accumulate_grad_batches if trainer.training else 1
    return Step((collate(examples),), num_examples * batches, num_tokens * batches)


def _require_answers(example: Example, answer_sides: Sequence[str]) -> None:
    if len(example.answers) != len(answer_sides):
        raise ValueError(
            f"{example.id}: expected one answer for each of {', '.join(answer_sides)}, got {len(example.answers)} "
            "answers."
        )


def check_same_denominator(denominator: int, first: int) -> None:
    """Check that the batches of one optimizer step divide by the same number, without which it is no mean.

    Raises:
        ValueError: They do not: a user's own loader gives batches of different sizes.
    """
    if denominator != first:
        raise ValueError(
            "accumulate_grad_batches: expected batches of one size (for SFT: with as many answer tokens) within an "
            f"optimizer step, got {first} and {denominator}, so that the step would be no mean over its examples. Use "
            "drop_last=True and accumulate_grad_batches=1, or a data module of dpo, which counts the whole step."
        )
