"""DPO configurations of LLaMA-Factory and Axolotl in the words of TRL, which both train with.

What means the same in TRL gets its name there. Everything else keeps its own name, so that it is reported.
"""

from collections.abc import Mapping
from typing import Any

from dpo.cli.trl_options import LossCounterpart

TRL_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "max_length": 1024,
    "learning_rate": 1e-6,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "linear",
    "bf16": True,
    "gradient_checkpointing": True,
    "seed": 42,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
}
LLAMA_FACTORY_DEFAULTS: dict[str, Any] = TRL_DEFAULTS | {
    "max_length": 2048,
    "learning_rate": 5e-5,
    "bf16": False,
    "lora_r": 8,
    "lora_alpha": None,
    "lora_dropout": 0.0,
    "lora_target_modules": "all",
}
AXOLOTL_DEFAULTS: dict[str, Any] = TRL_DEFAULTS | {
    "per_device_train_batch_size": 1,
    "max_length": 512,
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "gradient_checkpointing": False,
    "lora_dropout": 0.0,
}

LLAMA_FACTORY_NAMES = {
    "pref_beta": "beta",
    "pref_loss": "loss_type",
    "dpo_label_smoothing": "label_smoothing",
    "cutoff_len": "max_length",
    "val_size": "test_split_size",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "warmup_ratio": "warmup_steps",
}
AXOLOTL_NAMES = {
    "base_model": "model_name_or_path",
    "rl_beta": "beta",
    "dpo_beta": "beta",
    "dpo_loss_type": "loss_type",
    "dpo_loss_weights": "loss_weights",
    "dpo_use_weighting": "use_weighting",
    "dpo_label_smoothing": "label_smoothing",
    "micro_batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "optimizer": "optim",
    "lr_scheduler": "lr_scheduler_type",
    "sequence_len": "max_length",
    "val_set_size": "test_split_size",
    "wandb_name": "run_name",
    "warmup_ratio": "warmup_steps",
}
PEER_LOSSES: dict[str, LossCounterpart] = {
    "smoothed": LossCounterpart("DPO", {"beta": "beta", "label_smoothing": "label_smoothing"}, True),
    "orpo": LossCounterpart("ORPO", {"beta": "beta"}),
    "simpo": LossCounterpart("SimPO", {"beta": "beta", "gamma": "simpo_gamma"}),
}
"""Losses of LLaMA-Factory that TRL does not have."""

PEER_REMARKS: dict[str, str] = {
    "dataset": "a name in LLaMA-Factory's dataset_info.json: give its file as data.path",
    "eval_dataset": "the validation pairs are a share of the training rows, data.val_fraction",
    "template": "the chat template of the tokenizer is used (data.format)",
    "chat_template": "the chat template of the tokenizer is used (data.format)",
    "special_tokens": "those of the tokenizer are used",
    "model_type": "read from the model",
    "tokenizer_type": "read from the model",
    "max_prompt_length": "only data.max_length is limited: the oldest turns go first",
    "plot_loss": "the curves are in metrics.csv and in Weights & Biases",
    "overwrite_cache": "tokens are found again by what made them",
    "dataset_prepared_path": "tokens are in $DPO_CACHE",
    "preprocessing_num_workers": "rows are tokenised once",
    "overwrite_output_dir": "a run is never overwritten: choose another --name, or remove its folder",
    "saves_per_epoch": "see `--checkpoint.every_n_steps`, `every_minutes` and `keep`; every validation saves, too",
    "flash_attention": "prompts are shared by an attention of this project",
    "sample_packing": "a pass holds as many pairs as fit data.max_tokens, nothing is padded",
    "pad_to_sequence_len": "nothing is padded",
    "pref_bco_weight": "`Sum` with `BCO`, which has no running mean here",
    "rpo_alpha": "`Sum` with `NLL`",
    "early_stopping_patience": "Lightning's `EarlyStopping` in trainer.callbacks, on val/loss",
    "quantization_bit": "weights of 4 bits (`QLoRA`) or of 32",
    "wandb_project": "`WANDB_PROJECT` names the project of Weights & Biases; by default it is `dpo`",
}
"""Why options of LLaMA-Factory, Axolotl and earlier versions of TRL have no counterpart."""


def to_trl_names(given: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return whose configuration this is, its options by TRL's names, and the defaults of that program.

    Raises:
        ValueError: It is a configuration of another stage than DPO.
    """
    if {"stage", "finetuning_type", "pref_beta", "pref_loss", "cutoff_len"} & given.keys():
        return "LLaMA-Factory", _from_llama_factory(given), LLAMA_FACTORY_DEFAULTS
    if {"rl", "base_model", "micro_batch_size"} & given.keys():
        return "Axolotl", _from_axolotl(given), AXOLOTL_DEFAULTS
    options = dict(given)
    _rename(options, {"warmup_ratio": "warmup_steps", "torch_dtype": "dtype"})
    return "TRL", options, TRL_DEFAULTS


def _rename(options: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename options that are given, unless the new name is given, too."""
    for old, new in names.items():
        if options.get(old) is not None and options.get(new) is None:
            options[new] = options.pop(old)


def _from_llama_factory(given: Mapping[str, Any]) -> dict[str, Any]:
    options = dict(given)
    stage = options.pop("stage", "dpo")
    if stage != "dpo":
        raise ValueError(f"stage: expected dpo, got {stage!r}; only preference training is converted.")
    _rename(options, LLAMA_FACTORY_NAMES)
    if options.get("loss_type", "sigmoid") == "sigmoid" and "label_smoothing" in options:
        options["loss_type"] = "smoothed"  # there the sigmoid loss is smoothed, in TRL it is not
    if options.setdefault("finetuning_type", "lora") != "full":  # LoRA is the default there
        _use_adapter(options, "finetuning_type", {"lora": False})
    else:
        options.pop("finetuning_type")
    if options.get("quantization_bit") == 4:
        options["load_in_4bit"] = bool(options.pop("quantization_bit"))
    if "disable_gradient_checkpointing" in options:
        options["gradient_checkpointing"] = not options.pop("disable_gradient_checkpointing")
    return options


def _from_axolotl(given: Mapping[str, Any]) -> dict[str, Any]:
    options = dict(given)
    kind = options.pop("rl", None)
    if kind not in ("dpo", "ipo"):
        raise ValueError(f"rl: expected dpo or ipo, got {kind!r}; only preference training is converted.")
    if kind == "ipo":
        options.setdefault("dpo_loss_type", "ipo")
    _rename(options, AXOLOTL_NAMES)
    _use_adapter(options, "adapter", {"lora": False, "qlora": True})
    if options.get("lora_target_linear"):
        options.pop("lora_target_linear")
        options["lora_target_modules"] = "all-linear"
    if options.get("evals_per_epoch"):
        epochs = float(options.get("num_train_epochs", AXOLOTL_DEFAULTS["num_train_epochs"]))
        options |= {"eval_strategy": "steps", "eval_steps": 1 / (options.pop("evals_per_epoch") * epochs)}
    return options


def _use_adapter(options: dict[str, Any], name: str, kinds: Mapping[str, bool]) -> None:
    """Replace the kind of an adapter by TRL's switches; a kind that TRL has no switch for stays and is reported.

    Args:
        options: The options, which are changed.
        name: Option that names the kind.
        kinds: Whether the weights below the adapter have 4 bits, by kind.
    """
    if options.get(name) in kinds:
        four_bits = kinds[options.pop(name)]
        options |= {"use_peft": True} | ({"load_in_4bit": True} if four_bits else {})
