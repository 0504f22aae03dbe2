"""What a run needs on every device under each strategy, and how much it computes in all.

The parts of one device that holds everything are traced (`dpo.planning.tracing`). What sharding makes of them is
arithmetic: FSDP2 splits weights, gradients and optimizer states evenly, and gathers two layers and whatever is outside
of layers at a time.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from dpo.data.datamodule import PairData
from dpo.data.sampler import EpochPlan, StepSampler
from dpo.models.batch import Batch, Example, collate
from dpo.planning.devices import DeviceKind
from dpo.planning.tracing import StepTrace, UnitSizes

GIB = 2**30
CUDA_RUNTIME = GIB  # context, libraries and communication buffers of a process
USABLE_SHARE = 0.95  # of a device's memory: the allocator cannot use all of it, as rows have ever new lengths
GATHERED_LAYERS = 2  # the one that computes and the one that comes next
EPOCHS_SEARCHED = 3  # for the largest micro-batch, as every epoch has another order


@dataclass(frozen=True)
class Strategy:
    """A way to use several devices.

    Attributes:
        name: Its name.
        options: What it adds to the command line of ``fit``.
        shards: Devices that one copy of the models is spread over.
        offloads: Slices and optimizer states are in host memory.
    """

    name: str
    options: tuple[str, ...] = ()
    shards: int = 1
    offloads: bool = False


def possible_strategies(devices: int) -> list[Strategy]:
    """Return the strategies for a number of devices, the simplest first."""
    config = "configs/strategies/{}.yaml".format
    count = (
        ("--trainer.devices", str(devices))
        if devices <= 8
        else ("--trainer.devices", "8", "--trainer.num_nodes", str(ceil(devices / 8)))
    )
    if devices == 1:
        return [Strategy("one device"), Strategy("offload", ("--config", config("fsdp2_offload"), *count), 1, True)]
    strategies = [Strategy("ddp", ("--config", config("ddp"), *count))]
    if devices >= 4 and devices % 2 == 0:
        strategies.append(Strategy("hsdp", ("--config", config("hsdp"), *count), devices // 2))
    return [
        *strategies,
        Strategy("fsdp2", ("--config", config("fsdp2"), *count), devices),
        Strategy("offload", ("--config", config("fsdp2_offload"), *count), devices, True),
    ]


@dataclass(frozen=True)
class DeviceMemory:
    """The peak of memory on one device by part, in bytes.

    Attributes:
        weights: The policy, or its slice.
        gradients: Gradients, or their slices.
        optimizer: States of the optimizer, or their slices.
        reference: The reference, or its slice; nothing if it shares the policy's weights or is read from a file.
        gathered: Whole layers and their gradients under sharding; buckets of gradients under DDP.
        casts: Weights in the number format that is computed in.
        activations: Activations and their gradients.
        head: Logits and probabilities.
        runtime: What the libraries take.
        host: Host memory for this device's slices.
    """

    weights: int
    gradients: int
    optimizer: int
    reference: int
    gathered: int
    casts: int
    activations: int
    head: int
    runtime: int
    host: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts on the device."""
        parts: list[int] = list(vars(self).values())
        return sum(parts) - self.host

    def fits(self, device: DeviceKind) -> bool:
        """Return whether it fits into a device."""
        return self.total <= USABLE_SHARE * device.memory_gib * GIB


def device_memory(trace: StepTrace, strategy: Strategy, devices: int, device: DeviceKind) -> DeviceMemory:
    """Return the memory of one device.

    Args:
        trace: The parts of one device that holds everything, at this number of devices' micro-batch.
        strategy: How the devices are used.
        devices: How many there are.
        device: Their kind.
    """
    runtime = CUDA_RUNTIME if device.is_cuda else 0
    if strategy.shards == 1 and not strategy.offloads:
        held = (trace.policy.total, trace.gradients, trace.optimizer, trace.reference.total)
        buckets = trace.trained.total if devices > 1 else 0
        return DeviceMemory(*held, buckets, trace.casts, trace.activations, trace.head, runtime)
    sizes = (trace.policy.total, trace.trained.total, trace.optimizer, trace.reference.total)
    weights, gradients, optimizer, reference = (ceil(size / strategy.shards) for size in sizes)
    whole = _gathered(trace.policy) + _gathered(trace.trained)  # weights and their gradients
    gathered = max(whole, _gathered(trace.reference))
    rest = (gathered, trace.casts, trace.activations, trace.head, runtime)
    if strategy.offloads:
        return DeviceMemory(0, 0, 0, 0, *rest, host=weights + gradients + optimizer + reference)
    return DeviceMemory(weights, gradients, optimizer, reference, *rest)


