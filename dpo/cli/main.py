"""The command line: which classes there are, where a run lies, what happens around fit, validate, test and predict.

Takes the words of the command line; gives a run folder. `train.py` is its only caller.
"""

import logging
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
import wandb
from jsonargparse.typing import restricted_string_type
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, LRSchedulerTypeTuple
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from dpo.callbacks.defaults import callbacks
from dpo.callbacks.predictions import Predictions
from dpo.callbacks.stopping import Stop
from dpo.cli.parser import Parser, completed, hand_on, reason
from dpo.data.datamodule import QUICKSTART, TextData
from dpo.data.preferences import HHRLHF, PreferencePairs
from dpo.data.prompts import Prompts
from dpo.files import jsonl
from dpo.models.cpu import keep_few_kernels, keep_freed_memory
from dpo.runs import results
from dpo.runs.checkpoint_io import AtomicIO, local_file
from dpo.runs.export import export
from dpo.runs.folder import NAMED, Run, owner
from dpo.runs.loggers import MetricsCSV, wandb_logger
from dpo.training.base import Stage, check
from dpo.training.dpo import DPO
from dpo.training.nonfinite import NonFinite
from dpo.training.precomputed import Cached
from dpo.training.preflight import PreflightError
from dpo.training.schedules import Warmup
from dpo.training.sft import SFT

NOISE = {  # what Lightning says about things that are as they should be here
    "policy and reference are in eval mode by design (dropout off)": "Found .* module.s. in eval mode",
    "the summary counts parameters": "Precision .* is not supported by the model summary",
    "collating a step takes far less time than training on it": "The .* does not have many workers",
    "a loss looks at its pairs before they are moved": "You have overridden `on_before_batch_transfer`",
    "torch and Lightning": ".*treespec, LeafSpec.*",
    "what is left at the end of a run is logged there": "The number of training batches .* smaller than the logging",
}
CHATTER = ("litlogger", "GPU available", "TPU available")
# Imported here, so that the command line knows them by their last name.
SHORT_NAMES = (DPO, SFT, HHRLHF, PreferencePairs, Prompts, Cached, Warmup)
HELD_OUT = 50  # validation pairs that are stored as text, for whoever serves the run
Name = restricted_string_type("Name", r"^(?!latest$)\w[\w.+-]*$", docstring="A folder name other than latest.")
ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-6, "weight_decay": 0.0}}
TRAINER = {
    "default_root_dir": "runs",
    "log_every_n_steps": 10,
    "gradient_clip_val": 1.0,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}


