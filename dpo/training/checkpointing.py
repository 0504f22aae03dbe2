"""Checkpoints that hold the weights that training changes, the module's options, and a position among the data."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.parsing import AttributeDict

from dpo.models.checkpoint_io import read_checkpoint
from dpo.training.hyperparameters import describe_optimizer, from_plain, is_unsaved
from dpo.training.position import loop_state_after_step

_Module = TypeVar("_Module", bound="CheckpointedModule")
FACTORIES = ("optimizer", "lr_scheduler")  # options that make something later


class CheckpointedModule(L.LightningModule, ABC):
    """A module whose checkpoints are small, and from which `load_from_checkpoint` rebuilds it without unpickling code.

    Frozen weights (a base model under an adapter, a fixed reference) are read from where they came from.

    Attributes:
        text_format: How dialogues became text in the checkpoint that the module was rebuilt from; None if unknown.
    """

    has_trained: bool = False
    text_format: Any = None

    def __init__(self) -> None:
        """Let Lightning accept checkpoints without the frozen weights; `load_state_dict` checks the others."""
        super().__init__()
        self.strict_loading = False

    def checkpointed_names(self) -> set[str]:
        """Return the names of the weights that a checkpoint holds."""
        return {name for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the weights that training changes."""
        names = self.checkpointed_names()
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in names}

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load exactly the weights that training changes.

        Raises:
            ValueError: Weights are missing, unexpected, or of another shape.
        """
        names, ours = self.checkpointed_names(), super().state_dict()
        missing, unexpected = sorted(names - state.keys()), sorted(state.keys() - names)
        misshapen = sorted(name for name in names & state.keys() if state[name].shape != ours[name].shape)
        if missing or unexpected or misshapen:
            raise ValueError(
                f"this checkpoint is of another model: weights missing {missing[:3]}, unexpected {unexpected[:3]}, of "
                f"other shapes {misshapen[:3]}. Give the --model.policy and --model.adapter that the run began with."
            )
        return super().load_state_dict(state, strict=False, assign=assign)

    @abstractmethod
    def plain_options(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain values, but for the optimizer, which checkpoints describe."""

    @property
    def hparams(self) -> AttributeDict:
        """The options that a checkpoint holds."""
        return AttributeDict(self.plain_options())

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls: type[_Module], checkpoint_path: str | Path, map_location: Any = None, **options: Any
    ) -> _Module:
        """Rebuild a module from one of its checkpoints, with the weights in it.

        The file must hash as it was written and is read with ``weights_only=True``; no code is imported that it names.

        Args:
            checkpoint_path: A checkpoint file on this machine.
            map_location: Device that the weights are read to. Default: the CPU.
            options: Constructor arguments that replace the saved ones.

        Raises:
            ValueError: The checkpoint is changed, of another module or model, or names a class that is not imported.
        """
        saved = read_checkpoint(checkpoint_path, map_location)
        written_by = saved.get("module", cls.__name__)
        if written_by not in {base.__name__ for base in cls.__mro__}:
            raise ValueError(f"{checkpoint_path} is a checkpoint of {written_by}, not of {cls.__name__}.")
        described = {name: value for name, value in saved["hyper_parameters"].items() if name not in options}
        if is_unsaved(described.get("lr_scheduler")):  # of no use but to train on
            rank_zero_warn("the checkpoint does not hold the learning rate schedule: pass lr_scheduler= to train on.")
            del described["lr_scheduler"]
        found = {name: from_plain(value, as_factory=name in FACTORIES) for name, value in described.items()}
        module = cls(**found, **options)
        module.configure_model()
        module.check_checkpoint(saved)
        module.load_state_dict(saved["state_dict"])
        module.has_trained = True
        module.text_format = saved.get("text_format")
        return module

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that this module cannot go on from."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the position after the last optimizer step (see `dpo.training.position`) and describe the optimizer."""
        self._normalize_position(checkpoint)
        checkpoint["module"] = type(self).__name__
        if self.trainer.optimizers:
            checkpoint["hyper_parameters"]["optimizer"] = describe_optimizer(self.trainer.optimizers[0])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another run; read the position also from checkpoints of earlier versions."""
        self.check_checkpoint(checkpoint)
        self._normalize_position(checkpoint)

    def _normalize_position(self, checkpoint: dict[str, Any]) -> None:
        loops = checkpoint["loops"]
        loops["fit_loop"] = loop_state_after_step(loops["fit_loop"], self.trainer.accumulate_grad_batches)
