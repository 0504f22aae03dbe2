"""Wrong command lines: each is refused in one last line that says what was expected, and leaves nothing behind."""

import os
import re
import shlex
from pathlib import Path

import pytest

from dpo.cli import main as cli

LOSSES = "--model.loss: expected one of AOT, AOTUnpaired, .*DPO, .*WPO, got "
SCHEDULES = "--lr_scheduler: expected one of ChainedScheduler, .*Warmup, got "
OPTIMIZERS = "--optimizer: expected one of ASGD, .*AdamW, .*SGD, .*got "
STRATEGY = "--trainer.strategy: expected auto, ddp or fsdp2, got "
METRICS = "expected one of val/loss, val/rewards/chosen, .*train/grad_norm"
NAME = "--name: expected a folder name without slashes or spaces, .*, got "
CALLBACKS = "--trainer.callbacks: expected a list .*EarlyStopping, .*ModelCheckpoint, .*got "


def no_option(option: str, here: str) -> str:
    """Return the answer to an option that has another name here."""
    return f"--{option}: there is no such option. Here it is {re.escape(here)}"


# One command line after `fit`, and what the last line of stderr says after "error: " (a regular expression).
REFUSED = {
    # Options that do not exist.
    "--trainer.max_stepz 3": r"--trainer.max_stepz: there is no such option. Did you mean --trainer.max_steps\b",
    "--trainer.acelerator cpu": "--trainer.acelerator: there is no such option. Did you mean --trainer.accelerator",
    "--trainr.max_steps 3": "--trainr.max_steps: there is no such option. Did you mean --trainer.max_steps",
    "--trainer.precison bf16": "--trainer.precison: .* Did you mean --trainer.precision",
    "--max_epochs 2": "--max_epochs: there is no such option. Did you mean --trainer.max_epochs",
    "--devices 2": "--devices: there is no such option. Did you mean --trainer.devices",
    "--policy gpt2": "--policy: there is no such option. Did you mean --model.policy",
    "--batch_size 4": "--batch_size: there is no such option. Did you mean --data.batch_size",
    "--batch-size 4": "--batch-size: there is no such option. Did you mean --data.batch_size",
    "--lr 1e-5": "--lr: there is no such option. Did you mean --optimizer.lr",
    "--loss IPO": "--loss: there is no such option. Did you mean --model.loss",
    "--qqqq 1": r"--qqqq: there is no such option\.$",
    "--scorer a:b": "--scorer: there is no such option",
    "quickstart": "expected options .*, got 'quickstart'",
    "--model.polcy x": "--model.polcy: DPO has no option 'polcy'. Did you mean policy",
    "--model.zzz 3": "--model.zzz: DPO has no option 'zzz'. It takes policy, loss, reference, adapter, ",
    "--model.lora_r 3": "--model.lora_r: DPO has no option 'lora_r'. Here it is --model.adapter.r .of --model.adapter",
    "--data.batchsize 3": "--data.batchsize: HHRLHF has no option 'batchsize'. Did you mean batch_size",
    "--data.columns.prompt q": "--data.columns: HHRLHF has no option 'columns'. 'columns' is taken by PreferencePairs",
    "--optimizer.learning_rate 1": "--optimizer.learning_rate: AdamW has no option .* Here it is --optimizer.lr",
    "--optimizer.momentum 0.9": "--optimizer.momentum: AdamW has no option 'momentum'. It takes lr, betas, eps, ",
    "--optimizer SGD --optimizer.betas [0.9,0.9]": "--optimizer.betas: SGD has no option 'betas'",
    "--model.loss IPO --model.loss.label_smoothing 0.1": "--model.loss.label_smoothing: IPO has no .* taken by AOT, ",
    "--model.loss.gamma 1": "--model.loss.gamma: DPO has no option 'gamma'. 'gamma' is taken by ",
    "--model.adapter LoRA --model.adapter.rank 8": "--model.adapter.rank: LoRA has no option 'rank'. It takes r, alpha",
    "--model SFT --model.loss IPO": "--model.loss: SFT has no option 'loss'. 'loss' is taken by DPO",
    "--model SFT --model.reference Copy": "--model.reference: SFT has no option 'reference'",
    "--lr_scheduler.warmup_stepz 1": "--lr_scheduler.warmup_stepz: Warmup has no .* Did you mean warmup_steps",
    "--model.reference.tau 0.1": "--model.reference.tau: expected --model.reference Moving before it, got none",
    # TRL's names.
    "--beta 0.1": no_option("beta", "--model.loss.beta."),
    "--learning_rate 1e-6": no_option("learning_rate", "--optimizer.lr."),
    "--learning-rate=1e-6": no_option("learning_rate", "--optimizer.lr."),
    "--max_length 512": no_option("max_length", "--data.max_length (of prompt and answer; what is cut differs)."),
    "--max_prompt_length 512": no_option("max_prompt_length", "--data.max_length (of prompt and answer together)."),
    "--per_device_train_batch_size 8": no_option("per_device_train_batch_size", "--data.batch_size (their product"),
    "--gradient_accumulation_steps 8": no_option("gradient_accumulation_steps", "--data.batch_size (their product"),
    "--num_train_epochs 3": no_option("num_train_epochs", "--trainer.max_epochs (1 here, 3 there"),
    "--output_dir out": no_option("output_dir", "--name (the run is runs/<name>)"),
    "--loss_type ipo": no_option("loss_type", "--model.loss (see the table of losses)"),
    "--model_name_or_path gpt2": no_option("model_name_or_path", "--model.policy."),
    "--dataset_name x/y": no_option("dataset_name", "--data.path (PreferencePairs, or HHRLHF"),
    "--bf16 true": no_option("bf16", "--trainer.precision (bf16-mixed"),
    "--warmup_ratio 0.1": no_option("warmup_ratio", "--lr_scheduler.warmup_ratio (with --lr_scheduler Warmup)."),
    "--lr_scheduler_type cosine": no_option("lr_scheduler_type", "--lr_scheduler (Warmup"),
    "--report_to wandb": no_option("report_to", "--trainer.logger (Weights & Biases by default"),
    "--run_name x": no_option("run_name", "--name (the run is runs/<name>)"),
    "--use_peft": no_option("use_peft", "--model.adapter (LoRA"),
    "--max_grad_norm 1": no_option("max_grad_norm", "--trainer.gradient_clip_val."),
    "--precompute_ref_log_probs": no_option("precompute_ref_log_probs", "--model.reference (Cached"),
    # Classes that do not exist, are abstract, of another kind, or lack an option.
    "--model KTO": "--model: expected one of DPO, SFT, got 'KTO'",
    "--model path": "--model: expected one of DPO, SFT, got 'path'",
    "--model DPOO": "--model: expected one of DPO, SFT, got 'DPOO'. Did you mean DPO",
    "--model Stage": "--model: expected one of DPO, SFT, got Stage, which is abstract",
    "--model ./policy/": "--model: .*The option for a path is --model.policy",
    "--data KTO": "--data: expected one of HHRLHF, PreferencePairs, Prompts, got 'KTO'",
    "--data pairs.jsonl": r"--data: expected a class such as PreferencePairs, got a file: --data\.path pairs\.jsonl\.",
    "--model.loss Foo": LOSSES + "'Foo'",
    "--model.loss simpo": LOSSES + "'simpo'. Did you mean SimPO",
    "--model.loss PreferenceLoss": LOSSES + "PreferenceLoss, which is abstract",
    "--model.loss dpo.losses.PreferenceLoss": LOSSES + r"PreferenceLoss, which is abstract .does not|.*__call__",
    "--model.loss nowhere.MyLoss": r"--model.loss: expected .* got 'nowhere.MyLoss', .* --allow-import nowhere\.",
    "--model.loss nowhere.MyLoss --allow-import nowhere": LOSSES + r"'nowhere.MyLoss' \(No module named 'nowhere'\)",
    "--allow-import a/b": "--allow-import: expected the name of a module, as in --allow-import my, got 'a/b'",
    "--model.loss dpo.losses.Mine": LOSSES + r"'dpo.losses.Mine' \(module 'dpo.losses' has no attribute 'Mine'\)",
    "--model.loss torch.nn.Linear": LOSSES + "'torch.nn.Linear'",
    "--model.loss Sum": "--model.loss: expected --model.loss.losses and --model.loss.weights, which Sum needs",
    "--model.loss LD": "--model.loss: expected --model.loss.loss, which LD needs, got none",
    "--model.loss WPO": "--model.loss: expected --model.loss.loss, which WPO needs, got none",
    "--model.loss LD --model.loss.loss Foo": "--model.loss.loss: expected one of AOT, .*got 'Foo'",
    "--model.loss.divergence KL": "--model.loss.divergence: expected one of Alpha, ForwardKL, .*got 'KL'",
    "--model.adapter lora": "--model.adapter: expected one of AsLoaded, LoRA, QLoRA, got 'lora'. Did you mean LoRA",
    "--model.adapter DoRA": "--model.adapter: expected one of AsLoaded, LoRA, QLoRA, got 'DoRA'. Did you mean LoRA",
    "--optimizer Adamm": OPTIMIZERS + "'Adamm'. Did you mean Adam",
    "--optimizer Lion": OPTIMIZERS + "'Lion'",
    "--optimizer adamw_torch": OPTIMIZERS + "'adamw_torch'",
    "--lr_scheduler cosine": SCHEDULES + "'cosine'. Did you mean CosineAnnealingLR",
    "--lr_scheduler linear": SCHEDULES + "'linear'. Did you mean LinearLR",
    "--lr_scheduler StepLR": "--lr_scheduler: expected --lr_scheduler.step_size, which StepLR needs, got none",
    "--lr_scheduler ReduceLROnPlateau": "--lr_scheduler: expected --lr_scheduler.monitor, which ReduceLR",
    "--trainer.callbacks EarlyStoping": CALLBACKS + "'EarlyStoping'. Did you mean EarlyStopping",
    "--trainer.callbacks EarlyStopping": "--trainer.callbacks: expected --trainer.callbacks.monitor, which Early",
    "--trainer.logger wandb": "--trainer.logger: expected .*CSVLogger, .*WandbLogger, got 'wandb'. Did you mean Wandb",
    # Values of another type.
    "--trainer.max_steps abc": "--trainer.max_steps: expected a whole number, got 'abc'",
    "--trainer.max_steps 2.5": "--trainer.max_steps: expected a whole number, got '2.5'",
    "--trainer.max_epochs two": "--trainer.max_epochs: expected a whole number, got 'two'",
    "--trainer.gradient_clip_val abc": "--trainer.gradient_clip_val: expected a number, got 'abc'",
    "--trainer.precision fp8": "--trainer.precision: expected one of 32-true, bf16-mixed, 16-mixed, got 'fp8'",
    "--trainer.max_epochs": "--trainer.max_epochs: expected a value after it, got none",
    "--optimizer.lr --name x": "--optimizer.lr: expected a value after it, got none",
    "--config": "--config: expected a value after it, got none",
    "--seed_everything abc": "--seed_everything: expected true or false or a whole number, got 'abc'",
    "--data.batch_size abc": "--data.batch_size: expected a whole number, got 'abc'",
    "--data.batch_size 4.5": "--data.batch_size: expected a whole number, got '4.5'",
    "--data.shuffle maybe": "--data.shuffle: expected true or false, got 'maybe'",
    "--data.subsets helpful-base": r"--data.subsets: expected a list .*got 'helpful-base'. Write '\[helpful-base\]'",
    "--data PreferencePairs --data.columns foo": "--data.columns: expected options, as in --data.columns.NAME VALUE",
    "--model.loss.beta abc": "--model.loss.beta: expected a number, got 'abc'",
    "--model.loss.beta 0,1": "--model.loss.beta: expected a number, got '0,1'",
    "--model.gradient_checkpointing maybe": "--model.gradient_checkpointing: expected true or false, got 'maybe'",
    "--model.adapter LoRA --model.adapter.r big": "--model.adapter.r: expected a whole number, got 'big'",
    "--optimizer.lr 1e-4x": "--optimizer.lr: expected a number, got '1e-4x'",
    "--optimizer.lr nan": "--optimizer.lr: expected a number, got 'nan'",
    "--optimizer.betas 3": "--optimizer.betas: expected a list .*got '3'",
    "--lr_scheduler.warmup_steps abc": "--lr_scheduler.warmup_steps: expected a whole number, got 'abc'",
    "--lr_scheduler.warmup_steps 0.1": "--lr_scheduler.warmup_steps: expected a whole number, got '0.1'",
    # Numbers out of their range, and with which nothing or nonsense is trained.
    "--trainer.gradient_clip_val -1": "--trainer.gradient_clip_val: expected a finite number of at least 0 .*, got -1",
    "--trainer.gradient_clip_val .nan": "--trainer.gradient_clip_val: expected a finite number .*got nan",
    "--trainer.limit_train_batches 0": "--trainer.limit_train_batches: expected a number above 0, got 0",
    "--trainer.limit_train_batches 0.0": "--trainer.limit_train_batches: expected a number above 0, got 0.0",
    "--trainer.limit_train_batches -1": "--trainer.limit_train_batches: expected a number above 0, got -1",
    "--trainer.accumulate_grad_batches 0": "--trainer.accumulate_grad_batches: expected a whole .* at least 1, got 0",
    "--trainer.accumulate_grad_batches -2": "--trainer.accumulate_grad_batches: expected a whole .* at least 1, got -2",
    "--trainer.log_every_n_steps 0": "--trainer.log_every_n_steps: expected a whole number of at least 1, got 0",
    "--trainer.max_steps 0": "--trainer.max_steps: expected a whole number of at least 1, or -1 for no limit, got 0",
    "--trainer.max_epochs 0": "--trainer.max_epochs: expected a whole number of at least 1, or -1 for no limit, got 0",
    "--trainer.max_epochs -5": "--trainer.max_epochs: .*got|.*You passed in -5",
    "--trainer.num_nodes 0": "--trainer.num_nodes: .*positive integer, but got 0",
    "--trainer.val_check_interval 2.5": "--trainer.val_check_interval: .*invalid value 2.5",
    "--optimizer.lr 0": "--optimizer.lr: expected a finite number above 0, got 0",
    "--optimizer.lr -1e-4": "--optimizer.lr: expected a finite number above 0, got -0.0001",
    "--optimizer.lr=-1": "--optimizer.lr: expected a finite number above 0, got -1",
    "--optimizer.lr .inf": "--optimizer.lr: expected a finite number above 0, got inf",
    "--optimizer.lr .nan": "--optimizer.lr: expected a finite number above 0, got nan",
    "--optimizer.weight_decay -0.1": "--optimizer.weight_decay: expected a finite number of at least 0, got -0.1",
    "--optimizer.betas [2,0.9]": "--optimizer: the optimizer refuses its options: Invalid beta parameter",
    "--lr_scheduler.warmup_ratio 0.1": "--lr_scheduler.warmup_ratio: expected either .* got 0.1 and 10. Set one",
    "--lr_scheduler.warmup_steps null --lr_scheduler.warmup_ratio 2": "--lr_scheduler.warmup_ratio: .*0 to 1, got 2",
    "--lr_scheduler.warmup_steps -3": "--lr_scheduler: expected 0 <= warmup_steps < total_steps, got warmup_steps -3",
    "--lr_scheduler.warmup_steps 500": "--lr_scheduler: expected 0 <= warmup_steps < total_steps, got .* 500, .* 170",
    "--data.batch_size 0": "--data.batch_size: expected at least 1 pair, got 0",
    "--data.max_length 3": "--data.max_length: expected at least 8 tokens, got 3",
    "--data.val_fraction 2": "--data.val_fraction: expected a share .*, got 2",
    "--model.loss.beta -1": r"--model.loss.beta: expected a number in \(0, inf\), got -1",
    "--model.loss.label_smoothing 2": r"--model.loss.label_smoothing: expected a number in \[0, 0.5\], got 2",
    # What is not supported.
    "--trainer.strategy ddp_spawn": STRATEGY + "ddp_spawn",
    "--trainer.strategy ddp_notebook": STRATEGY + "ddp_notebook",
    "--trainer.strategy ddp_fork": STRATEGY + "ddp_fork",
    "--trainer.strategy xla": STRATEGY + "xla",
    "--trainer.strategy fsdp": STRATEGY + "fsdp",
    "--trainer.strategy deepspeed": STRATEGY + "deepspeed",
    "--trainer.strategy zero": STRATEGY + "zero",
    "--trainer.precision 64": "--trainer.precision: expected 32-true, bf16-mixed or 16-mixed, got 64",
    "--trainer.accelerator gpuu": "--trainer.accelerator: .*'gpuu'.* Available names are: .*cpu",
    "--trainer.devices 0": "--trainer.devices: .*'0'",
    "--trainer.max_time abc": "--trainer.max_time: .*'abc'.*DD:HH:MM:SS",
    "--trainer.callbacks EarlyStopping --trainer.callbacks.monitor val_loss": (
        f"--trainer.callbacks: EarlyStopping watches 'val_loss', {METRICS}.* Did you mean val/loss"
    ),
    "--trainer.callbacks ModelCheckpoint --trainer.callbacks.monitor accuracy": (
        f"--trainer.callbacks: ModelCheckpoint watches 'accuracy', {METRICS}"
    ),
    "--name a/b": NAME + "'a/b'",
    "--name 'my run'": NAME + "'my run'",
    "--name latest": NAME + "'latest'",
    "--name ..": NAME + "'..'",
    "--ckpt_path nothing": "--ckpt_path: expected last, best or a checkpoint file on this machine, got nothing",
    "--ckpt_path last": "--ckpt_path: expected last, best or a checkpoint file",
    # Configurations.
    "--config missing.yaml": "--config: expected a file, got 'missing.yaml', which is none",
    "--config empty.yaml": r"--config: expected options \(name: value\), got empty.yaml, which is empty",
    "--config list.yaml": r"--config: expected options \(name: value\), got list.yaml, which holds a list",
    "--config text.yaml": r"--config: expected options \(name: value\), got text.yaml, which holds a str",
    "--config syntax.yaml": "--config: expected YAML, got syntax.yaml: .*line 2",
    "--config class.yaml": r"--model.los: DPO has no option 'los'. Did you mean loss\? \(In class.yaml.\)",
    "--config value.yaml": r"--trainer.max_steps: expected a whole number, got 'many'. \(In value.yaml.\)",
    "--config root.yaml": "trainr.max_steps: there is no such option. Did you mean --trainer.max_steps",
}
FILES = {
    "empty.yaml": "",
    "list.yaml": "- a\n- b\n",
    "text.yaml": "hello\n",
    "syntax.yaml": "model:\n  a: [1, 2\nb: }\n",
    "class.yaml": "model:\n  class_path: DPO\n  init_args: {los: IPO}\n",
    "value.yaml": "trainer: {max_steps: many}\n",
    "root.yaml": "trainr: {max_steps: 3}\n",
}
LOGGED = re.compile("Seed set to|INFO: |Left out: ")  # what is logged before a refusal


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with faulty configurations, where a command line that is accepted fails the test."""
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setattr(cli.TrainingCLI, "_run_subcommand", lambda *_: pytest.fail("accepted"))
    return tmp_path


def test_there_are_enough_wrong_command_lines() -> None:
    assert len(REFUSED) >= 120


@pytest.mark.parametrize("line", REFUSED)
def test_a_wrong_command_line_is_refused_in_one_last_line(
    folder: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    try:
        code = cli.main(["fit", *shlex.split(line)])
    except SystemExit as end:
        code = end.code
    assert code in (1, 2)
    message = capsys.readouterr().err
    lines = [each for each in message.splitlines() if not LOGGED.match(each)]
    assert len(lines) <= 3
    assert re.match(f"error: (?:{REFUSED[line]})", lines[-1]), lines[-1]
    assert "Traceback" not in message and "Union" not in message and not re.search(r"\b[A-Z]\w+Error\b", message)
    assert sorted(os.listdir(folder)) == sorted(FILES)
