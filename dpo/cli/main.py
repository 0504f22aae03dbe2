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

from dpo.callbacks.defaults import standard_callbacks
from dpo.callbacks.predictions import PredictionWriter
from dpo.callbacks.stopping import GracefulStop
from dpo.cli.parser import HintingParser, add_quickstart_config, error_message, set_argv
from dpo.data.datamodule import QUICKSTART_NAME, TextData
from dpo.data.preferences import HHRLHF, PreferencePairs
from dpo.data.prompts import Prompts
from dpo.files import append_jsonl
from dpo.models.cpu import keep_freed_memory, limit_onednn_cache
from dpo.runs import results
from dpo.runs.checkpoint_io import AtomicCheckpointIO, local_checkpoint
from dpo.runs.export import export_run
from dpo.runs.folder import NAMED_CHECKPOINTS, Run, checkpoint_run_name
from dpo.runs.loggers import MetricsCSV, wandb_logger
from dpo.training.base import Stage, check_trainer_support
from dpo.training.dpo import DPO
from dpo.training.nonfinite import NonFiniteError
from dpo.training.precomputed import Cached
from dpo.training.preflight import PreflightError
from dpo.training.schedules import Warmup
from dpo.training.sft import SFT

IGNORED_WARNINGS = {  # what Lightning says about things that are as they should be here
    "policy and reference are in eval mode by design (dropout off)": "Found .* module.s. in eval mode",
    "the summary counts parameters": "Precision .* is not supported by the model summary",
    "collating a step takes far less time than training on it": "The .* does not have many workers",
    "a loss looks at its pairs before they are moved": "You have overridden `on_before_batch_transfer`",
    "torch and Lightning": ".*treespec, LeafSpec.*",
    "what is left at the end of a run is logged there": "The number of training batches .* smaller than the logging",
}
IGNORED_LOG_WORDS = ("litlogger", "GPU available", "TPU available")
# Imported here, so that the command line knows them by their last name.
SHORT_NAMES = (DPO, SFT, HHRLHF, PreferencePairs, Prompts, Cached, Warmup)
HELD_OUT_PAIRS = 50  # validation pairs that are stored as text, for whoever serves the run
RunName = restricted_string_type("Name", r"^(?!latest$)\w[\w.+-]*$", docstring="A folder name other than latest.")
DEFAULT_OPTIMIZER = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-6, "weight_decay": 0.0}}
TRAINER_DEFAULTS = {
    "default_root_dir": "runs",
    "log_every_n_steps": 10,
    "gradient_clip_val": 1.0,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}


