"""The entrance of `train.py`: which classes can be chosen, what is not shown, and exit codes."""

import logging
import sys
import warnings
from collections.abc import Sequence

import transformers
from lightning.fabric.utilities.exceptions import MisconfigurationException

from dpo.cli.own_data import choose_data_class
from dpo.cli.parser import HintingParser, complete_arguments, error_message, set_argv
from dpo.cli.training_cli import TrainingCLI
from dpo.data.datamodule import TextData
from dpo.data.preferences import HHRLHF, PreferencePairs
from dpo.data.prompts import Prompts
from dpo.models.cpu import grow_cuda_segments, limit_onednn_cache
from dpo.runs.signals import RUN_SIGNALS, StoppedBySignal
from dpo.secrets import conceal_outputs, hide_address
from dpo.training.base import Stage
from dpo.training.dpo import DPO
from dpo.training.nonfinite import NonFiniteError
from dpo.training.precomputed import Cached
from dpo.training.preflight import PreflightError
from dpo.training.schedules import Warmup
from dpo.training.sft import SFT
from dpo.training.sharding import FSDP2

# Patterns of warnings about what is intended here.
IGNORED_WARNINGS = (
    "Found .* module.s. in eval mode",  # policy and reference train without dropout
    "Precision .* is not supported by the model summary",  # the summary is used for its number of parameters only
    "The .* does not have many workers",  # collating a step takes far less time than training on it
    "You have overridden `on_before_batch_transfer`",  # losses check their pairs before these move to the device
    ".*treespec, LeafSpec.*",  # deprecated in torch, used by Lightning
    "The number of training batches .* smaller than the logging",  # the last steps are logged at the end of the run
    "Checkpoint directory .* exists and is not empty",  # a ModelCheckpoint of the user writes beside last.ckpt
)
# "stopped" names max_epochs whatever stopped the training; `ending_lines` says it right.
IGNORED_LOG_WORDS = ("litlogger", "GPU available", "TPU available", "`Trainer.fit` stopped")
# The command line finds classes by their short name only if they are imported.
SHORT_NAMES = (DPO, SFT, HHRLHF, PreferencePairs, Prompts, Cached, Warmup, FSDP2)
TRAINER_DEFAULTS = {
    "default_root_dir": "runs",
    "log_every_n_steps": 10,
    "gradient_clip_val": 1.0,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}


def main(arguments: Sequence[str], cli_class: type[TrainingCLI] | None = None) -> int:
    """Run a training command line; a ``fit`` that names no configuration, policy or data trains the quickstart.

    Args:
        arguments: Verb and options.
        cli_class: What is done with them; training by default.

    Returns:
        Exit code: 0 done, 1 refused with a message, 130 or 143 stopped by a signal.
    """
    conceal_outputs()
    limit_onednn_cache()
    grow_cuda_segments()
    for pattern in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", pattern)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(word in record.getMessage() for word in IGNORED_LOG_WORDS)
    )
    transformers.logging.disable_progress_bar()  # of loading and saving; training has its own
    try:
        with RUN_SIGNALS:
            set_argv(choose_data_class(complete_arguments([hide_address(word) for word in arguments])))
            (cli_class or TrainingCLI)(
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
        print(f"error: {error_message(error)}", file=sys.stderr)
        return 1
    except StoppedBySignal as end:
        return int(str(end.code))
    except (KeyboardInterrupt, SystemExit) as end:  # Lightning exits with 1 after a Ctrl-C
        if isinstance(end.__context__ or end, KeyboardInterrupt):
            return 130
        raise
    return RUN_SIGNALS.exit_code
