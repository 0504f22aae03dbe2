"""Strategies that are refused."""

import lightning as L
import pytest
from lightning.pytorch.strategies import ModelParallelStrategy

from dpo.training.trainer_checks import check_trainer_support


def test_a_strategy_that_spreads_the_weights_is_refused() -> None:
    check_trainer_support(L.Trainer(accelerator="cpu", logger=False, strategy="auto"))
    check_trainer_support(L.Trainer(accelerator="cpu", logger=False, strategy="ddp", devices=2))
    with pytest.raises(ValueError, match="expected auto, ddp or fsdp2, got ModelParallelStrategy"):
        check_trainer_support(L.Trainer(accelerator="cpu", logger=False, strategy=ModelParallelStrategy(), devices=2))