class TrainingCLI(LightningCLI):
    """Lightning's command line around one `Run`."""

    run: Run
    is_resuming: bool
    graceful_stop: GracefulStop
    metrics_csv: MetricsCSV

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the name of the run and what follows from other options."""
        parser.add_argument(
            "--name",
            type=RunName | None,
            default=None,
            help="Name of the run: its folder is runs/<name>. Default: date and seed.",
        )
        parser.link_arguments(("model.init_args.policy", "data"), "data.init_args.tokenizer", policy_tokenizer)
        parser.link_arguments("model", "data.init_args.answers", lambda model: model.answer_sides, apply_on="instantiate")
        parser.add_optimizer_args((torch.optim.Optimizer,), link_to="model.init_args.optimizer")
        parser.add_lr_scheduler_args(LRSchedulerTypeTuple, link_to="model.init_args.lr_scheduler")
        parser.set_defaults(
            {
                "model": {"class_path": "dpo.training.dpo.DPO"},
                "data": {"class_path": "dpo.data.preferences.HHRLHF"},
                "optimizer": DEFAULT_OPTIMIZER,
            }
        )

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Add what `predict` alone takes."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_class_arguments(PredictionWriter, None, skip={"run"}, instantiate=False)
        return parser

    def before_instantiate_classes(self) -> None:
        """Find the folder of the run and the checkpoint before anything is read or written."""
        config = self.config[self.subcommand]
        root, checkpoint = Path(config.trainer.default_root_dir), config.ckpt_path
        given = config.name or (checkpoint and checkpoint_run_name(root, checkpoint))
        config.name = given or f"{datetime.now():%Y%m%d-%H%M%S}-seed{config.seed_everything}"
        set_argv([*sys.argv[1:], "--name", config.name])
        self.run = Run(root / config.name)
        if checkpoint in NAMED_CHECKPOINTS:
            checkpoint = self.run.checkpoint_folder / f"{checkpoint}.ckpt"
        if checkpoint:
            config.ckpt_path = str(local_checkpoint(checkpoint))
        self.is_resuming = bool(checkpoint) and checkpoint_run_name(root, checkpoint) == config.name
        self.run.check_verb_allowed(str(self.subcommand), self.is_resuming)
        if (config.trainer.max_epochs, config.trainer.max_steps, config.trainer.max_time) == (None, -1, None):
            config.trainer.max_epochs = 1

    def _parse_ckpt_path(self) -> None:
        """Nothing: options come from the command line and configurations, never out of a checkpoint."""

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Give the trainer what every run has, in front of what the user adds."""
        self.graceful_stop, self.metrics_csv = GracefulStop(), MetricsCSV(self.run.metrics_path)
        verb, theirs = str(self.subcommand), self.config_init[self.subcommand].trainer
        config = self.config[verb].clone()
        config.ckpt_path = (
            None if self.is_resuming else config.ckpt_path
        )  # which of its own checkpoints it goes on from
        text = self._parser(verb).dump(config, skip_none=False)
        ours = standard_callbacks(verb, config, text, self.run, self.datamodule, self.metrics_csv, self.graceful_stop)
        trainer = super().instantiate_trainer(
            callbacks=ours + as_list(theirs.callbacks),
            plugins=[AtomicCheckpointIO(), *as_list(theirs.plugins)],
            logger=self._loggers(theirs.logger),
            use_distributed_sampler=False,
            **kwargs,
        )
        check_trainer_support(trainer)
        rank_zero_info(f"Run: {self.run.folder}")
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """A fit has its folder for itself."""
        trains = subcommand == "fit" and self.trainer.is_global_zero
        with self.run.lock_folder(self.is_resuming) if trains else nullcontext():
            try:
                super()._run_subcommand(subcommand)
            finally:
                wandb.finish()  # before a folder that it writes into may be removed

    def _loggers(self, chosen: Logger | list[Logger] | bool | None) -> list[Logger]:
        """Metrics.csv of a fit and what the user chose; Weights & Biases where nothing was chosen."""
        if self.subcommand != "fit":
            return []
        default = chosen is None or chosen is True
        return [self.metrics_csv, *([wandb_logger(self.run)] if default else as_list(chosen))]

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
        rows = results.write_results(self.run)
        results.print_results(
            rows, f"Results of {self.run.folder.name}", results.results_remarks(self.run.metrics_path)
        )
        folder = export_run(
            self.run,
            self.model.adapter.exported(self.model.policy),
            self.datamodule.tokenizer,
            base=self.model.policy_path,
            data=self.datamodule.path,
            card_summary=self.model.story,
        )
        self.run.held_out_path.unlink(missing_ok=True)
        append_jsonl(self.run.held_out_path, self.datamodule.texts("val", HELD_OUT_PAIRS))
        print(f"Checkpoints: {self.run.checkpoint_folder}\nHugging Face folder: {folder}")

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
        results.print_metric_values(
            {name: float(value) for name, value in self.trainer.callback_metrics.items()}, stage
        )


def policy_tokenizer(policy: str, data: Any) -> str:
    """The policy's own.

    Raises:
        ValueError: Another one was chosen for the data.
    """
    given = data.init_args.tokenizer
    if given not in (QUICKSTART_NAME, policy):  # the default, and what was linked before
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
    limit_onednn_cache()
    for message in IGNORED_WARNINGS.values():
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(word in record.getMessage() for word in IGNORED_LOG_WORDS)
    )
    transformers.logging.disable_progress_bar()  # of loading and saving, beside ours
    set_argv(add_quickstart_config(arguments))
    try:
        cli = TrainingCLI(
            Stage,
            TextData,
            subclass_mode_model=True,
            parser_class=HintingParser,
            subclass_mode_data=True,
            save_config_callback=None,
            load_from_checkpoint_support=False,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
        )
    except (ValueError, OSError, PreflightError, NonFiniteError, MisconfigurationException) as error:
        print(error_message(error), file=sys.stderr)
        return 1
    except (KeyboardInterrupt, SystemExit) as end:  # Lightning exits with 1 after a Ctrl-C
        if isinstance(end.__context__ or end, KeyboardInterrupt):
            return 130
        raise
    return cli.graceful_stop.exit_code
