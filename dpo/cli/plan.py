"""The verb ``plan``: what a ``fit`` with the same options needs, before a model is downloaded."""

import argparse
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from lightning.pytorch.plugins import Precision
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig

from dpo.cli.main import main as run_command_line
from dpo.cli.probe import measured_tokens
from dpo.cli.training_cli import TrainingCLI, as_list
from dpo.data.datamodule import PairData
from dpo.models.lora import AsLoaded, LoRA
from dpo.models.reference import Moving
from dpo.planning.configs import read_model_config
from dpo.planning.devices import DEVICE_KINDS, DeviceKind, parse_device
from dpo.planning.estimates import (
    GIB,
    DeviceMemory,
    Strategy,
    Workload,
    actual_workload,
    assumed_workload,
    device_memory,
    possible_strategies,
)
from dpo.planning.tracing import StepTrace, Variant, trace_step
from dpo.training.base import Stage
from dpo.training.dpo import DPO
from dpo.training.precomputed import Cached

DESCRIPTION = (
    "Say what a fit with the same options needs, before a model is downloaded: memory of a device by part for every "
    "strategy and reference, what fits, the cheapest choice that does, and tokens, operations and time. Only the "
    "configuration and the tokenizer of a model are read. All other options are those of `fit`."
)
ASSUMED_MFU = 0.35  # share of the peak rate that a run is assumed to reach
DEFAULT_EPOCHS = 1000  # Lightning's, where neither epochs nor steps are limited
OFFLOAD_COST = 3  # times slower, roughly: slices cross the bus in every pass
PARTS = ("weights", "gradients", "optimizer", "reference", "gathered", "casts", "activations", "head", "runtime")


@dataclass(frozen=True)
class Plan:
    """What is planned, and what is known of it.

    Attributes:
        stage: What is trained.
        device: The kind of device.
        devices: Number of devices.
        workload: What the run has to do.
        autocast_dtype: Number format of mixed precision. None: float32.
        clip_norm: Norm to which gradients are clipped.
        configs: Configurations by path, of models that are not looked for.
    """

    stage: Stage
    device: DeviceKind
    devices: int
    workload: Workload
    autocast_dtype: torch.dtype | None = None
    clip_norm: float | None = None
    configs: Mapping[str, PreTrainedConfig] = field(default_factory=dict)

    def trace(self, variant: Variant) -> StepTrace:
        """Run the largest step without data."""
        return trace_step(
            self.stage,
            self.workload.batch,
            variant,
            micro_batches=self.workload.micro_batches,
            autocast_dtype=self.autocast_dtype,
            clip_norm=self.clip_norm,
            as_on_cuda=self.device.is_cuda,
            configs=self.configs,
        )


@dataclass(frozen=True)
class Choice:
    """One way to run, and what it needs.

    Attributes:
        label: The variant in words.
        options: What the variant adds to the command line of ``fit``.
        strategy: How the devices are used.
        memory: Memory of a device.
        cost: Operations of the largest micro-batch, with what a strategy adds.
        changes_training: Whether other weights train than was asked for.
        trace: What was traced.
    """

    label: str
    options: tuple[str, ...]
    strategy: Strategy
    memory: DeviceMemory
    cost: float
    changes_training: bool
    trace: StepTrace

    @property
    def rank(self) -> tuple[bool, float, int]:
        """Order of preference: the same weights train, then few operations, then few devices for a copy."""
        return self.changes_training, self.cost, self.strategy.shards


def variants_of(stage: Stage) -> Iterator[tuple[str, tuple[str, ...], Variant, bool]]:
    """Yield what can be varied: in words, as options, as a variant, and whether it changes what trains."""
    has_reference = isinstance(stage, DPO) and stage.loss.uses_reference
    given = "as given" if has_reference else "no reference"
    cached = ("--model.reference", "Cached")
    recomputed = ("--model.gradient_checkpointing", "true")
    may_cache = has_reference and _may_cache(stage)
    may_adapt = stage.adapter == AsLoaded()
    for words, options, checkpointing in (("", (), None), (", checkpointing", recomputed, True)):
        if checkpointing and stage.gradient_checkpointing:
            continue
        yield given + words, options, Variant(checkpointing=checkpointing), False
        if may_cache:
            variant = Variant(is_cached=True, checkpointing=checkpointing)
            yield "Cached" + words, (*cached, *options), variant, False
        if may_adapt:
            variant = Variant(adapter=LoRA(), checkpointing=checkpointing)
            yield "LoRA" + words, ("--model.adapter", "LoRA", *options), variant, True


def _may_cache(stage: Any) -> bool:
    return not isinstance(stage.reference_choice, Cached | Moving)


def choices_of(plan: Plan) -> Iterator[list[Choice]]:
    """Yield the choices of every variant, one for each strategy."""
    for label, options, variant, changes in variants_of(plan.stage):
        yield choices_on(plan.trace(variant), plan.device, plan.devices, label, options, changes)


