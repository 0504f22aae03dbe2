"""Which pairs a device sees in which step: a pure function of seed, epoch, rank and step.

Takes the cost of every pair in tokens; gives, step after step, the micro-batches of one device. Knows nothing of
text, models or losses. An optimizer step is always the same `batch_size` pairs, however it is cut: into accumulation
windows, over devices, or into micro-batches of at most `max_tokens`.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler

from dpo.models.batch import Batch, Example, collate

# Of one optimizer step: share -> micro-batch -> row; one share for every device and accumulated batch.
StepShares = list[list[list[int]]]


@runtime_checkable
class ExampleDataset(Protocol):
    """A map-style data set of examples with their lengths in tokens."""

    @property
    def token_counts(self) -> Sequence[int]:
        """Tokens of every example (prompt and answers)."""

    @property
    def answer_token_counts(self) -> Sequence[int]:
        """Tokens of the answers of every example."""

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: int) -> Example:
        """One example."""


@dataclass(frozen=True)
class Step:
    """What one device handles in one Lightning batch.

    Attributes:
        micro_batches: One forward and backward pass each.
        pairs: Examples of the whole optimizer step, over all devices and accumulated batches.
        scored: Their scored tokens.
    """

    micro_batches: tuple[Batch, ...]
    num_examples: int
    num_scored_tokens: int

    def to(self, device: torch.device | str, **_: object) -> "Step":
        """The same on another device."""
        return replace(self, micro_batches=tuple(batch.to(device) for batch in self.micro_batches))


@dataclass(frozen=True)
class EpochPlan:
    """How an epoch is cut into steps.

    Attributes:
        batch_size: Pairs per optimizer step, over all devices.
        max_tokens: Bound on the tokens of one micro-batch; a single pair may exceed it. None: no bound.
        shuffle: Draw a new order every epoch; otherwise the order of the data set.
        seed: Of the order.
        rank: Of this device.
        world_size: Number of devices.
        accumulate: Lightning batches per optimizer step.
        keep_rest: Keep a last step with fewer pairs than devices, where some have nothing to do (evaluation); training
            leaves it out.
    """

    batch_size: int
    max_tokens: int | None = None
    shuffle: bool = False
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    accumulate_batches: int = 1
    keep_partial_step: bool = False

    def epoch_order(self, row_count: int, epoch: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """The order of the rows in an epoch."""
        return (
            np.random.default_rng((self.seed, epoch)).permutation(row_count) if self.shuffle else np.arange(row_count)
        )

    def split_step(self, rows: Sequence[int], token_counts: Sequence[int]) -> StepShares:
        """Cut one optimizer step into `accumulate * world_size` shares of micro-batches.

        Longest first, each to the share with the least work among those with the fewest pairs; then first fit into
        micro-batches.
        """
        shares: list[list[int]] = [[] for _ in range(self.accumulate_batches * self.world_size)]
        work = [0] * len(shares)
        for row in sorted(rows, key=lambda row: (-token_counts[row], row)):
            least = min(range(len(shares)), key=lambda i: (len(shares[i]), work[i]))
            shares[least].append(row)
            work[least] += token_counts[row]
        return [self._pack(share, token_counts) for share in shares]

    def _pack(self, rows: list[int], costs: Sequence[int]) -> list[list[int]]:
        """First fit, longest first, into micro-batches of at most `max_tokens`."""
        bound = self.max_tokens or sum(costs[row] for row in rows)
        packs: list[list[int]] = []
        room: list[int] = []
        for row in rows:
            fits = next((i for i, left in enumerate(room) if costs[row] <= left), len(packs))
            if fits == len(packs):
                packs.append([])
                room.append(bound)
            packs[fits].append(row)
            room[fits] -= costs[row]
        return packs


class StepSampler(Sampler[tuple[list[list[int]], list[int]]]):
    """For every Lightning batch of an epoch: the micro-batches of one device, and all rows of the optimizer step."""

    def __init__(self, token_counts: Sequence[int], plan: EpochPlan) -> None:
        """Plan epochs over rows with these costs."""
        self.token_counts, self.plan = token_counts, plan
        self.epoch = self.start_batch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Lightning batches per epoch."""
        full, rest = divmod(len(self.token_counts), self.plan.batch_size)
        parts = self.plan.world_size * self.plan.accumulate_batches
        return (full + (rest >= (1 if self.plan.keep_partial_step else parts))) * self.plan.accumulate_batches

    def __iter__(self) -> Iterator[tuple[list[list[int]], list[int]]]:
        """From `start` (where a resumed epoch goes on) to the end of the epoch."""
        order, plan = self.plan.epoch_order(len(self.token_counts), self.epoch), self.plan
        first, self.start_batch = self.start_batch, 0
        for batch in range(first, len(self)):
            step, window = divmod(batch, plan.accumulate_batches)
            rows = order[step * plan.batch_size : (step + 1) * plan.batch_size].tolist()
            yield plan.split_step(rows, self.token_counts)[window * plan.world_size + plan.rank], rows


