"""The callback that refuses to resume a checkpoint with other training options than it was trained with.

With other data or another batch size, the checkpoint's position in the data would mean other pairs; with another loss
or seed, config.yaml would describe only the last part of the run. Options may change that affect neither: the length
of training, what is logged, how a step is split into micro-batches, and the optimizer's.
"""

from typing import Any

import lightning as L

from dpo.data.datamodule import PairData
from dpo.training.base import Stage
from dpo.training.dpo import DPO


class ResumeCheck(L.Callback):
    """Saves the options that must not change in every checkpoint, and compares them on resuming."""

    def __init__(self, seed: int, data: PairData) -> None:
        """Take the global seed and the data; the other options are those of the trainer and its module."""
        self.seed = seed
        self.data = data

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the options that must not change."""
        checkpoint["terms"] = self._fixed_options(trainer, pl_module)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare the saved options with the current ones.

        Raises:
            ValueError: Some of them differ.
        """
        saved = checkpoint.get("terms", {})
        current = self._fixed_options(trainer, pl_module)
        changed = [f"{name} {saved.get(name)} (now {new})" for name, new in current.items() if saved.get(name) != new]
        if changed:
            raise ValueError(
                f"the checkpoint was trained with other options: expected {', '.join(changed)}. Resume with the "
                "config.yaml of its run, or start a new run with --model.policy set to that run's export."
            )

    def _fixed_options(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, str | int]:
        assert isinstance(module, Stage)
        return {
            "--seed_everything": self.seed,
            "--model": type(module).__name__,
            "--model.adapter": str(module.adapter),
            **(_dpo_options(module) if isinstance(module, DPO) else {}),
            "--data.batch_size": self.data.batch_size,
            "--data.shuffle": self.data.shuffle,
            "--data.seed": self.data.seed,
            "--data: training pairs with SHA-256": self.data.training_sha256[:16],
            "--trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
        }


def _dpo_options(module: DPO) -> dict[str, str | int]:
    # How a fixed reference is given may change: the module compares the hash of its weights.
    reference = str(module.reference_choice) if module.reference.checkpointed_names() else "fixed"
    return {"--model.loss": str(module.loss), "--model.reference": reference}
