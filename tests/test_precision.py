"""The processor decides."""

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import ModelParallelStrategy

from dpo.models.cpu import bfloat16_where_fast
from dpo.training.base import check


@pytest.mark.parametrize(("avx", "amx"), [(True, False), (False, True), (False, False)])
def test_bfloat16_only_where_the_processor_multiplies_it(avx: bool, amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    plugin = bfloat16_where_fast()
    assert type(plugin) is (MixedPrecision if avx or amx else Precision)


def test_a_strategy_that_spreads_the_weights_is_refused() -> None:
    check(L.Trainer(accelerator="cpu", logger=False, strategy="auto"))
    check(L.Trainer(accelerator="cpu", logger=False, strategy="ddp", devices=2))
    with pytest.raises(ValueError, match="expected auto or ddp, got ModelParallelStrategy"):
        check(L.Trainer(accelerator="cpu", logger=False, strategy=ModelParallelStrategy(), devices=2))
