"""Print a table of sizes: what models of 0.5B to 70B need on 1 to 1,024 devices; nothing is downloaded.

``python benchmarks/sizes.py`` takes some minutes on a CPU. Every figure is an estimate by ``python -m dpo plan``.
"""

import argparse

import torch
from transformers import AutoConfig, PreTrainedConfig

from dpo import DPO
from dpo.cli.plan import ASSUMED_MFU, Plan, choices_on, variants_of
from dpo.planning.devices import DEVICE_KINDS, DeviceKind
from dpo.planning.estimates import GIB, assumed_workload

PAIRS, MAX_LENGTH, MAX_TOKENS = 64, 512, 16384  # pairs of a device and step; longest answer; longest micro-batch
DEVICES = (1, 2, 4, 8, 64, 256, 1024)
TRAINING_TOKENS = 60e6  # prompts and answers of some 160,000 pairs, such as hh-rlhf


def make_config(
    family: str, words: int, sizes: tuple[int, int], layers: int, heads: tuple[int, int]
) -> PreTrainedConfig:
    """Return the configuration of a model.

    Args:
        family: Its type.
        words: Size of the vocabulary.
        sizes: Of hidden states and of what is inside of the feed-forward layers.
        layers: Number of layers.
        heads: Number of heads of queries, and of keys.
    """
    return AutoConfig.for_model(
        family,
        vocab_size=words,
        hidden_size=sizes[0],
        intermediate_size=sizes[1],
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        tie_word_embeddings=sizes[0] < 2048,
        max_position_embeddings=8192,
    )


# Published sizes: the model cards and config.json of Qwen2.5 and Llama 3.
MODELS = {
    "Qwen2.5 0.5B": make_config("qwen2", 151936, (896, 4864), 24, (14, 2)),
    "Qwen2.5 1.5B": make_config("qwen2", 151936, (1536, 8960), 28, (12, 2)),
    "Qwen2.5 7B": make_config("qwen2", 152064, (3584, 18944), 28, (28, 4)),
    "Llama 3 8B": make_config("llama", 128256, (4096, 14336), 32, (32, 8)),
    "Llama 3 70B": make_config("llama", 128256, (8192, 28672), 80, (64, 8)),
}


def print_rows(name: str, device: DeviceKind) -> None:
    """Print a row for every number of devices: the cheapest choice that fits, first of those that train all weights."""
    stage = DPO(name, gradient_checkpointing=True)
    workload = assumed_workload(PAIRS, MAX_LENGTH, MAX_TOKENS, 1, 1)
    plan = Plan(stage, device, 1, workload, torch.bfloat16, 1.0, {name: MODELS[name]})
    traced = [(plan.trace(variant), label, options, changes) for label, options, variant, changes in variants_of(stage)]
    for devices in DEVICES:
        choices = [each for trace, *rest in traced for each in choices_on(trace, device, devices, *rest)]
        fitting = sorted((each for each in choices if each.memory.fits(device)), key=lambda each: each.rank)
        if not fitting:
            least = min(choice.memory.total for choice in choices) / GIB
            print(f"| {name} | {devices:,} | nothing | | {least:.0f} at least | |", flush=True)
            continue
        best = fitting[0]
        total = best.trace.flops / len(workload.batch.tokens) * TRAINING_TOKENS
        hours = total / (devices * ASSUMED_MFU * (device.peak_flops or 1)) / 3600
        parts = f"{best.strategy.name} | {best.label} | {best.memory.total / GIB:.0f} | {hours:.2g}"
        print(f"| {name} | {devices:,} | {parts} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="h100", choices=DEVICE_KINDS)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    options = parser.parse_args()
    print("| model | devices | strategy | variant | GiB a device | hours |\n|---|---:|---|---|---:|---:|")
    for name in options.models:
        print_rows(name, DEVICE_KINDS[options.device])


if __name__ == "__main__":
    main()