class CLI(LightningCLI):
    """Lightning's command line around one `Run`."""

    run: Run
    resume: bool
    stop: Stop
    log: MetricsCSV

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the name of the run and what follows from other options."""
        parser.add_argument(
            "--name",
            type=Name | None,
            default=None,
            help="Name of the run: its folder is runs/<name>. Default: date and seed.",
        )
        parser.link_arguments(("model.init_args.policy", "data"), "data.init_args.tokenizer", tokenizer)
        parser.link_arguments("model", "data.init_args.answers", lambda model: model.answers, apply_on="instantiate")
        parser.add_optimizer_args((torch.optim.Optimizer,), link_to="model.init_args.optimizer")
        parser.add_lr_scheduler_args(LRSchedulerTypeTuple, link_to="model.init_args.lr_scheduler")
        parser.set_defaults(
            {
                "model": {"class_path": "dpo.training.dpo.DPO"},
                "data": {"class_path": "dpo.data.preferences.HHRLHF"},
                "optimizer": ADAMW,
            }
        )

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Add what `predict` alone takes."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_class_arguments(Predictions, None, skip={"run"}, instantiate=False)
        return parser

    def before_instantiate_classes(self) -> None:
        """Find the folder of the run and the checkpoint before anything is read or written."""
        config = self.config[self.subcommand]
        root, checkpoint = Path(config.trainer.default_root_dir), config.ckpt_path
        given = config.name or (checkpoint and owner(root, checkpoint))
        config.name = given or f"{datetime.now():%Y%m%d-%H%M%S}-seed{config.seed_everything}"
        hand_on([*sys.argv[1:], "--name", config.name])
        self.run = Run(root / config.name)
        if checkpoint in NAMED:
            checkpoint = self.run.checkpoints / f"{checkpoint}.ckpt"
        if checkpoint:
            config.ckpt_path = str(local_file(checkpoint))
        self.resume = bool(checkpoint) and owner(root, checkpoint) == config.name
        self.run.admit(str(self.subcommand), self.resume)
        if (config.trainer.max_epochs, config.trainer.max_steps, config.trainer.max_time) == (None, -1, None):
            config.trainer.max_epochs = 1

    def _parse_ckpt_path(self) -> None:
        """Nothing: options come from the command line and configurations, never out of a checkpoint."""

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Give the trainer what every run has, in front of what the user adds."""
        self.stop, self.log = Stop(), MetricsCSV(self.run.metrics)
        verb, theirs = str(self.subcommand), self.config_init[self.subcommand].trainer
        config = self.config[verb].clone()
        config.ckpt_path = None if self.resume else config.ckpt_path  # which of its own checkpoints it goes on from
        text = self._parser(verb).dump(config, skip_none=False)
        ours = callbacks(verb, config, text, self.run, self.datamodule, self.log, self.stop)
        trainer = super().instantiate_trainer(
            callbacks=ours + as_list(theirs.callbacks),
            plugins=[AtomicIO(), *as_list(theirs.plugins)],
            logger=self._loggers(theirs.logger),
            use_distributed_sampler=False,
            **kwargs,
        )
        check(trainer)
        rank_zero_info(f"Run: {self.run.folder}")
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """A fit has its folder for itself."""
        trains = subcommand == "fit" and self.trainer.is_global_zero
        with self.run.opened(self.resume) if trains else nullcontext():
            try:
                super()._run_subcommand(subcommand)
            finally:
                wandb.finish()  # before a folder that it writes into may be removed

    def _loggers(self, chosen: Logger | list[Logger] | bool | None) -> list[Logger]:
        """Metrics.csv of a fit and what the user chose; Weights & Biases where nothing was chosen."""
        if self.subcommand != "fit":
            return []
        default = chosen is None or chosen is True
        return [self.log, *([wandb_logger(self.run)] if default else as_list(chosen))]

    @rank_zero_only
    def _finish(self, stage: str) -> None:
        metrics = self.trainer.callback_metrics
        values = {name: value.item() for name, value in metrics.items() if name.startswith(f"{stage}/")}
        if values:
            self.run.update_results(values)

    def after_fit(self) -> None:
        """Write the table of results and the Hugging Face folder."""
        self._finish("val")
        if not self.trainer.is_global_zero:
            return
        rows = results.write(self.run)
        results.show(rows, f"Results of {self.run.folder.name}", results.remarks(self.run.metrics))
        folder = export(
            self.run,
            self.model.adapter.exported(self.model.policy),
            self.datamodule.tokenizer,
            base=self.model.policy_path,
            data=self.datamodule.path,
            story=self.model.story,
        )
        self.run.held_out.unlink(missing_ok=True)
        jsonl(self.run.held_out, self.datamodule.texts("val", HELD_OUT))
        print(f"Checkpoints: {self.run.checkpoints}\nHugging Face folder: {folder}")

    def after_validate(self) -> None:
        """Store and print the values."""
        self._finish("val")
        self._print("val")

    def after_test(self) -> None:
        """Store and print the values."""
        self._finish("test")
        self._print("test")

    @rank_zero_only
    def _print(self, stage: str) -> None:
        results.show_values({name: float(value) for name, value in self.trainer.callback_metrics.items()}, stage)


def tokenizer(policy: str, data: Any) -> str:
    """The policy's own.

    Raises:
        ValueError: Another one was chosen for the data.
    """
    given = data.init_args.tokenizer
    if given not in (QUICKSTART, policy):  # the default, and what was linked before
        raise ValueError(
            f"--data.tokenizer: expected none, got {given!r}: the tokenizer is the one that comes with --model.policy "
            f"({policy}). Leave the option out, or put the tokenizer's files into the policy's folder."
        )
    return policy


def as_list(value: Any) -> list[Any]:
    """What an option holds that takes nothing, one thing or several."""
    return value if isinstance(value, list) else [value] if value else []


def main(arguments: Sequence[str]) -> int:
    """Run a command line; with neither configuration nor model nor data named, the quickstart.

    Returns:
        Exit code: 0 done, 1 refused with a message, 130 or 143 stopped by a signal.
    """
    keep_freed_memory()
    keep_few_kernels()
    for message in NOISE.values():
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(word in record.getMessage() for word in CHATTER)
    )
    transformers.logging.disable_progress_bar()  # of loading and saving, beside ours
    hand_on(completed(arguments))
    try:
        cli = CLI(
            Stage,
            TextData,
            subclass_mode_model=True,
            parser_class=Parser,
            subclass_mode_data=True,
            save_config_callback=None,
            load_from_checkpoint_support=False,
            trainer_defaults=TRAINER,
            seed_everything_default=0,
        )
    except (ValueError, OSError, PreflightError, NonFinite, MisconfigurationException) as error:
        print(reason(error), file=sys.stderr)
        return 1
    except (KeyboardInterrupt, SystemExit) as end:  # Lightning exits with 1 after a Ctrl-C
        if isinstance(end.__context__ or end, KeyboardInterrupt):
            return 130
        raise
    return cli.stop.exit_code
