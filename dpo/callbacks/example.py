"""The callback that shows one training example, as the model sees it, before the first step."""

import lightning as L
from rich.console import Console

from dpo.data.datamodule import PairData
from dpo.data.display import show_example


class ExampleDisplay(L.Callback):
    """Prints the first training example of the run: its tokens as text, and which of them are scored."""

    def __init__(self, data: PairData) -> None:
        """Take the data of the run."""
        self.data = data

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the example once no check can refuse the run any more."""
        if trainer.is_global_zero:
            pairs = self.data.require_pairs("train")
            row = pairs.table[int(pairs.row_numbers[0])]
            Console().print(
                show_example(self.data.encoder, row, f"{row['subset']}/train:{row['line']}", pairs.answer_sides)
            )