def choices_on(
    trace: StepTrace, device: DeviceKind, devices: int, label: str, options: tuple[str, ...], changes: bool
) -> list[Choice]:
    """Return one choice for each strategy.

    Args:
        trace: What a step of a variant needs.
        device: The kind of device.
        devices: Number of devices.
        label: The variant in words.
        options: What it adds to the command line of ``fit``.
        changes: Whether other weights train than was asked for.
    """
    return [
        Choice(
            label,
            (*strategy.options, *options),
            strategy,
            device_memory(trace, strategy, devices, device),
            trace.flops * (OFFLOAD_COST if strategy.offloads else 1),
            changes,
            trace,
        )
        for strategy in possible_strategies(devices)
    ]


def memory_table(choices: Sequence[Choice], device: DeviceKind) -> Table:
    """Return the table of the memory of one device, in GiB."""
    name, unit = ("GiB", GIB) if max(choice.memory.total for choice in choices) >= GIB else ("MiB", 2**20)
    table = Table(title=f"Memory of one device, {name} (estimated; {device.name} has {device.memory_gib:.1f} GiB)")
    for heading in ("strategy", "variant", *PARTS, "total", "fits"):
        table.add_column(heading, justify="left" if heading in ("strategy", "variant") else "right")
    for choice in choices:
        cells = [f"{getattr(choice.memory, part) / unit:.2f}" for part in PARTS]
        fits = "yes" if choice.memory.fits(device) else "no"
        table.add_row(choice.strategy.name, choice.label, *cells, f"{choice.memory.total / unit:.2f}", fits)
    return table


@dataclass(frozen=True)
class Rate:
    """How fast one device is, as far as it is known.

    Attributes:
        words: Where the rate comes from.
        flops: Operations per second; None if it is not known.
        tokens: Tokens per second that were measured with the options as given; None if they were not.
    """

    words: str = ""
    flops: float | None = None
    tokens: float | None = None

    def flops_of(self, flops_per_token: float) -> float | None:
        """Return operations per second, of a step as given if it was measured."""
        return self.tokens * flops_per_token if self.tokens else self.flops


def print_plan(plan: Plan, fit_options: Sequence[str], rate: Rate) -> None:
    """Print memory, the cheapest choice that fits, and what the run computes.

    Args:
        plan: What is planned.
        fit_options: Options of ``fit`` that were given.
        rate: How fast one device is.
    """
    console = Console(width=None if Console().is_terminal else 160)
    choices: list[Choice] = []
    for group in choices_of(plan):
        if not choices:
            _print_workload(plan, group[0].trace)
        choices += group
        full = [choice for choice in choices if choice.memory.fits(plan.device) and not choice.changes_training]
        if full and "checkpointing" not in group[0].label and group[0].changes_training:
            break  # what is left computes more
    console.print(memory_table(choices, plan.device))
    fitting = sorted((choice for choice in choices if choice.memory.fits(plan.device)), key=lambda choice: choice.rank)
    if not fitting:
        print(
            f"Nothing fits {plan.devices} x {plan.device.name}: use more or larger devices, a smaller "
            "--data.max_tokens, or --model.adapter QLoRA."
        )
        return
    best = fitting[0]
    words = " ".join(map(shlex.quote, [*fit_options, *best.options]))
    print(f"Cheapest that fits: {best.strategy.name}, {best.label}\n  python train.py fit {words}")
    given = choices[0].trace.flops / len(plan.workload.batch.tokens)
    _print_time(plan, best, rate.flops_of(given), rate.words)


def _print_workload(plan: Plan, trace: StepTrace) -> None:
    batch = plan.workload.batch
    source = "the data's" if plan.workload.is_actual else "assumed, as the data are not tokenized yet"
    print(
        f"Parameters: {trace.parameters:,}, of which {trace.trained_parameters:,} train.\n"
        f"Largest micro-batch on one of {plan.devices} devices: {len(batch)} pairs, {len(batch.tokens):,} tokens, "
        f"{len(batch.targets):,} of them scored ({source}); {plan.workload.micro_batches} per optimizer step."
    )


def _print_time(plan: Plan, choice: Choice, rate: float | None, rate_words: str) -> None:
    per_token = choice.trace.flops / len(plan.workload.batch.tokens)
    print(f"Operations: {per_token / 1e9:.2f} GFLOP per token (matrix products of layers and head).")
    if plan.workload.tokens is None:
        print("Tokens and time: not known before the data are tokenized (python -m dpo show does it).")
        return
    total = per_token * plan.workload.tokens
    print(f"Run: {plan.workload.steps:,} steps, {plan.workload.tokens:,} tokens, {total:.2e} operations.")
    if rate is None:
        print("Time: not known; give --flops-rate, or measure it here with --measure.")
        return
    seconds = total / (rate * plan.devices)
    print(f"Time: {_in_words(seconds)} at {rate:.3g} operations per second and device ({rate_words}).")


