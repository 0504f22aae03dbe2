"""The command line: which classes there are, where a run lies, what happens around fit, validate, test and predict.

Takes the words of the command line; gives a run folder. `train.py` is its only caller.
"""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, LRSchedulerTypeTuple
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from dpo import report
from dpo.callbacks import Bar, Rates, Samples, Stop
from dpo.checkpoints import AtomicIO, LastAndBest
from dpo.data import HHRLHF
from dpo.export import export
from dpo.loggers import MetricsCSV, wandb_logger
from dpo.module import DPO
from dpo.preflight import Preflight
from dpo.run import Run

NOISE = {  # what Lightning says about things that are as they should be here
    "policy and reference are in eval mode by design (dropout off)": "Found .* module.s. in eval mode",
    "collating a step takes far less time than training on it": "The .* does not have many workers",
    "torch and Lightning": ".*treespec, LeafSpec.*",
}
QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-6, "weight_decay": 0.0}}
TRAINER = {
    "default_root_dir": "runs",
    "log_every_n_steps": 10,
    "gradient_clip_val": 1.0,
    "num_sanity_val_steps": 0,
}


class CLI(LightningCLI):
    """Lightning's command line around one `Run`."""

    run: Run
    stop: Stop

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the name of the run and what follows from other options."""
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="Name of the run: its folder is runs/<name>. Default: date and seed.",
        )
        parser.link_arguments("model.policy", "data.init_args.tokenizer")
        parser.add_optimizer_args((torch.optim.Optimizer,), link_to="model.optimizer")
        parser.add_lr_scheduler_args(LRSchedulerTypeTuple, link_to="model.lr_scheduler")
        parser.set_defaults({"data": {"class_path": "dpo.data.HHRLHF"}, "optimizer": ADAMW})

    def before_instantiate_classes(self) -> None:
        """Find the folder of the run before anything is read or written."""
        config = self.config[self.subcommand]
        root = Path(config.trainer.default_root_dir)
        name = (
            config.name
            or os.environ.get("DPO_RUN_NAME")
            or f"{datetime.now():%Y%m%d-%H%M%S}-seed{config.seed_everything}"
        )
        os.environ["DPO_RUN_NAME"] = name  # processes that Lightning starts join this run
        self.run = Run(root / name)
        checkpoint = config.get("ckpt_path")
        if checkpoint in ("last", "best"):
            checkpoint = config.ckpt_path = str(self.run.checkpoints / f"{checkpoint}.ckpt")
        inside = checkpoint and self.run.checkpoints.resolve() in Path(checkpoint).resolve().parents
        rank_zero_only(self.run.create)(resume=bool(inside) or self.subcommand != "fit")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Give the trainer what every run has, in front of what the user adds."""
        self.stop = Stop()
        ours = [
            Preflight(self.datamodule),
            Rates(),
            Samples(self.run, self.datamodule),
            LastAndBest(self.run),
            self.stop,
            Bar(),
        ]
        config = self.config[self.subcommand]
        if config.trainer.logger is None:
            kwargs["logger"] = [MetricsCSV(self.run.metrics), wandb_logger(self.run)]
        trainer = super().instantiate_trainer(
            callbacks=ours, plugins=[AtomicIO()], use_distributed_sampler=False, **kwargs
        )
        self._save_config()
        return trainer

    @rank_zero_only
    def _save_config(self) -> None:
        if self.subcommand == "fit":
            text = self._parser("fit").dump(self.config["fit"], skip_none=False)
            self.run.config.write_text(text)
        rank_zero_info(f"Run: {self.run.folder}")

    @rank_zero_only
    def _finish(self, stage: str) -> None:
        values = {
            name: value.item() for name, value in self.trainer.callback_metrics.items() if name.startswith(f"{stage}/")
        }
        if values:
            self.run.update_results(values)

    def after_fit(self) -> None:
        """Write the table of results and the Hugging Face folder."""
        self._finish("val")
        if not self.trainer.is_global_zero:
            return
        rows = report.write(self.run)
        report.show(rows, f"Results of {self.run.folder.name}")
        folder = export(
            self.run,
            self.model.policy,
            self.datamodule.tokenizer,
            base=self.model.policy_path,
            data=self.datamodule.path,
            loss=self.model.loss,
        )
        print(f"Checkpoints: {self.run.checkpoints}\nHugging Face folder: {folder}")

    def after_validate(self) -> None:
        """Store the values."""
        self._finish("val")

    def after_test(self) -> None:
        """Store the values."""
        self._finish("test")


def main(arguments: Sequence[str]) -> int:
    """Run a command line; with neither configuration nor model nor data named, the quickstart.

    Returns:
        Exit code: 0 done, 1 refused with a message, 130 or 143 stopped by a signal.
    """
    words = list(arguments)
    named = any(word.split("=")[0] in ("--config", "-c", "--model.policy", "--data.path") for word in words)
    if words[:1] == ["fit"] and not named:
        words[1:1] = ["--config", str(QUICKSTART)]
    for message in NOISE.values():
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()
    )
    sys.argv[1:] = words  # not as `args`: processes that Lightning starts read them here
    try:
        cli = CLI(
            DPO,
            HHRLHF,
            subclass_mode_data=True,
            save_config_callback=None,
            trainer_defaults=TRAINER,
            seed_everything_default=0,
        )
    except (ValueError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return cli.stop.exit_code
