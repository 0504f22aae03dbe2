"""The command line of fit, validate, test and predict: the folder of a run, and what happens around each verb."""

import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse.typing import extend_base_type
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, LRSchedulerTypeTuple
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from dpo.callbacks.checkpoints import CheckpointCadence
from dpo.callbacks.defaults import standard_callbacks
from dpo.callbacks.ending import ending_lines, stopped_lines
from dpo.callbacks.ledger import LedgerOptions, check_ledger_stage
from dpo.callbacks.monitors import check_monitored_metrics
from dpo.callbacks.pair_groups import PairGroups
from dpo.callbacks.predictions import PredictionWriter
from dpo.callbacks.process_watch import ProcessWatch, replace_process_watch
from dpo.callbacks.slow_work import SlowWork
from dpo.callbacks.stopping import GracefulStop
from dpo.cli.imports import limit_imports, refuse_functions, split_allowed_modules
from dpo.cli.parser import set_argv
from dpo.cli.report import report_line
from dpo.data.datamodule import PairData
from dpo.files import append_jsonl
from dpo.models.checkpoint_io import AtomicCheckpointIO, local_checkpoint, newest_intact_checkpoint
from dpo.models.cpu import keep_freed_memory
from dpo.models.sharding import gather_model
from dpo.runs import results
from dpo.runs.card import TrainingFacts, hardware_in_words
from dpo.runs.export import export_run
from dpo.runs.folder import Run, checkpoint_run_name
from dpo.runs.groups import groups_as_json, print_groups
from dpo.runs.loggers import MetricsCSV, read_metrics
from dpo.runs.signals import RUN_SIGNALS, StoppedBySignal
from dpo.runs.trackers import join_run, log_report, log_results
from dpo.runs.tracking import WandbTracker, finish_wandb, track_results
from dpo.secrets import MASK, PASSWORD_VARIABLE, change_texts, conceal, hide_address, secret_options
from dpo.training.base import Stage
from dpo.training.memory import is_out_of_memory, out_of_memory_message
from dpo.training.schedules import ADAMW_OPTIONS
from dpo.training.sft import SFT
from dpo.training.sharding import check_sharding_options
from dpo.training.trainer_checks import check_strategy_name, check_trainer_support, check_training_options

HELD_OUT_PAIRS = 50  # validation pairs stored as text, which the server shows as examples


def _check_run_name(_: type, name: str) -> None:
    if not re.match(r"(?!latest$)\w[\w.+-]*$", name):
        raise ValueError(
            "expected a folder name without slashes or spaces, not `latest` (letters, digits, _ and, after the first "
            f"character, .+-), got {name!r}"
        )


RunName = extend_base_type("Name", str, _check_run_name, "Name of a run's folder.", register_key=("Name", str))
AUTO = "auto"  # of --ckpt_path: go on if there is something to go on from
DEFAULT_OPTIMIZER = {"class_path": "torch.optim.AdamW", "init_args": ADAMW_OPTIONS}