def _in_words(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser("dpo plan", description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    names = ", ".join(DEVICE_KINDS)
    add("--device", help=f"{names}, or a size in GB (default: the devices at hand)")
    add("--devices", type=int, default=1, help="number of devices (default: 1)")
    add("--flops-rate", type=float, help="operations per second that one device reaches")
    add("--mfu", type=float, default=ASSUMED_MFU, help="share of the data sheet's rate (default: %(default)s)")
    add("--measure", action="store_true", help="take the rate of three steps on the devices at hand (needs the model)")
    options, rest = parser.parse_known_args(arguments)
    for name, value in (("devices", options.devices), ("flops-rate", options.flops_rate), ("mfu", options.mfu)):
        if value is not None and not value > 0:
            raise ValueError(f"--{name}: expected a number above 0, got {value}.")
    return options, rest


@cache
def device_at_hand() -> DeviceKind:
    """Return the kind of device that ``fit`` would take: CUDA if there is one, otherwise the host."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        known = [kind for kind in DEVICE_KINDS.values() if kind.name in properties.name.lower()]
        rate = known[0].peak_flops if known else None
        return DeviceKind(properties.name, properties.total_memory / GIB, rate)
    return DeviceKind("this host", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, None, False)


def autocast_dtype(precision: Any, plugins: Any) -> torch.dtype | None:
    """Return the number format of mixed precision of a trainer's options; None for float32."""
    chosen = [plugin.precision for plugin in as_list(plugins) if isinstance(plugin, Precision)]
    name = str(chosen[0] if chosen else precision)
    return {"bf16-mixed": torch.bfloat16, "bf16": torch.bfloat16, "16-mixed": torch.float16}.get(name)


def main(arguments: Sequence[str]) -> None:
    """Print a plan.

    Args:
        arguments: ``--device``, ``--devices``, ``--flops-rate``, ``--mfu``, ``--measure`` and options of ``fit``.

    Raises:
        ValueError: A device is not known, or a number out of its range.
        SystemExit: The options of ``fit`` cannot be used; the message is on stderr.
    """
    options, fit_options = _parse(arguments)
    device = parse_device(options.device) if options.device else device_at_hand()
    rate = _rate(options, device, fit_options)

    class PlanCLI(TrainingCLI):
        """Reads the options as ``fit`` does, and plans instead of training."""

        def before_instantiate_classes(self) -> None:
            """Leave the folders of runs alone."""

        def instantiate_trainer(self, **_: Any) -> Any:
            """Return nothing, as nothing is trained."""

        def _run_subcommand(self, subcommand: str) -> None:
            trainer = self.config_init[subcommand].trainer
            read_model_config(self.model.loader, self.model.policy_path)
            workload = workload_of(self.datamodule, self.model, trainer, options.devices)
            dtype = autocast_dtype(trainer.precision, trainer.plugins)
            plan = Plan(self.model, device, options.devices, workload, dtype, trainer.gradient_clip_val)
            print_plan(plan, fit_options, rate)

    code = run_command_line(["fit", *fit_options], PlanCLI)
    if code:
        raise SystemExit(code)


def _rate(options: argparse.Namespace, device: DeviceKind, fit_options: Sequence[str]) -> Rate:
    if options.measure:
        return Rate("measured in two steps here, with the options as given", tokens=measured_tokens(fit_options))
    if options.flops_rate:
        return Rate("given", options.flops_rate)
    if device.peak_flops:
        return Rate(f"assumed: {options.mfu:.0%} of the data sheet's", options.mfu * device.peak_flops)
    return Rate()


def workload_of(data: PairData, stage: Stage, trainer: Any, devices: int) -> Workload:
    """Return what a run has to do: that of its data if they are tokenized, otherwise what the options allow.

    Args:
        data: The data.
        stage: What is trained on them.
        trainer: Options of the trainer.
        devices: Number of devices.

    Raises:
        ValueError: A step has fewer pairs than there are devices.
    """
    accumulate = trainer.accumulate_grad_batches
    if data.batch_size < devices * accumulate:
        raise ValueError(
            f"--data.batch_size: expected at least one pair for each of {devices} devices times {accumulate} "
            f"accumulated batches, got {data.batch_size}."
        )
    data.given_tokenizer = data.given_tokenizer or stage.policy_path
    data.answer_sides = stage.answer_sides
    max_steps = -1 if trainer.max_steps is None else trainer.max_steps
    epochs = trainer.max_epochs or (DEFAULT_EPOCHS if max_steps < 0 else max_steps)
    epochs = DEFAULT_EPOCHS if epochs < 0 else epochs
    if data.is_tokenized():
        data.setup("fit")
        return actual_workload(data, devices, accumulate, epochs, max_steps)
    return assumed_workload(data.batch_size, data.max_length, data.max_tokens, devices, accumulate)