class _Steps(torch.utils.data.Dataset[Step]):
    def __init__(self, pairs: ExampleDataset) -> None:
        self.pairs = pairs

    def __getitem__(self, item: tuple[list[list[int]], list[int]]) -> Step:
        micro_batches, step = item
        batches = tuple(collate([self.pairs[row] for row in rows]) for rows in micro_batches)
        return Step(batches, len(step), sum(self.pairs.answer_token_counts[row] for row in step))


class StepLoader:
    """Steps of one device. Its state is its position in the epoch, so a resumed run goes on with the next step.

    No `DataLoader` itself: of those Lightning makes new ones, with samplers of its own.

    Attributes:
        waited: Seconds that whoever iterates has waited for steps.
    """

    def __init__(self, pairs: ExampleDataset, plan: EpochPlan, num_workers: int = 0) -> None:
        """Load pairs according to a plan; `num_workers` processes collate ahead.

        Raises:
            ValueError: The plan gives some device nothing to do.
        """
        if plan.batch_size < plan.world_size * plan.accumulate_batches:
            raise ValueError(
                "expected a batch_size of at least devices * accumulate_grad_batches = "
                f"{plan.world_size} * {plan.accumulate_batches}, got {plan.batch_size}: raise --data.batch_size "
                "(it counts pairs per optimizer step over all devices)."
            )
        self.sampler = StepSampler(pairs.token_counts, plan)  # Lightning tells it the epoch
        self.loader = DataLoader(_Steps(pairs), batch_size=None, sampler=self.sampler, num_workers=num_workers)
        self.batch_sampler = None  # Lightning asks for one
        self.position = 0
        self.wait_seconds = 0.0

    def __len__(self) -> int:
        """Lightning batches per epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Step]:
        """Count what is handed out, and the time it took to come."""
        self.position = self.sampler.start_batch
        asked = time.perf_counter()
        for step in self.loader:
            self.wait_seconds += time.perf_counter() - asked
            self.position += 1
            yield step
            asked = time.perf_counter()

    def state_dict(self) -> dict[str, int]:
        """Lightning batches of this epoch that were handed out."""
        return {"position": self.position % max(1, len(self))}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind that position in the next epoch that is iterated."""
        self.sampler.start_batch = state["position"]


def pack_rows_by_tokens(token_counts: NDArray[np.int64], max_tokens: int) -> Iterator[list[int]]:
    """Rows in batches of at most `max_tokens`, longest first (so that what does not fit into memory shows at once)."""
    pack: list[int] = []
    room = max_tokens
    for row in np.argsort(-token_counts, kind="stable"):
        if pack and token_counts[row] > room:
            yield pack
            pack, room = [], max_tokens
        pack.append(int(row))
        room -= token_counts[row]
    yield pack
