"""What a trainer must allow: exact steps, and options with which something is trained."""

import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import lightning as L
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from dpo.training.sharding import FSDP2

# What options of a trainer must be in a fit; Lightning takes others, with which nothing is trained, or uphill.
_TRAINER_LIMITS: Mapping[str, tuple[Callable[[float], bool], str]] = MappingProxyType(
    {
        "gradient_clip_val": (lambda norm: 0 <= norm < math.inf, "a finite number of at least 0 (0: no clipping)"),
        "limit_train_batches": (lambda batches: batches > 0, "a number above 0"),
        "accumulate_grad_batches": (lambda batches: batches > 0, "a whole number of at least 1"),
        "log_every_n_steps": (lambda steps: steps > 0, "a whole number of at least 1"),
        "max_steps": (lambda steps: steps != 0, "a whole number of at least 1, or -1 for no limit"),
        "max_epochs": (lambda epochs: epochs != 0, "a whole number of at least 1, or -1 for no limit"),
    }
)
_STRATEGY_EXPECTED = "--trainer.strategy: expected auto, ddp or fsdp2"
_STRATEGY_REASON = (
    "With ddp every device holds the whole models, with fsdp2 they are spread over the devices; both run the same "
    "command line in every process."
)


def check_trainer_support(trainer: L.Trainer) -> None:
    """Refuse number formats that weights are kept in, and strategies under which steps would not be exact.

    Raises:
        ValueError: Weights are not kept in float32, or the strategy is not known to be exact.
    """
    if isinstance(trainer.precision_plugin, HalfPrecision | DoublePrecision):
        raise ValueError(
            f"--trainer.precision: expected 32-true, bf16-mixed or 16-mixed, got {trainer.precision}. Weights are "
            "kept in float32: in 16 bits the small steps of preference training are lost, 64 serve no purpose."
        )
    if type(trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy, FSDP2) or _is_spawned(trainer.strategy):
        name = "spawned or forked processes" if _is_spawned(trainer.strategy) else type(trainer.strategy).__name__
        raise ValueError(f"{_STRATEGY_EXPECTED}, got {name}. {_STRATEGY_REASON}")


def check_strategy_name(strategy: object) -> None:
    """Refuse a strategy by its name, before Lightning looks for what it needs.

    Raises:
        ValueError: The name is none of those that are supported.
    """
    if isinstance(strategy, str) and not re.fullmatch(
        r"auto|fsdp2|ddp(_find_unused_parameters_(true|false))?", strategy
    ):
        raise ValueError(f"{_STRATEGY_EXPECTED}, got {strategy}. {_STRATEGY_REASON}")


def check_training_options(trainer: Any) -> None:
    """Refuse options of a trainer with which nothing would be trained, or uphill.

    Args:
        trainer: A trainer, or its options.

    Raises:
        ValueError: A number is out of its range.
    """
    for option, (holds, expected) in _TRAINER_LIMITS.items():
        value = getattr(trainer, option)
        if value is not None and not holds(value):
            raise ValueError(f"--trainer.{option}: expected {expected}, got {value}.")


def _is_spawned(strategy: Any) -> bool:
    return getattr(strategy, "_start_method", "popen") != "popen"
