"""What a trainer may be asked for: the number format that the processor is fast at, and what is not supported.

For configurations that do not know where they will run, and for people who ask for what would be wrong.
"""

import lightning as L
import torch
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info


def bfloat16_where_fast() -> Precision:
    """Mixed bfloat16 where the CPU multiplies it natively (AVX512-BF16 or AMX), otherwise float32."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    rank_zero_info(
        f"Precision: {'bf16-mixed' if fast else '32-true'}, as this processor {'has' if fast else 'lacks'} bfloat16."
    )
    return MixedPrecision("bf16-mixed", "cpu") if fast else Precision()


def check(trainer: L.Trainer) -> None:
    """Refuse number formats that weights are kept in, and strategies that cut the model.

    Raises:
        ValueError: Weights are not kept in float32, or not whole on every device.
    """
    if isinstance(trainer.precision_plugin, HalfPrecision | DoublePrecision):
        raise ValueError(
            f"--trainer.precision: expected 32-true, bf16-mixed or 16-mixed, got {trainer.precision}. Weights are "
            "kept in float32: in 16 bits the small steps of preference training are lost, 64 serve no purpose."
        )
    if type(trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy):
        raise ValueError(
            f"--trainer.strategy: expected auto or ddp, got {type(trainer.strategy).__name__}. Every device holds the "
            "whole model: the number of micro-batches of a step may differ from device to device, and where weights "
            "are spread over devices each forward pass needs all of them. Use LoRA, --model.reference Cached or "
            "--model.gradient_checkpointing true for models that do not fit."
        )
