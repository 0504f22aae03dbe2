"""The conversion of a DPO configuration of TRL into this project's options, group by group.

What is not taken in one of the groups is left over at the end, and reported: nothing is dropped silently.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo.cli.peer_configs import PEER_LOSSES, PEER_REMARKS, to_trl_names
from dpo.cli.trl_options import DIVERGENCES, ROWS_BY_NAME, TRL_LOSSES

COPIED_OPTIONS = (
    "model_name_or_path",
    "trust_remote_code",
    "gradient_checkpointing",
    "torch_compile",
    "max_length",
    "logging_steps",
    "max_grad_norm",
    "full_determinism",
)
OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD", "rmsprop": "RMSprop", "adagrad": "Adagrad", "adafactor": "Adafactor"}
CLASS_SECTIONS = ("model", "data", "optimizer", "lr_scheduler")  # sections that are a class with `init_args`
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # YAML takes 5e-7 for text, every trainer for a number
_RUN_NAME = re.compile(r"(?!latest$)\w[\w.+-]*")


class Conversion:
    """A configuration on its way from TRL's options to those of this project.

    Attributes:
        given: What is still to be converted, by TRL's names.
        defaults: Values of the program that the configuration is for, where it gives none.
        config: The configuration here.
        remarks: What differs or could not be told.
    """

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any], devices: int, pairs: int | None) -> None:
        """Take the options that are given; null stands for an option that is not given."""
        self.given = {name: _as_number(value) for name, value in given.items() if value is not None}
        self.defaults = defaults
        self.devices, self.pairs = devices, pairs
        self.config: dict[str, Any] = {}
        self.remarks: list[str] = []
        self.set_class("model", "DPO")
        if "max_length" in given and given["max_length"] is None:
            self.remarks.append(f"max_length null: a limit is needed here, {defaults['max_length']} is taken.")

    def take(self, name: str, default: Any = None) -> Any:
        """Remove an option from those that are given, and return its value or its default."""
        return self.given.pop(name, self.defaults.get(name, default))

    def set_option(self, option: str, value: Any) -> None:
        """Set an option here by its dotted name."""
        section, _, name = option.partition(".")
        if not name:
            self.config[section] = value
        elif section in CLASS_SECTIONS:
            self.config[section].setdefault("init_args", {})[name] = value
        else:
            self.config.setdefault(section, {})[name] = value

    def set_class(self, section: str, class_path: str, **options: Any) -> None:
        """Set the class of a section."""
        self.config[section] = {"class_path": class_path} | ({"init_args": options} if options else {})

    def copy_options(self) -> None:
        """Copy options that mean the same and stand alone."""
        self.set_option("seed_everything", int(self.take("seed")))
        self.set_option("data.seed", self.config["seed_everything"])
        for name in COPIED_OPTIONS:
            if name in self.given or name in self.defaults:
                self.set_option(ROWS_BY_NAME[name].options, self.take(name))
        if "disable_tqdm" in self.given:
            self.set_option("trainer.enable_progress_bar", not self.take("disable_tqdm"))
        if self.given.pop("use_cpu", False):
            self.set_option("trainer.accelerator", "cpu")
        if self.given.get("train_sampling_strategy") in ("random", "sequential"):
            self.set_option("data.shuffle", self.take("train_sampling_strategy") == "random")

    def convert_precision(self) -> None:
        """Set the number format of the forward passes."""
        sixteen_bits, brain = self.given.pop("fp16", False), self.given.pop("bf16", None)
        if brain is None:
            brain = self.defaults["bf16"] and not sixteen_bits
        self.set_option("trainer.precision", "bf16-mixed" if brain else "16-mixed" if sixteen_bits else "32-true")

    def convert_adapter(self) -> None:
        """Set the adapter, if there is to be one."""
        if not self.given.pop("use_peft", False):
            return
        kind = "QLoRA" if self.given.pop("load_in_4bit", False) else "LoRA"
        rank = int(self.take("lora_r"))
        options = {"r": rank, "alpha": int(self.take("lora_alpha") or 2 * rank), "targets": self._adapter_targets()}
        self.set_option("model.adapter", {"class_path": kind, "init_args": options})
        dropout = self.take("lora_dropout")
        if dropout:
            self.remarks.append(f"lora_dropout {dropout}: adapters are trained without dropout here.")

    def _adapter_targets(self) -> list[str]:
        given = self.take("lora_target_modules")
        if given is None:
            self.remarks.append("lora_target_modules: TRL leaves the choice to peft; here it is every linear layer.")
        names = [part.strip() for name in _as_list(given or "all") for part in name.split(",")]
        return ["all-linear" if name == "all" else name for name in names]

    def convert_loss(self) -> None:
        """Set the loss from type, weights and modifiers."""
        names = self.take("loss_type", "sigmoid")
        losses = [self._one_loss(name) for name in _as_list(names)]
        for field in {field for name in _as_list(names) for field in self._used_fields(name)}:
            self.given.pop(field, None)
        weights = self.take("loss_weights", [1.0] * len(losses))
        if "pref_ftx" in self.given:
            losses, weights = [*losses, {"class_path": "NLL"}], [*weights, self.take("pref_ftx")]
        if len(losses) > 1 or weights != [1.0]:
            loss = {"class_path": "Sum", "init_args": {"losses": losses, "weights": weights}}
        else:
            (loss,) = losses
        if "ld_alpha" in self.given:
            loss = {"class_path": "LD", "init_args": {"loss": loss, "alpha": self.take("ld_alpha")}}
        if self.given.pop("use_weighting", False):
            loss = {"class_path": "WPO", "init_args": {"loss": loss}}
        self.set_option("model.loss", loss)

    def _one_loss(self, name: str) -> dict[str, Any]:
        known = TRL_LOSSES | PEER_LOSSES
        if name not in known:
            raise ValueError(f"loss_type: expected some of {', '.join(TRL_LOSSES)}, got {name!r}.")
        counterpart = known[name]
        defaults = {"beta": 0.1, "simpo_gamma": 0.5}
        values = {ours: self.given.get(theirs, defaults.get(theirs)) for ours, theirs in counterpart.fields.items()}
        if name == "robust" and values["label_smoothing"] is None:
            values["label_smoothing"] = 0.0  # TRL's default
        if name.startswith("aot"):
            self.set_option("data.max_tokens", None)
            self.remarks.append(f"{name}: TRL sorts each micro-batch, here the whole step is sorted at once.")
        if name == "sft":
            self.remarks.append(
                "sft: TRL takes the mean over the tokens of a micro-batch, here each answer counts alike."
            )
        values = {option: value for option, value in values.items() if value is not None}
        return {"class_path": counterpart.class_name, "init_args": values | self._divergence(name)}

    def _used_fields(self, loss_name: str) -> set[str]:
        """Return the options of TRL that a loss takes into account."""
        loss = (TRL_LOSSES | PEER_LOSSES)[loss_name]
        divergence = {"f_divergence_type"} if loss.takes_divergence else set()
        if divergence and self.given.get("f_divergence_type") == "alpha_divergence":
            divergence.add("f_alpha_divergence_coef")
        return set(loss.fields.values()) | divergence

    def _divergence(self, loss_name: str) -> dict[str, Any]:
        name = self.given.get("f_divergence_type", "reverse_kl")
        if name not in DIVERGENCES:
            raise ValueError(f"f_divergence_type: expected some of {', '.join(DIVERGENCES)}, got {name!r}.")
        used = self._used_fields(loss_name)
        if name == "reverse_kl" or "f_divergence_type" not in used:
            return {}
        alpha = {"init_args": {"alpha": self.given.get("f_alpha_divergence_coef", 0.5)}}
        options = alpha if "f_alpha_divergence_coef" in used else {}
        return {"divergence": {"class_path": DIVERGENCES[name], **options}}

    def convert_reference(self) -> None:
        """Set the reference, where it is not the policy before training."""
        model, is_cached = self.given.pop("ref_model", None), self.given.pop("precompute_ref_log_probs", False)
        if is_cached:
            of = {"init_args": {"of": {"class_path": "Model", "init_args": {"path": model}}}} if model else {}
            self.set_option("model.reference", {"class_path": "Cached"} | of)
        elif model:
            self.set_option("model.reference", model)
        if self.given.pop("sync_ref_model", False):
            if is_cached or model:
                raise ValueError(
                    "sync_ref_model: expected neither a precomputed reference nor another model beside it."
                )
            alpha, tau = self.take("ref_model_mixup_alpha", 0.6), self.take("ref_model_sync_steps", 512)
            self.set_option("model.reference", {"class_path": "Moving", "init_args": {"alpha": alpha, "tau": tau}})

    def convert_data(self) -> None:
        """Set where the pairs come from and how many make a step."""
        name = self.given.pop("dataset_name", None)
        parts = self.given.pop("datasets", None)
        path = name if parts is None else _dataset_parts(parts)
        self.set_class("data", "HHRLHF" if path == "Anthropic/hh-rlhf" else "PreferencePairs")
        if path:
            self.set_option("data.path", path)
        else:
            self.remarks.append("No files are named: add data.path (see `train.py fit --data.help PreferencePairs`).")
        for each in parts or ():
            self._report_dataset_keys(each)
        per_device, accumulated = self.take("per_device_train_batch_size"), self.take("gradient_accumulation_steps", 1)
        self.set_option("data.batch_size", int(per_device) * int(accumulated) * self.devices)
        self.remarks.append(
            f"data.batch_size counts the pairs of an optimizer step: {per_device} per device, times {accumulated} "
            f"accumulated, times {self.devices} device(s) (--devices)."
        )
        if "max_samples" in self.given:
            self.set_option("data.limit", int(self.take("max_samples")))

    def _report_dataset_keys(self, part: Mapping[str, Any]) -> None:
        others = {key: value for key, value in part.items() if key not in ("path", "fraction") and value is not None}
        if others:
            self.remarks.append(f"datasets: left out of {part.get('path')}: {one_line(others)}. See --data.columns.")

    def convert_length(self) -> None:
        """Set how long the run is, and the optimizer and its schedule, which depend on it."""
        steps = int(self.take("max_steps", -1))
        epochs = float(self.take("num_train_epochs")) if steps <= 0 else 0.0
        total = steps if steps > 0 else None
        if total is None and self.pairs is not None:
            total = math.ceil(math.ceil(self.pairs / self.config["data"]["init_args"]["batch_size"]) * epochs)
        if steps > 0:
            self.set_option("trainer.max_steps", steps)
        elif epochs.is_integer():
            self.set_option("trainer.max_epochs", int(epochs))
        elif total is not None:
            self.set_option("trainer.max_steps", total)
        else:
            self.set_option("trainer.max_epochs", math.ceil(epochs))
            self.remarks.append(f"num_train_epochs {epochs}: rounded up, as the number of pairs is unknown (--pairs).")
        self._convert_optimizer()
        self._convert_schedule(total)
        self._convert_validation(epochs, steps)

    def _convert_optimizer(self) -> None:
        asked = str(self.take("optim", "adamw_torch_fused"))
        kind = next((name for word, name in OPTIMIZERS.items() if word in asked), "AdamW")
        if asked not in ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad"):
            self.remarks.append(f"optim {asked}: torch.optim.{kind} in float32 stands for it.")
        self.set_class("optimizer", f"torch.optim.{kind}", lr=self.take("learning_rate"))
        self.set_option("optimizer.weight_decay", self.take("weight_decay", 0.0))
        if self.config["optimizer"]["init_args"]["weight_decay"]:
            self.remarks.append("weight_decay: TRL leaves biases and norms out, here all weights decay.")
        if kind == "AdamW":
            if {"adam_beta1", "adam_beta2"} & self.given.keys():
                self.set_option("optimizer.betas", [self.take("adam_beta1", 0.9), self.take("adam_beta2", 0.999)])
            if "adam_epsilon" in self.given:
                self.set_option("optimizer.eps", self.take("adam_epsilon"))

    def _convert_schedule(self, total: int | None) -> None:
        kind = str(self.take("lr_scheduler_type"))
        if kind == "constant":
            return
        warmup = self._warmup_options(total)
        if kind == "cosine" and total and not warmup["warmup_steps"]:
            self.set_class("lr_scheduler", "torch.optim.lr_scheduler.CosineAnnealingLR", T_max=total)
            return
        self.set_class("lr_scheduler", "Warmup", **warmup)
        if kind == "constant_with_warmup":
            return
        if total is None:
            self.remarks.append(
                f"lr_scheduler_type {kind}: the number of steps is unknown without --pairs, so the rate does not decay."
            )
            return
        self.set_option("lr_scheduler.total_steps", total)
        if kind != "linear":
            self.remarks.append(f"lr_scheduler_type {kind}: linear decay to 0 at the same step stands for it.")

    def _warmup_options(self, total: int | None) -> dict[str, int | float]:
        """Return the warm-up in steps, or as a share of all steps if that is given and their number is unknown."""
        warmup = float(self.take("warmup_steps", 0))
        if 0 < warmup < 1 and total is None:
            return {"warmup_ratio": warmup}
        return {"warmup_steps": math.ceil(warmup if warmup >= 1 else warmup * (total or 0))}

    def _convert_validation(self, epochs: float, steps: int) -> None:
        strategy = str(self.given.pop("eval_strategy", "no"))
        share = self.given.pop("test_split_size", None)
        if share is not None and share >= 1 and self.pairs:
            share /= self.pairs
        if share is not None and share < 1:
            self.set_option("data.val_fraction", float(share))
        elif share is not None:
            self.remarks.append(
                f"{share:g} validation pairs: a share is asked for here (--pairs), the default is taken."
            )
        elif strategy in ("no", "False"):
            self.set_option("data.val_fraction", 0.0)
        else:
            self.remarks.append(
                "Validation pairs are a share of the training rows here (data.val_fraction, 0.1 by default); the test "
                "split is measured by `train.py test`."
            )
        if strategy == "steps":
            every = self.take("eval_steps", self.config["trainer"].get("log_every_n_steps", 10))
            self._convert_interval(float(every), epochs, steps)

    def _convert_interval(self, every: float, epochs: float, steps: int) -> None:
        if every < 1 and steps <= 0:  # a share of all steps
            self.set_option("trainer.val_check_interval", min(1.0, every * epochs))
            return
        self.set_option("trainer.val_check_interval", max(1, round(every * steps if every < 1 else every)))
        self.set_option("trainer.check_val_every_n_epoch", None)

    def convert_names(self) -> None:
        """Set the name of the run, and the loggers."""
        folder, name = self.given.pop("output_dir", None), self.given.pop("run_name", None)
        name = str(name or Path(str(folder or "")).name)
        if _RUN_NAME.fullmatch(name):
            self.set_option("name", name)
        elif name:
            self.remarks.append(f"run_name {name!r}: not the name of a folder; the run is named by its date.")
        if folder:
            self.remarks.append(f"output_dir {folder}: the run is in runs/<name> (trainer.default_root_dir for runs).")
        loggers = _as_list(self.given.get("report_to", "wandb"))
        if loggers == ["none"]:
            self.set_option("trainer.logger", False)
        if set(loggers) <= {"none", "wandb", "all"}:
            self.given.pop("report_to", None)

    def list_left_out(self) -> list[str]:
        """Return a line for every option that has not been converted."""
        return [f"{name} ({one_line(value)}): {_reason(name)}" for name, value in self.given.items()]


def convert_config(
    given: Mapping[str, Any], devices: int = 1, pairs: int | None = None
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Convert a configuration.

    Args:
        given: Options of TRL, LLaMA-Factory or Axolotl.
        devices: Devices that the configuration was written for, over all machines.
        pairs: Number of training pairs, from which the number of steps follows.

    Returns:
        The configuration here; what differs or could not be told; what was left out.

    Raises:
        ValueError: It trains by something other than a preference loss, or names an unknown loss.
    """
    program, options, defaults = to_trl_names(given)
    conversion = Conversion(options, defaults, devices, pairs)
    conversion.convert_data()
    conversion.copy_options()
    conversion.convert_precision()
    conversion.convert_adapter()
    conversion.convert_loss()
    conversion.convert_reference()
    conversion.convert_length()
    conversion.convert_names()
    first = f"Converted from a configuration of {program}; docs/from_trl.md says what else differs."
    return conversion.config, [first, *conversion.remarks], conversion.list_left_out()


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _as_number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _dataset_parts(parts: Sequence[Mapping[str, Any]]) -> Any:
    """Return the path of a single data set, or the parts of a mixture by name."""
    paths = [part.get("path") for part in parts]
    if None in paths or not paths:
        return None
    if len(parts) == 1:
        return paths[0]
    shares = [{"share": part["fraction"]} if part.get("fraction") is not None else {} for part in parts]
    return {
        f"part{number}": {"path": path, **share}
        for number, (path, share) in enumerate(zip(paths, shares, strict=True), 1)
    }


def one_line(value: Any) -> str:
    """Return a value as text without line breaks."""
    return " ".join(str(value).split())


def _reason(name: str) -> str:
    row = ROWS_BY_NAME.get(name)
    if row is None:
        return PEER_REMARKS.get(name, "an unknown name: TRL 1.16 has no such option")
    return row.remark if not row.options else f"not converted: {row.remark or row.options}"
