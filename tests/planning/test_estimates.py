"""What strategies make of the parts of a step, devices by name, and how much a run has to do."""

from dataclasses import replace

import pytest

from dpo import HHRLHF
from dpo.data.sampler import EpochPlan, StepLoader
from dpo.planning.devices import DeviceKind, parse_device
from dpo.planning.estimates import (
    CUDA_RUNTIME,
    GIB,
    actual_workload,
    assumed_workload,
    device_memory,
    possible_strategies,
)
from dpo.planning.tracing import StepTrace, UnitSizes
from dpo.quickstart import POLICY_FOLDER
from tests.support.data import cache as cache  # every test has an empty cache of its own

GPU = DeviceKind("test", 80)
TRACE = StepTrace(
    policy=UnitSizes(800, 10, 100),
    trained=UnitSizes(400, 5, 50),
    reference=UnitSizes(800, 10, 100),
    gradients=400,
    optimizer=1600,
    casts=7,
    activations=11,
    head=13,
    flops=1,
    parameters=200,
    trained_parameters=100,
)


def memory_by_strategy(devices: int) -> dict:
    return {s.name: device_memory(TRACE, s, devices, GPU) for s in possible_strategies(devices)}


def test_one_device_holds_everything() -> None:
    memory = memory_by_strategy(1)["one device"]
    assert memory.total == 800 + 400 + 1600 + 800 + 7 + 11 + 13 + CUDA_RUNTIME
    assert memory.total == TRACE.peak + CUDA_RUNTIME


def test_ddp_adds_buckets_of_gradients_and_splits_nothing() -> None:
    assert memory_by_strategy(4)["ddp"].total == TRACE.peak + 400 + CUDA_RUNTIME


def test_sharding_splits_what_is_held_and_gathers_two_layers_and_the_rest() -> None:
    sharded = memory_by_strategy(8)["fsdp2"]
    assert (sharded.weights, sharded.gradients, sharded.optimizer, sharded.reference) == (100, 50, 200, 100)
    assert sharded.gathered == (2 * 10 + 100) + (2 * 5 + 50)
    assert memory_by_strategy(8)["hsdp"].weights == 2 * sharded.weights  # two copies


def test_offloading_moves_slices_to_the_host() -> None:
    sharded, offloaded = (memory_by_strategy(8)[name] for name in ("fsdp2", "offload"))
    assert offloaded.host == sharded.weights + sharded.gradients + sharded.optimizer + sharded.reference
    assert offloaded.total == sharded.total - offloaded.host


def test_a_small_model_is_never_gathered_beyond_its_size() -> None:
    small = replace(TRACE, policy=UnitSizes(60, 50, 10), trained=UnitSizes(0, 0, 0), reference=UnitSizes(0, 0, 0))
    fsdp2 = possible_strategies(2)[-2]
    assert device_memory(small, fsdp2, 2, GPU).gathered == 60


def test_what_fits_leaves_a_margin() -> None:
    memory = memory_by_strategy(1)["one device"]
    assert memory.fits(DeviceKind("larger", memory.total / GIB * 1.06))
    assert not memory.fits(DeviceKind("as large", memory.total / GIB))


def test_devices_have_names_or_sizes() -> None:
    assert parse_device("H100").memory_gib == pytest.approx(79, abs=1)
    assert parse_device("24").memory_gib == parse_device("24GB").memory_gib == pytest.approx(24e9 / 2**30)
    for text in ("h1000", "4080", "-3", "0", "nan"):
        with pytest.raises(ValueError, match=rf"^--device: expected .*h100.*24 .at most 1000., got '{text}'\.$"):
            parse_device(text)


def test_assumed_pairs_are_as_long_as_they_may_be() -> None:
    workload = assumed_workload(batch_size=64, max_length=512, max_tokens=4096, devices=2, accumulate=1)
    assert (len(workload.batch), workload.micro_batches, workload.is_actual) == (5, 7, False)  # 32 pairs of 768 tokens
    assert assumed_workload(64, 512, None, 2, 2).micro_batches == 2


@pytest.mark.parametrize(("devices", "accumulate", "max_tokens"), [(1, 1, None), (2, 1, 300), (2, 2, 200)])
def test_the_largest_micro_batch_is_found(devices: int, accumulate: int, max_tokens: int | None) -> None:
    data = HHRLHF("quickstart", tokenizer=str(POLICY_FOLDER), limit=60, batch_size=8, max_tokens=max_tokens)
    assert not data.is_tokenized()
    data.prepare_data()
    assert data.is_tokenized()
    data.setup("fit")
    workload = actual_workload(data, devices, accumulate, epochs=2, max_steps=-1)
    pairs = data.pairs_by_split["train"]
    sizes: list[int] = []
    counts: list[int] = []
    tokens_of = {pairs[row].id: pairs.token_counts[row] for row in range(len(pairs))}
    tokens = 0
    for rank in range(devices):
        plan = EpochPlan(8, max_tokens, True, 0, rank, devices, accumulate)
        loader = StepLoader(pairs, plan)
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            steps = list(loader)
            for begin in range(0, len(steps), accumulate):
                batches = [b for step in steps[begin : begin + accumulate] for b in step.micro_batches]
                sizes += [len(b.tokens) + 2 * len(b) for b in batches]  # the last token of an answer is no input
                counts.append(len(batches))
                tokens += sum(tokens_of[each] for b in batches for each in b.ids)  # without fillers
    assert len(workload.batch.tokens) + 2 * len(workload.batch) == max(sizes)
    assert workload.micro_batches == max(counts)
    assert workload.tokens == tokens
    assert workload.steps == 2 * (len(pairs) // 8 + (len(pairs) % 8 >= devices * accumulate))


def test_a_run_without_a_step_is_refused() -> None:
    data = HHRLHF("quickstart", tokenizer=str(POLICY_FOLDER), limit=4, batch_size=8)
    data.prepare_data()
    data.setup("fit")
    with pytest.raises(ValueError, match=r"--data\.batch_size"):
        actual_workload(data, 8, 1, epochs=1, max_steps=-1)
