"""The order of the pairs and their distribution over devices and micro-batches.

Which pairs a device sees in which step is a pure function of seed, epoch, rank and step. An optimizer step always
consists of the same `batch_size` pairs, however it is split into accumulated batches, over devices, or into
micro-batches of at most `max_tokens`.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler

from dpo.models.batch import Batch, Example, collate

# The rows of one optimizer step by share and micro-batch; each device has one share per accumulated batch.
StepShares = list[list[list[int]]]


@runtime_checkable
class ExampleDataset(Protocol):
    """A map-style data set of examples whose lengths in tokens are known."""

    @property
    def token_counts(self) -> Sequence[int]:
        """Tokens of every example, prompt and answers."""

    @property
    def answer_token_counts(self) -> Sequence[int]:
        """Tokens of the answers of every example."""

    def __len__(self) -> int:
        """Return the number of examples."""

    def __getitem__(self, index: int) -> Example:
        """Return the example at this position."""


@dataclass(frozen=True)
class Step:
    """The work of one device in one Lightning batch.

    Attributes:
        micro_batches: Batches of one forward and backward pass each.
        num_examples: Examples of the whole optimizer step, over all devices and accumulated batches.
        num_scored_tokens: Answer tokens of those examples.
    """

    micro_batches: tuple[Batch, ...]
    num_examples: int
    num_scored_tokens: int

    def to(self, device: torch.device | str, **_: object) -> "Step":
        """Return the step with its micro-batches on another device."""
        return replace(self, micro_batches=tuple(batch.to(device) for batch in self.micro_batches))


@dataclass(frozen=True)
class EpochPlan:
    """How an epoch is split into optimizer steps.

    Attributes:
        batch_size: Pairs per optimizer step, over all devices and accumulated batches.
        max_tokens: Maximum tokens of a micro-batch, which only a single pair may exceed. None: no limit.
        shuffle: Draw a new order every epoch, instead of keeping the order of the data set.
        seed: Seed of the order.
        rank: Rank of this device.
        world_size: Number of devices.
        accumulate_batches: Lightning batches per optimizer step.
        left_out: Places, in an epoch that is not shuffled, of pairs that are left out, ascending: all others have the
            order that they have beside them.
        keep_partial_step: Keep a last step that has too few pairs to give some to every device, as evaluation does;
            training leaves it out.
    """

    batch_size: int
    max_tokens: int | None = None
    shuffle: bool = False
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    accumulate_batches: int = 1
    keep_partial_step: bool = False
    left_out: tuple[int, ...] = ()

    def epoch_order(self, row_count: int, epoch: int) -> NDArray[np.int64]:
        """Return the row numbers in the order of an epoch."""
        if not self.shuffle:
            return np.arange(row_count)
        places = np.random.default_rng((self.seed, epoch)).permutation(row_count + len(self.left_out))
        kept = places[~np.isin(places, self.left_out)]
        return kept - np.searchsorted(self.left_out, kept)

    def split_step(self, rows: Sequence[int], token_counts: Sequence[int]) -> StepShares:
        """Split one optimizer step into `accumulate_batches * world_size` shares of micro-batches.

        Rows are assigned longest first, each to the share with the fewest tokens among those with the fewest rows. Each
        share is then packed into micro-batches, first fit.
        """
        shares: list[list[int]] = [[] for _ in range(self.accumulate_batches * self.world_size)]
        work = [0] * len(shares)
        for row in sorted(rows, key=lambda row: (-token_counts[row], row)):
            least = min(range(len(shares)), key=lambda i: (len(shares[i]), work[i]))
            shares[least].append(row)
            work[least] += token_counts[row]
        return [self._pack(share, token_counts) for share in shares]

    def _pack(self, rows: list[int], token_counts: Sequence[int]) -> list[list[int]]:
        """Pack rows, longest first, into the first micro-batch that has room for them."""
        max_tokens = self.max_tokens or sum(token_counts[row] for row in rows)
        packs: list[list[int]] = []
        room: list[int] = []
        for row in rows:
            index = next((i for i, free in enumerate(room) if token_counts[row] <= free), len(packs))
            if index == len(packs):
                packs.append([])
                room.append(max_tokens)
            packs[index].append(row)
            room[index] -= token_counts[row]
        return packs


class StepSampler(Sampler[tuple[list[list[int]], list[int], list[int]]]):
    """A sampler that yields the work of one device, Lightning batch after Lightning batch.

    This is the rows of every micro-batch; for every micro-batch, the number of rows that another device has more of;
    and all rows of the optimizer step. Every device has as many micro-batches as the device that has most; the last
    ones may be empty.

    Args:
        token_counts: Tokens of every row.
        plan: How an epoch is split.

    Attributes:
        epoch: The epoch whose order is used.
        start_batch: Lightning batch at which the next iteration starts; used to resume inside an epoch.
    """

    def __init__(self, token_counts: Sequence[int], plan: EpochPlan) -> None:
        self.token_counts = token_counts
        self.plan = plan
        self.epoch = 0
        self.start_batch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning calls this before every one."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self.token_counts), self.plan.batch_size)
        parts = self.plan.world_size * self.plan.accumulate_batches
        return (full + (rest >= (1 if self.plan.keep_partial_step else parts))) * self.plan.accumulate_batches

    def __iter__(self) -> Iterator[tuple[list[list[int]], list[int], list[int]]]:
        for shares, rows in self.shares_of_all_devices():
            sizes = [max(map(len, packs)) for packs in zip_longest(*shares, fillvalue=())]
            own = shares[self.plan.rank]
            own = own + [[] for _ in sizes[len(own) :]]
            yield own, [size - len(pack) for size, pack in zip(sizes, own, strict=True)], rows

    def shares_of_all_devices(self) -> Iterator[tuple[StepShares, list[int]]]:
        """Yield, per Lightning batch, the micro-batches of every device, and all rows of the optimizer step."""
        plan = self.plan
        order = plan.epoch_order(len(self.token_counts), self.epoch)
        start = self.start_batch
        self.start_batch = 0  # the next epoch starts at its beginning
        for batch in range(start, len(self)):
            step, window = divmod(batch, plan.accumulate_batches)
            rows = order[step * plan.batch_size : (step + 1) * plan.batch_size].tolist()
            shares = plan.split_step(rows, self.token_counts)
            yield shares[window * plan.world_size : (window + 1) * plan.world_size], rows


class _Steps(torch.utils.data.Dataset[Step]):
    def __init__(self, pairs: ExampleDataset) -> None:
        self.pairs = pairs

    def __getitem__(self, item: tuple[list[list[int]], list[int], list[int]]) -> Step:
        micro_batches, filler_counts, step_rows = item
        fillers = [[self._filler(step_rows[0])] * count if count else [] for count in filler_counts]
        batches = tuple(
            collate([self.pairs[row] for row in rows], few) for rows, few in zip(micro_batches, fillers, strict=True)
        )
        return Step(batches, len(step_rows), sum(self.pairs.answer_token_counts[row] for row in step_rows))

    def _filler(self, row: int) -> Example:
        """Return an example as short as can be, with as many answers as others have."""
        example = self.pairs[row]
        return replace(example, prompt=example.prompt[:1], answers=tuple(answer[:1] for answer in example.answers))


class StepLoader:
    """The steps of one device. Its state is the position in the epoch, so a resumed run continues with the next step.

    It is not a `DataLoader`, because Lightning replaces those by new ones with its own samplers.

    Args:
        pairs: The examples.
        plan: How an epoch is split into steps.
        num_workers: Processes that collate ahead.

    Attributes:
        position: Lightning batches of this epoch that were yielded.
        wait_seconds: Seconds that the consumer has waited for steps.

    Raises:
        ValueError: There are too few pairs per step to give some to every device.
    """

    def __init__(self, pairs: ExampleDataset, plan: EpochPlan, num_workers: int = 0) -> None:
        if plan.batch_size < plan.world_size * plan.accumulate_batches:
            raise ValueError(
                "expected a batch_size of at least devices * accumulate_grad_batches = "
                f"{plan.world_size} * {plan.accumulate_batches}, got {plan.batch_size}: raise --data.batch_size "
                "(it counts pairs per optimizer step over all devices)."
            )
        self.sampler = StepSampler(pairs.token_counts, plan)  # Lightning calls its set_epoch
        self.loader = DataLoader(_Steps(pairs), batch_size=None, sampler=self.sampler, num_workers=num_workers)
        self.batch_sampler = None  # Lightning expects the attribute
        self.position = 0
        self.wait_seconds = 0.0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Step]:
        self.position = self.sampler.start_batch
        requested = time.perf_counter()
        for step in self.loader:
            self.wait_seconds += time.perf_counter() - requested
            self.position += 1
            yield step
            requested = time.perf_counter()

    def state_dict(self) -> dict[str, int]:
        """Return the position, which at the end of an epoch is the start of the next."""
        return {"position": self.position % max(1, len(self))}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the saved position in the next iteration."""
        self.sampler.start_batch = state["position"]


def pack_rows_by_tokens(token_counts: NDArray[np.int64], max_tokens: int) -> Iterator[list[int]]:
    """Yield row numbers in batches of at most `max_tokens`, longest first so that a lack of memory shows at once."""
    pack: list[int] = []
    room = max_tokens
    for row in np.argsort(-token_counts, kind="stable"):
        if pack and token_counts[row] > room:
            yield pack
            pack, room = [], max_tokens
        pack.append(int(row))
        room -= token_counts[row]
    yield pack
