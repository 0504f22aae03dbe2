"""What a run that goes on from a checkpoint must have in common with the one that wrote it.

Takes the module, the data and the configuration; a checkpoint keeps their terms, and other ones are refused: its place
among the pairs would be another, and config.yaml would claim for the whole run what holds for its end. What may change
is the length of training, what is watched, how the work is cut, and the optimizer.
"""

from typing import Any

import lightning as L

from dpo.data.datamodule import PairData
from dpo.training.base import Stage
from dpo.training.dpo import DPO


class ResumeCheck(L.Callback):
    """Keeps the terms of training in every checkpoint; goes on with no others."""

    def __init__(self, seed: int, data: PairData) -> None:
        """Take the seed of everything, and the data."""
        self.seed, self.data = seed, data

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep them."""
        checkpoint["terms"] = self._terms(trainer, pl_module)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare them.

        Raises:
            ValueError: Some differ.
        """
        now, before = self._terms(trainer, pl_module), checkpoint.get("terms", {})
        changed = [
            f"{name} {before.get(name)} (now {value})" for name, value in now.items() if before.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"the checkpoint was trained with other options: expected {', '.join(changed)}. Go on with the "
                "config.yaml of its run, or begin a new one with --model.policy at the export of that run."
            )

    def _terms(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, str | int]:
        assert isinstance(module, Stage)
        return {
            "--seed_everything": self.seed,
            "--model": type(module).__name__,
            "--model.adapter": str(module.adapter),
            **(_preferences(module) if isinstance(module, DPO) else {}),
            "--data.batch_size": self.data.batch_size,
            "--data.shuffle": self.data.shuffle,
            "--data.seed": self.data.seed,
            "--data: training pairs with SHA-256": self.data.training_sha256[:16],
            "--trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
        }


def _preferences(module: DPO) -> dict[str, str | int]:
    moving = (
        str(module.reference_choice) if module.reference.checkpointed_names() else "fixed"
    )  # its weights are compared too
    return {"--model.loss": str(module.loss), "--model.reference": moving}
