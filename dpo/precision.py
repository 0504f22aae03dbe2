"""The number format that the processor is fast at, and those that are none to train in.

For configurations that do not know where they will run.
"""

import torch
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.utilities import rank_zero_info


def bfloat16_where_fast() -> Precision:
    """Mixed bfloat16 where the CPU multiplies it natively (AVX512-BF16 or AMX), otherwise float32."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    rank_zero_info(
        f"Precision: {'bf16-mixed' if fast else '32-true'}, as this processor {'has' if fast else 'lacks'} bfloat16."
    )
    return MixedPrecision("bf16-mixed", "cpu") if fast else Precision()


def check(precision: Precision) -> None:
    """Refuse number formats that weights are kept in.

    Raises:
        ValueError: They are not kept in float32.
    """
    if isinstance(precision, HalfPrecision | DoublePrecision):
        raise ValueError(
            f"--trainer.precision: expected 32-true, bf16-mixed or 16-mixed, got {precision.precision}. Weights are "
            "kept in float32: in 16 bits the small steps of preference training are lost, 64 serve no purpose."
        )