class TrainingCLI(LightningCLI):
    """Lightning's command line, whose verbs work in the folder of one run.

    Attributes:
        run: The run.
        is_resuming: Whether the verb starts from one of the run's own checkpoints.
        may_restart: Whether a run that was ended before its first checkpoint begins again.
        metrics_csv: The logger that writes metrics.csv.
        pair_groups: The callback that keeps the pairs of a validation or test.
        slow_work: The callback that says what the verb is doing.
        wandb_tracker: The logger for Weights & Biases, if it is used.
        config_text: The verb's options as YAML, with all defaults.
    """

    model: Stage
    datamodule: PairData
    run: Run
    is_resuming: bool
    may_restart: bool
    metrics_csv: MetricsCSV
    pair_groups: PairGroups
    slow_work: SlowWork
    wandb_tracker: WandbTracker | None = None
    config_text: str

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of run name, optimizer and schedule, and the default classes."""
        parser.add_argument(
            "--name",
            type=RunName | None,
            default=None,
            help="Name of the run: its folder is runs/<name>. Default: date and seed.",
        )
        parser.add_optimizer_args((torch.optim.Optimizer,), link_to="model.init_args.optimizer")
        parser.add_lr_scheduler_args(LRSchedulerTypeTuple, link_to="model.init_args.lr_scheduler")
        parser.set_defaults(
            {"model": {"class_path": "dpo.DPO"}, "data": {"class_path": "dpo.HHRLHF"}, "optimizer": DEFAULT_OPTIMIZER}
        )

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Add the options of checkpoints, and those that only ``predict`` takes."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        # Every verb reads the config.yaml of a fit, which has these.
        parser.add_class_arguments(CheckpointCadence, "checkpoint", instantiate=False)
        parser.add_class_arguments(LedgerOptions, "ledger", instantiate=False)
        if subcommand in ("validate", "test"):
            parser.set_defaults(verbose=False)  # Lightning's own table of what is printed here
        if subcommand == "predict":
            parser.add_class_arguments(PredictionWriter, None, skip={"run"}, instantiate=False)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line, which alone decides what may be imported (see `dpo.cli.imports`)."""
        words, modules = split_allowed_modules(sys.argv[1:])
        limit_imports(modules)
        self.config = parser.parse_args(words)
        refuse_functions(self.config[self.config.subcommand], modules)
        change_texts(self.config[self.config.subcommand].data, hide_address)
        for name in (
            name for options, key, name in secret_options(self.config[self.config.subcommand]) if options[key] == MASK
        ):
            raise ValueError(f"--{name}: a secret, which config.yaml does not hold: give it again, after --config.")

    def before_instantiate_classes(self) -> None:
        """Determine the run's folder and the checkpoint before anything is read or written.

        Raises:
            ValueError: The checkpoint is not a local file, or the run does not allow the verb, or options of the
                trainer are not supported.
        """
        config = self.config[self.subcommand]
        self._check_options(config.trainer)
        root = Path(config.trainer.default_root_dir)
        checkpoint = config.ckpt_path
        name = config.name
        if checkpoint and checkpoint != AUTO:
            name = name or checkpoint_run_name(root, checkpoint)
        config.name = name or f"{datetime.now():%Y%m%d-%H%M%S}-seed{config.seed_everything}"
        set_argv([*sys.argv[1:], "--name", config.name])
        self.run = Run(root / config.name)
        for options in as_list(config.trainer.logger):
            join_run(options, self.run)
        self.may_restart = checkpoint == AUTO
        path = self._checkpoint_path(checkpoint, named=bool(name)) if checkpoint else None
        config.ckpt_path = path and str(path)
        self.is_resuming = path is not None and checkpoint_run_name(root, path) == config.name
        self.run.check_verb_allowed(str(self.subcommand), self.is_resuming)

    def _check_options(self, trainer: Any) -> None:
        """Refuse options that the verb does not take; train one epoch where nothing says how long."""
        if self.subcommand != "fit" and any(word.startswith("--checkpoint.") for word in sys.argv):
            raise ValueError(f"--checkpoint: expected none, as {self.subcommand} saves no checkpoints.")
        if self.subcommand != "fit" and names_ledger_option():
            raise ValueError(f"--ledger: expected none, as only fit writes a ledger, not {self.subcommand}.")
        check_strategy_name(trainer.strategy)
        if self.subcommand == "fit":
            check_training_options(trainer)
        if (trainer.max_epochs, trainer.max_steps, trainer.max_time) == (None, -1, None):
            trainer.max_epochs = 1

    def _checkpoint_path(self, checkpoint: str, named: bool) -> Path | None:
        """Return the file behind ``--ckpt_path``; None if ``auto`` finds nothing to go on from."""
        if checkpoint == AUTO:
            checkpoint = self._checkpoint_to_go_on_from(named) or ""
        if checkpoint == "last":
            return newest_intact_checkpoint(self.run.checkpoint_folder / "last.ckpt")
        if checkpoint == "best":
            return local_checkpoint(self.run.checkpoint_folder / "best.ckpt")
        return local_checkpoint(checkpoint) if checkpoint else None

    def _checkpoint_to_go_on_from(self, named: bool) -> str | None:
        """Return ``last`` if the run has a checkpoint, for ``--ckpt_path auto``.

        Raises:
            ValueError: The run is not named, or another verb than fit asks.
        """
        if self.subcommand != "fit" or not named:
            raise ValueError(
                "--ckpt_path auto: expected fit and the --name of the run, which goes on if it has a checkpoint and "
                "begins otherwise."
            )
        return "last" if any(self.run.checkpoint_folder.glob("last*.ckpt")) else None

    def _parse_ckpt_path(self) -> None:
        """Do nothing: options come from the command line and configurations, never from a checkpoint."""

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Return a trainer with the callbacks, plugins and loggers of every run, followed by those of the user.

        Raises:
            ValueError: The trainer's precision or strategy is not supported, a callback watches a metric that
                there is not, or the verb cannot use the data.
        """
        self.metrics_csv = MetricsCSV(self.run.metrics_path)
        self.slow_work = SlowWork()
        verb = str(self.subcommand)
        user_options = self.config_init[verb].trainer
        check_user_callbacks(as_list(user_options.callbacks))
        config = self.config[verb].clone()
        if self.is_resuming:  # config.yaml stays the same whichever of its own checkpoints a run resumes from
            config.ckpt_path = None
        for options, key, _ in secret_options(config):
            options[key] = MASK
        change_texts(config, conceal)
        self.config_text = self._parser(verb).dump(config, skip_none=False)
        callbacks = standard_callbacks(
            verb, config, self.config_text, self.run, self.datamodule, self.metrics_csv, GracefulStop()
        )
        self.pair_groups = next(each for each in callbacks if isinstance(each, PairGroups))
        if verb == "fit":
            check_ledger_stage(self.model, LedgerOptions(**vars(config.ledger)), names_ledger_option())
            check_monitored_metrics([*callbacks, *as_list(user_options.callbacks)], self.model)
        trainer = super().instantiate_trainer(
            callbacks=[ProcessWatch(), self.slow_work, *callbacks, *as_list(user_options.callbacks)],
            plugins=[AtomicCheckpointIO(), *_slurm_plugins(as_list(user_options.plugins))],
            logger=self._loggers(user_options.logger),
            use_distributed_sampler=False,
            **kwargs,
        )
        check_trainer_support(trainer)  # already here, before data and models are read
        check_sharding_options(trainer, self.model, self.datamodule)
        if trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        replace_process_watch(trainer)
        rank_zero_info(f"Run: {self.run.folder}")
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the verb; a fit locks its folder."""
        trains = subcommand == "fit" and self.trainer.is_global_zero
        with self.run.lock_folder(self.is_resuming, self.may_restart) if trains else nullcontext():
            if self.trainer.is_global_zero:
                self.slow_work.begin("Reading the data")
            try:
                super()._run_subcommand(subcommand)
            except StoppedBySignal:
                if trains:
                    print(stopped_lines(self.run, RUN_SIGNALS.number), flush=True)
                raise
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise ValueError(out_of_memory_message(error, self.model, self.datamodule)) from error
            finally:  # before the folder is removed if the run was refused
                self.slow_work.end()
                if self.wandb_tracker is not None:
                    self.wandb_tracker.finish()
                else:
                    finish_wandb()  # of a logger of the user

    def _loggers(self, chosen: Logger | list[Logger] | bool | None) -> list[Logger]:
        """Return the loggers of a fit: metrics.csv and those of the user, by default Weights & Biases."""
        if self.subcommand != "fit":
            return []
        if chosen is None or chosen is True:
            chosen = self.wandb_tracker = WandbTracker(self.run)
        return [self.metrics_csv, *as_list(chosen)]

    def _store_metrics(self, stage: str) -> dict[str, float]:
        """Write the metrics of a stage into results.json, and return them; those of other data under another key."""
        metrics = self.trainer.callback_metrics
        values = {name: value.item() for name, value in metrics.items() if name.startswith(f"{stage}/")}
        if values:
            other = self.run.other_data(self.config_text) if self.subcommand != "fit" else ""
            stored = {name.replace(stage, f"{stage}[{other}]", 1): value for name, value in values.items()}
            groups = {f"{stage}_groups{f'[{other}]' if other else ''}": groups_as_json(self.pair_groups.measure())}
            self.run.update_results((stored if other else values) | groups)
            if other:
                print(f"Other data than the run's own ({other}): stored as {stage}[{other}]/... in results.json.")
        return values

    def after_fit(self) -> None:
        """Write results, the Hugging Face folder, the held-out pairs and the report, and print where they are."""
        policy = gather_model(self.model.policy)
        if not self.trainer.is_global_zero:
            return
        print(ending_lines(self.trainer, self.run, RUN_SIGNALS.number))
        if "://" in self.config_text and MASK in self.config_text:
            print(f"{self.run.config_path} holds no passwords: to go on, set {PASSWORD_VARIABLE}.")
        self._store_metrics("val")
        rows = results.write_results(self.run)
        remarks = results.results_remarks(self.run.metrics_path)
        results.print_results(rows, f"Results of {self.run.folder.name}", remarks)
        self.slow_work.begin("Exporting the policy")
        folder = export_run(
            self.run,
            self.model.adapter.model_to_export(policy),
            self.datamodule.tokenizer,
            self.model.origin(),
            data=self.datamodule.path,
            card_summary=self.model.card_summary,
            facts=TrainingFacts(
                method="sft" if isinstance(self.model, SFT) else "dpo",
                pair_count=len(self.datamodule.pairs_by_split["train"]),
                validation_pairs=self._validation_pairs(),
                data_sha256=self.datamodule.store_folder.name.rpartition("-")[2],
                hardware=hardware_in_words(self.trainer.strategy.root_device, self.trainer.world_size),
            ),
        )
        self.run.held_out_path.unlink(missing_ok=True)
        append_jsonl(self.run.held_out_path, self.datamodule.example_texts("val", HELD_OUT_PAIRS))
        self.slow_work.begin("Writing the report")
        report = report_line(self.run)
        for logger in self.trainer.loggers:
            log_report(logger, self.run.report_path)
        self.slow_work.end()
        print(f"Checkpoints: {self.run.checkpoint_folder}\nHugging Face folder: {folder}\n{report}")

    def _validation_pairs(self) -> int | None:
        """Return the number of validation pairs; None if there are none, or only some are measured."""
        pairs = self.datamodule.pairs_by_split.get("val")
        return len(pairs) if pairs is not None and self.trainer.limit_val_batches == 1.0 else None

    @rank_zero_only
    def _report(self, stage: str) -> None:
        values = self._store_metrics(stage)
        results.print_metric_values(values, stage)
        print_groups(self.pair_groups.measure())
        chosen = self.config_init[self.subcommand].trainer.logger
        if chosen in (None, True):
            track_results(self.run, values)
        elif stage == "test":
            rows = read_metrics(self.run.metrics_path)
            for logger in as_list(chosen):
                log_results(logger, values, int(rows[-1]["step"]) if rows else 0)

    def after_validate(self) -> None:
        """Store and print the metrics of the validation pairs."""
        self._report("val")

    def after_test(self) -> None:
        """Store and print the metrics of the test pairs."""
        self._report("test")


def names_ledger_option() -> bool:
    """Return whether the command line names an option of the ledger."""
    return any(word.startswith("--ledger.") for word in sys.argv)


def check_user_callbacks(callbacks: Sequence[L.Callback]) -> None:
    """Refuse callbacks that replace the weights behind the back of checkpoints, validation and export.

    Raises:
        ValueError: There is one.
    """
    for callback in callbacks:
        if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
            raise ValueError(
                f"--trainer.callbacks: expected none that averages weights, got {type(callback).__name__}: last.ckpt, "
                "best.ckpt and the validations would be those of other weights than the export. Leave it out."
            )


def _slurm_plugins(chosen: list[Any]) -> list[Any]:
    """Return the plugins of the user and, under SLURM, the one that leaves saving and requeueing to us."""
    if not SLURMEnvironment.detect() or any(isinstance(plugin, ClusterEnvironment) for plugin in chosen):
        return chosen
    return [SLURMEnvironment(auto_requeue=False), *chosen]


def as_list(value: Any) -> list[Any]:
    """Return the value of an option that takes nothing, one value or a list, as a list."""
    return value if isinstance(value, list) else [value] if value else []
