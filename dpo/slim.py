"""Checkpoints of what training changes, and of nothing else.

Takes a module some of whose weights are frozen: a base under an adapter, a reference. They are read again from where
they came from, never saved. Knows nothing of what the module does.
"""

from typing import Any

import lightning as L


class Slim(L.LightningModule):
    """A module that saves the weights that training changes."""

    def __init__(self) -> None:
        """Let Lightning accept checkpoints that do not hold everything; `load_state_dict` checks what they must."""
        super().__init__()
        self.strict_loading = False

    def changing(self) -> set[str]:
        """Names of the weights that training changes, which are those in a checkpoint; all others are read again."""
        return {name for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What training changes."""
        changing = self.changing()
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in changing}

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        """All that training changes must be there, and nothing else.

        Raises:
            ValueError: Weights are missing, left over, or of another shape.
        """
        changing, ours = self.changing(), super().state_dict()
        missing, left_over = sorted(changing - state.keys()), sorted(state.keys() - changing)
        misfits = sorted(name for name in changing & state.keys() if state[name].shape != ours[name].shape)
        if missing or left_over or misfits:
            raise ValueError(
                f"this checkpoint is of another model: weights missing {missing[:3]}, left over {left_over[:3]}, of "
                f"other shapes {misfits[:3]}. Give the --model.policy and --model.adapter that the run began with."
            )
        return super().load_state_dict(state, strict=False, assign=assign)
