"""What the options of TRL 1.16's `trl dpo` are called here: one table for `docs/from_trl.md` and for `dpo from-trl`.

The table has a row for every field of TRL's `DPOConfig`, and for those fields of `ModelConfig`, `ScriptArguments` and
`DatasetMixtureConfig` that the same YAML file may contain. A test holds it complete.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class OptionRow:
    """Options of TRL that belong together, and what stands for them here.

    Attributes:
        names: TRL's names, separated by spaces.
        options: Options here, separated by spaces; empty if there is none.
        remark: How the value is translated, or why there is no option; empty if the value is simply copied.
    """

    names: str
    options: str = ""
    remark: str = ""


OPTION_SECTIONS: dict[str, tuple[OptionRow, ...]] = {
    "Model": (
        OptionRow("model_name_or_path", "model.policy"),
        OptionRow("trust_remote_code", "model.trust_remote_code"),
        OptionRow("gradient_checkpointing", "model.gradient_checkpointing"),
        OptionRow("torch_compile", "model.compile", "compiles every layer"),
        OptionRow("bf16 fp16", "trainer.precision", "`bf16-mixed` (TRL's default), `16-mixed` or `32-true`"),
        OptionRow("use_peft", "model.adapter", "`LoRA`; `QLoRA` together with `load_in_4bit`"),
        OptionRow("lora_r", "model.adapter.r", "of `--model.adapter LoRA`"),
        OptionRow("lora_alpha", "model.adapter.alpha", "of `--model.adapter LoRA`"),
        OptionRow(
            "lora_target_modules", "model.adapter.targets", "TRL: what peft names for the model; here all-linear"
        ),
        OptionRow("load_in_4bit", "model.adapter", "`QLoRA`: nf4 with nested quantization"),
    ),
    "Data": (
        OptionRow("dataset_name", "data.path", "`PreferencePairs`, or `HHRLHF` for Anthropic/hh-rlhf"),
        OptionRow("datasets", "data.path", "several parts by name; `fraction` is the share of a part"),
        OptionRow("test_split_size", "data.val_fraction", "share of the training rows"),
        OptionRow("max_length", "data.max_length", "of prompt and answer; what is cut differs"),
        OptionRow(
            "per_device_train_batch_size gradient_accumulation_steps",
            "data.batch_size",
            "their product times the number of devices: pairs per optimizer step",
        ),
        OptionRow("train_sampling_strategy", "data.shuffle", "`random` or `sequential`"),
    ),
    "Loss and reference": (
        OptionRow("loss_type", "model.loss", "see the table of losses"),
        OptionRow("loss_weights", "model.loss.weights", "of `Sum`"),
        OptionRow("beta", "model.loss.beta"),
        OptionRow(
            "label_smoothing", "model.loss.label_smoothing", "used by exo_pair, robust, aot and aot_unpaired only"
        ),
        OptionRow("discopop_tau", "model.loss.tau", "used by discopop only"),
        OptionRow("f_divergence_type", "model.loss.divergence", "`ReverseKL`, `ForwardKL`, `JensenShannon` or `Alpha`"),
        OptionRow("f_alpha_divergence_coef", "model.loss.divergence.alpha", "used by alpha_divergence only"),
        OptionRow("ld_alpha", "model.loss.alpha", "of `LD` around the loss"),
        OptionRow("use_weighting", "model.loss", "`WPO` around the loss"),
        OptionRow("precompute_ref_log_probs", "model.reference", "`Cached`: one file for all later runs"),
        OptionRow("sync_ref_model", "model.reference", "`Moving`"),
        OptionRow("ref_model_mixup_alpha", "model.reference.alpha", "used with sync_ref_model only"),
        OptionRow("ref_model_sync_steps", "model.reference.tau", "used with sync_ref_model only"),
    ),
    "Optimizer and schedule": (
        OptionRow("optim", "optimizer", "any class of torch.optim"),
        OptionRow("learning_rate", "optimizer.lr"),
        OptionRow("weight_decay", "optimizer.weight_decay", "TRL leaves biases and norms out; here all weights decay"),
        OptionRow("adam_beta1 adam_beta2", "optimizer.betas", "of Adam and its kin only"),
        OptionRow("adam_epsilon", "optimizer.eps", "of Adam and its kin only"),
        OptionRow("max_grad_norm", "trainer.gradient_clip_val"),
        OptionRow("lr_scheduler_type", "lr_scheduler", "`Warmup` (constant or linear) or a class of torch.optim"),
        OptionRow("warmup_steps", "lr_scheduler.warmup_steps", "a number of steps; TRL takes a share, too"),
    ),
    "Length, validation and logging": (
        OptionRow("num_train_epochs", "trainer.max_epochs", "1 here, 3 there; no effect beside max_steps"),
        OptionRow("max_steps", "trainer.max_steps"),
        OptionRow("seed", "seed_everything data.seed", "0 here, 42 there; the order of pairs differs anyway"),
        OptionRow("eval_strategy", "trainer.val_check_interval data.val_fraction", "`no`: 0 pairs are held out"),
        OptionRow("eval_steps", "trainer.val_check_interval", "used with eval_strategy `steps` only"),
        OptionRow("logging_steps", "trainer.log_every_n_steps"),
        OptionRow("report_to", "trainer.logger", "Weights & Biases by default; `none`: metrics.csv only"),
        OptionRow("output_dir run_name", "name", "the run is `runs/<name>`"),
        OptionRow("disable_tqdm", "trainer.enable_progress_bar"),
        OptionRow("use_cpu", "trainer.accelerator", "`cpu`"),
        OptionRow("full_determinism", "trainer.deterministic"),
    ),
    "Done in another way": (
        OptionRow("data_seed", remark="`data.seed`, which the converter takes from `seed`"),
        OptionRow(
            "resume_from_checkpoint",
            remark="`--ckpt_path last` with the run's config.yaml, or `auto`",
        ),
        OptionRow("do_train do_eval do_predict", remark="the verbs fit, validate, test and predict"),
        OptionRow(
            "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
            remark="`python -m dpo push` uploads a finished run",
        ),
        OptionRow(
            "save_only_model save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint",
            remark="see `--checkpoint.every_n_steps`, `every_minutes` and `keep`; every validation saves, too",
        ),
        OptionRow(
            "load_best_model_at_end metric_for_best_model greater_is_better",
            remark="the export holds the last weights; see `--checkpoint.monitor` and `mode` for best.ckpt",
        ),
        OptionRow("eval_on_start", remark="`train.py validate --name before`: before training every reward is 0"),
        OptionRow("project", remark="`WANDB_PROJECT` names the project of Weights & Biases; by default it is `dpo`"),
        OptionRow(
            "dataset_config dataset_train_split dataset_test_split",
            remark="a pattern in data.path (`owner/name/data/train-*`); files named test are the test split",
        ),
        OptionRow(
            "optim_args lr_scheduler_kwargs", remark="options of the class: `--optimizer.NAME`, `--lr_scheduler.NAME`"
        ),
        OptionRow(
            "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend "
            "ddp_timeout",
            remark="a `DDPStrategy` with these arguments, as `--trainer.strategy`",
        ),
    ),
    "Always so": (
        OptionRow("disable_dropout", remark="policy and reference never use dropout"),
        OptionRow("lora_dropout", remark="adapters are trained without dropout"),
        OptionRow("bnb_4bit_quant_type use_bnb_nested_quant", remark="nf4, nested"),
        OptionRow("lora_task_type", remark="a causal language model"),
        OptionRow("padding_free pad_to_multiple_of pad_token", remark="nothing is padded"),
        OptionRow(
            "eval_do_concat_batches eval_accumulation_steps batch_eval_metrics", remark="metrics are sums and counts"
        ),
        OptionRow(
            "per_device_eval_batch_size precompute_ref_batch_size", remark="a pass has at most `data.max_tokens` tokens"
        ),
        OptionRow("auto_find_batch_size", remark="lower `data.max_tokens`: memory changes, numbers do not"),
        OptionRow("average_tokens_across_devices", remark="losses are means over the pairs of a step, on all devices"),
        OptionRow("dataset_streaming streaming", remark="rows are read where they are and tokenised once"),
        OptionRow(
            "dataset_num_proc remove_unused_columns label_names length_column_name", remark="rows are tokenised once"
        ),
        OptionRow("logging_nan_inf_filter", remark="a loss that is not finite ends the run"),
        OptionRow(
            "include_num_input_tokens_seen include_for_metrics prediction_loss_only", remark="all metrics are logged"
        ),
        OptionRow(
            "use_cache use_liger_kernel liger_kernel_config", remark="the scorer never makes a tensor of all logits"
        ),
        OptionRow("restore_callback_states_from_checkpoint", remark="resuming restores everything"),
        OptionRow(
            "logging_strategy logging_first_step log_on_each_node", remark="one row per `trainer.log_every_n_steps`"
        ),
        OptionRow(
            "dataloader_drop_last dataloader_in_order", remark="every pair is seen in every epoch, in the drawn order"
        ),
    ),
    "Not here": (
        OptionRow(
            "fsdp fsdp_config deepspeed parallelism_config",
            remark="every device holds the whole model; see `trainer.strategy`",
        ),
        OptionRow("accelerator_config local_rank", remark="Lightning starts and places the processes"),
        OptionRow(
            "activation_checkpointing activation_checkpointing_kwargs", remark="use `model.gradient_checkpointing`"
        ),
        OptionRow("gradient_checkpointing_kwargs", remark="checkpointing has no options"),
        OptionRow("activation_offloading torch_empty_cache_steps", remark="activations stay on the device"),
        OptionRow("torch_compile_backend torch_compile_mode", remark="torch's defaults"),
        OptionRow("bf16_full_eval fp16_full_eval", remark="validation has the precision of training"),
        OptionRow("tf32", remark="torch's default"),
        OptionRow("load_in_8bit bnb_4bit_quant_storage", remark="weights of 4 bits (`QLoRA`) or of 32"),
        OptionRow(
            "model_init_kwargs model_revision dtype attn_implementation", remark="float32 weights, own attention"
        ),
        OptionRow(
            "lora_target_parameters lora_modules_to_save use_rslora use_dora", remark="plain LoRA on layers only"
        ),
        OptionRow("optim_target_modules", remark="all trainable weights share one optimizer"),
        OptionRow("neftune_noise_alpha label_smoothing_factor", remark="they change the supervised loss, not DPO's"),
        OptionRow("router_aux_loss_coef", remark="no loss that balances experts"),
        OptionRow("truncation_mode", remark="the oldest turns go first"),
        OptionRow("eval_delay eval_use_gather_object", remark="validation begins with the first interval"),
        OptionRow("ignore_data_skip", remark="resuming never repeats or skips a pair"),
        OptionRow(
            "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
            "dataloader_multiprocessing_context",
            remark="tokens are memory-mapped; collating them takes no worker",
        ),
        OptionRow("log_level log_level_replica debug skip_memory_metrics", remark="Python's logging"),
        OptionRow("trackio_space_id trackio_bucket_id trackio_static_space_id", remark="no Trackio"),
        OptionRow("ignore_bias_buffers", remark="not needed"),
    ),
}
ROWS_BY_NAME: dict[str, OptionRow] = {
    name: row for rows in OPTION_SECTIONS.values() for row in rows for name in row.names.split()
}


@dataclass(frozen=True)
class LossCounterpart:
    """The class that stands for one of TRL's loss types.

    Attributes:
        class_name: Class of `dpo.losses`.
        fields: TRL's field for every option of the class, without the divergence.
        takes_divergence: Whether the class takes a divergence.
    """

    class_name: str
    fields: dict[str, str]
    takes_divergence: bool = False


_BETA = {"beta": "beta"}
_SMOOTHED = {"beta": "beta", "label_smoothing": "label_smoothing"}
TRL_LOSSES: dict[str, LossCounterpart] = {
    "sigmoid": LossCounterpart("DPO", _BETA, True),
    "hinge": LossCounterpart("Hinge", _BETA, True),
    "ipo": LossCounterpart("IPO", _BETA, True),
    "exo_pair": LossCounterpart("EXO", _SMOOTHED, True),
    "nca_pair": LossCounterpart("NCA", _BETA),
    "robust": LossCounterpart("RobustDPO", _SMOOTHED, True),
    "bco_pair": LossCounterpart("BCO", _BETA),
    "sppo_hard": LossCounterpart("SPPO", _BETA),
    "aot": LossCounterpart("AOT", _SMOOTHED),
    "aot_unpaired": LossCounterpart("AOTUnpaired", _SMOOTHED),
    "apo_zero": LossCounterpart("APOZero", _BETA),
    "apo_down": LossCounterpart("APODown", _BETA),
    "discopop": LossCounterpart("DiscoPOP", {"beta": "beta", "tau": "discopop_tau"}, True),
    "sft": LossCounterpart("NLL", {}),
    "sigmoid_norm": LossCounterpart("LengthNormalizedDPO", _BETA, True),
}
DIVERGENCES = {
    "reverse_kl": "ReverseKL",
    "forward_kl": "ForwardKL",
    "js_divergence": "JensenShannon",
    "alpha_divergence": "Alpha",
}