def _gathered(sizes: UnitSizes) -> int:
    return min(sizes.total, GATHERED_LAYERS * sizes.largest_layer + sizes.rest)


@dataclass(frozen=True)
class Workload:
    """What a run has to do.

    Attributes:
        batch: The largest micro-batch of a device.
        micro_batches: Most micro-batches of an optimizer step on a device.
        is_actual: Whether these are those of the data, or assumed from the options.
        steps: Optimizer steps of the run; None if the data are not tokenized.
        tokens: Tokens of prompts and answers of the run, over all devices; None if the data are not tokenized.
    """

    batch: Batch
    micro_batches: int
    is_actual: bool
    steps: int | None = None
    tokens: int | None = None


def assumed_workload(
    batch_size: int, max_length: int, max_tokens: int | None, devices: int, accumulate: int
) -> Workload:
    """Return a workload of pairs as long as they may be, half of it prompt, for data that are not tokenized yet.

    Args:
        batch_size: Pairs per optimizer step.
        max_length: Maximum tokens of prompt and answer.
        max_tokens: Maximum tokens of a micro-batch.
        devices: Number of devices.
        accumulate: Lightning batches per optimizer step.
    """
    prompt, answer = max_length // 2, max_length - max_length // 2
    share = ceil(batch_size / (devices * accumulate))
    pairs = min(share, max(1, max_tokens // (prompt + 2 * answer))) if max_tokens else share
    examples = [Example(str(i), [0] * prompt, ([0] * answer, [0] * answer)) for i in range(pairs)]
    return Workload(collate(examples), accumulate * ceil(share / pairs), False)


def actual_workload(data: PairData, devices: int, accumulate: int, epochs: int, max_steps: int) -> Workload:
    """Return the workload of data that are tokenized.

    Args:
        data: The data, set up.
        devices: Number of devices.
        accumulate: Lightning batches per optimizer step.
        epochs: Epochs of the run.
        max_steps: Most optimizer steps of the run; -1 for no limit.
    """
    pairs = data.require_pairs("train")
    plan = EpochPlan(data.batch_size, data.max_tokens, data.shuffle, data.seed, 0, devices, accumulate)
    per_epoch = len(StepSampler(pairs.token_counts, plan)) // accumulate
    steps = min(epochs * per_epoch, max_steps if max_steps >= 0 else epochs * per_epoch)
    counts = pairs.token_counts
    largest: list[int] = []
    most, tokens = 0, 0
    for rows in _steps(plan, len(pairs), per_epoch, steps):
        shares = plan.split_step(rows, counts)
        tokens += sum(counts[row] for row in rows)
        largest = max([largest, *(pack for share in shares for pack in share)], key=lambda p: sum(counts[r] for r in p))
        most = max(most, *(sum(map(len, shares[rank::devices])) for rank in range(devices)))
    searched = min(steps, per_epoch * EPOCHS_SEARCHED)
    if not largest:
        raise ValueError(
            f"--data.batch_size: expected at most the {len(pairs)} training pairs, got {data.batch_size}: a run would "
            "have no step."
        )
    return Workload(collate([pairs[row] for row in largest]), most, True, steps, round(tokens * steps / searched))


def _steps(plan: EpochPlan, row_count: int, per_epoch: int, steps: int) -> Iterable[list[int]]:
    for step in range(min(steps, per_epoch * EPOCHS_SEARCHED)):
        epoch, index = divmod(step, per_epoch)
        if index == 0:
            order = plan.epoch_order(row_count, epoch)
        yield order[index * plan.batch_size : (index + 1) * plan.batch_size].tolist()
