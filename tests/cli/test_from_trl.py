"""docs/from_trl.md and `python -m dpo from-trl`: nothing of TRL's options is missing, and nothing is dropped."""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo import __main__ as verbs
from dpo import losses
from dpo.cli.compare import flatten_options
from dpo.cli.trl_conversion import convert_config
from dpo.cli.trl_options import DIVERGENCES, OPTION_SECTIONS, ROWS_BY_NAME, TRL_LOSSES
from tests.support.runs import ROOT, Lab
from tests.support.trl_document import loss_table, option_tables

DOCUMENT = (ROOT / "docs" / "from_trl.md").read_text(encoding="utf-8")
TRL = """
model_name_or_path: quickstart
dataset_name: trl-lib/ultrafeedback_binarized
dtype: bfloat16
learning_rate: 5e-7
beta: 0.01
loss_type: [sigmoid, bco_pair, sft]
loss_weights: [0.8, 0.2, 1.0]
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
num_train_epochs: 1
warmup_ratio: 0.1
lr_scheduler_type: linear
eval_strategy: steps
eval_steps: 50
logging_steps: 25
precompute_ref_log_probs: true
output_dir: out/zephyr
use_peft: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0
lora_target_modules: [q_proj, v_proj]
push_to_hub: true
hub_model_id:
"""
LLAMA_FACTORY = """
model_name_or_path: quickstart
trust_remote_code: true
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.2
pref_loss: sigmoid
dpo_label_smoothing: 0.1
pref_ftx: 0.5
dataset: dpo_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
val_size: 0.1
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
"""
AXOLOTL = """
base_model: quickstart
rl: dpo
rl_beta: 0.3
datasets:
  - path: owner/first
    type: chatml.intel
  - path: owner/second
load_in_4bit: true
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_target_linear: true
sequence_len: 4096
val_set_size: 0.05
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 4
max_steps: 100
evals_per_epoch: 2
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: true
flash_attention: true
wandb_project:
"""
PEFT = {"use_peft": True}
STEPS = {"max_steps": 10}
# What else is given, a TRL option and its value, and what has to come out of it.
CONVERTED: list[tuple[dict[str, Any], str, Any, dict[str, Any]]] = [
    ({}, "model_name_or_path", "owner/model", {"model.policy": "owner/model"}),
    ({}, "trust_remote_code", True, {"model.trust_remote_code": True}),
    ({}, "gradient_checkpointing", False, {"model.gradient_checkpointing": False}),
    ({}, "torch_compile", True, {"model.compile": True}),
    ({}, "bf16", False, {"trainer.precision": "32-true"}),
    ({}, "fp16", True, {"trainer.precision": "16-mixed"}),
    ({}, "use_peft", True, {"model.adapter": "LoRA", "model.adapter.r": 16, "model.adapter.alpha": 32}),
    (PEFT, "lora_r", 4, {"model.adapter.r": 4}),
    (PEFT, "lora_alpha", 5, {"model.adapter.alpha": 5}),
    (PEFT, "lora_target_modules", "all-linear", {"model.adapter.targets": ["all-linear"]}),
    (PEFT, "load_in_4bit", True, {"model.adapter": "QLoRA"}),
    ({}, "dataset_name", "Anthropic/hh-rlhf", {"data": "HHRLHF", "data.path": "Anthropic/hh-rlhf"}),
    ({}, "datasets", [{"path": "owner/pairs"}], {"data": "PreferencePairs", "data.path": "owner/pairs"}),
    ({}, "test_split_size", 0.25, {"data.val_fraction": 0.25}),
    ({}, "max_length", 99, {"data.max_length": 99}),
    ({}, "per_device_train_batch_size", 3, {"data.batch_size": 3}),
    ({}, "gradient_accumulation_steps", 3, {"data.batch_size": 24}),
    ({}, "train_sampling_strategy", "sequential", {"data.shuffle": False}),
    ({}, "loss_type", "ipo", {"model.loss": "IPO", "model.loss.beta": 0.1}),
    ({"loss_type": ["hinge", "sft"]}, "loss_weights", [1, 2], {"model.loss": "Sum", "model.loss.weights": [1, 2]}),
    ({}, "beta", 0.5, {"model.loss.beta": 0.5}),
    ({"loss_type": "robust"}, "label_smoothing", 0.2, {"model.loss.label_smoothing": 0.2}),
    ({"loss_type": "discopop"}, "discopop_tau", 0.1, {"model.loss": "DiscoPOP", "model.loss.tau": 0.1}),
    ({}, "f_divergence_type", "forward_kl", {"model.loss.divergence": "ForwardKL"}),
    (
        {"f_divergence_type": "alpha_divergence"},
        "f_alpha_divergence_coef",
        0.7,
        {"model.loss.divergence": "Alpha", "model.loss.divergence.alpha": 0.7},
    ),
    ({}, "ld_alpha", 0.3, {"model.loss": "LD", "model.loss.alpha": 0.3, "model.loss.loss": "DPO"}),
    ({}, "use_weighting", True, {"model.loss": "WPO", "model.loss.loss": "DPO"}),
    ({}, "precompute_ref_log_probs", True, {"model.reference": "Cached"}),
    ({}, "sync_ref_model", True, {"model.reference": "Moving", "model.reference.tau": 512}),
    ({"sync_ref_model": True}, "ref_model_mixup_alpha", 0.5, {"model.reference.alpha": 0.5}),
    ({"sync_ref_model": True}, "ref_model_sync_steps", 7, {"model.reference.tau": 7}),
    ({}, "optim", "sgd", {"optimizer": "SGD", "optimizer.lr": 1e-6}),
    ({}, "learning_rate", "5e-7", {"optimizer.lr": 5e-7}),
    ({}, "weight_decay", 0.1, {"optimizer.weight_decay": 0.1}),
    ({}, "adam_beta1", 0.8, {"optimizer.betas": [0.8, 0.999]}),
    ({}, "adam_beta2", 0.8, {"optimizer.betas": [0.9, 0.8]}),
    ({}, "adam_epsilon", 1e-6, {"optimizer.eps": 1e-6}),
    ({}, "max_grad_norm", 0.5, {"trainer.gradient_clip_val": 0.5}),
    (STEPS, "lr_scheduler_type", "cosine", {"lr_scheduler": "CosineAnnealingLR", "lr_scheduler.T_max": 10}),
    (STEPS, "warmup_steps", 0.2, {"lr_scheduler": "Warmup", "lr_scheduler.warmup_steps": 2}),
    ({}, "num_train_epochs", 2, {"trainer.max_epochs": 2}),
    ({}, "max_steps", 10, {"trainer.max_steps": 10, "lr_scheduler.total_steps": 10}),
    ({}, "seed", 7, {"seed_everything": 7, "data.seed": 7}),
    ({"test_split_size": 0.1}, "eval_strategy", "steps", {"trainer.val_check_interval": 10}),
    ({"eval_strategy": "steps"}, "eval_steps", 50, {"trainer.val_check_interval": 50}),
    ({}, "logging_steps", 5, {"trainer.log_every_n_steps": 5}),
    ({}, "report_to", "none", {"trainer.logger": False}),
    ({}, "output_dir", "out/zephyr", {"name": "zephyr"}),
    ({}, "run_name", "mine", {"name": "mine"}),
    ({}, "disable_tqdm", True, {"trainer.enable_progress_bar": False}),
    ({}, "use_cpu", True, {"trainer.accelerator": "cpu"}),
    ({}, "full_determinism", True, {"trainer.deterministic": True}),
]
WITHOUT_OPTION = [name for name, row in ROWS_BY_NAME.items() if not row.options]


def options_of(given: dict[str, Any], **more: Any) -> dict[str, Any]:
    return dict(flatten_options(convert_config(given, **more)[0]))


def test_every_option_of_trl_is_in_one_row() -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed (extra peers)")
    from trl.scripts.utils import DatasetMixtureConfig

    classes = (trl.DPOConfig, trl.ModelConfig, trl.ScriptArguments, DatasetMixtureConfig)
    fields = sorted({field.name for cls in classes for field in dataclasses.fields(cls)})
    names = [name for rows in OPTION_SECTIONS.values() for row in rows for name in row.names.split()]
    assert sorted(names) == fields


def test_every_loss_and_divergence_of_trl_has_a_class() -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed (extra peers)")
    helps = {field.name: field.metadata.get("help", "") for field in dataclasses.fields(trl.DPOConfig)}
    assert list(TRL_LOSSES) == re.findall(r"`'(\w+)'`", helps["loss_type"])
    text = helps["f_divergence_type"]
    assert list(DIVERGENCES) == re.findall(r"`(\w+)`", text[text.index("values are:") : text.index("Only the")])
    for loss in TRL_LOSSES.values():
        parameters = set(inspect.signature(getattr(losses, loss.class_name)).parameters)
        parameters -= {"label_smoothing"} if loss.class_name == "DPO" else set()  # TRL's sigmoid loss ignores it
        assert parameters == {*loss.fields, *(["divergence"] if loss.takes_divergence else [])}
        assert set(loss.fields.values()) <= ROWS_BY_NAME.keys()


def test_the_document_has_the_tables() -> None:
    """If not: `print(option_tables())` of tests/support/trl_document.py is what belongs there."""
    assert option_tables() in DOCUMENT
    assert loss_table() in DOCUMENT


def test_the_options_that_are_named_exist(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    printed = printed_options(lab, capsys, "--data=PreferencePairs", "--model.adapter=LoRA", "--lr_scheduler=Warmup")
    named = {option for row in ROWS_BY_NAME.values() for option in row.options.split()}
    chosen = {
        option for option in named if option.startswith(("model.loss.", "model.reference."))
    }  # of certain classes
    assert named - chosen <= printed.keys()
    assert chosen <= {option for *_, expected in CONVERTED for option in expected}


@pytest.mark.parametrize(("others", "name", "value", "expected"), CONVERTED, ids=[case[1] for case in CONVERTED])
def test_an_option_is_converted(others: dict[str, Any], name: str, value: Any, expected: dict[str, Any]) -> None:
    found = options_of({**others, name: value})
    assert {option: found.get(option) for option in expected} == expected
    _, _, left_out = convert_config({**others, name: value})
    assert not [line for line in left_out if line.startswith(f"{name} ")]


def test_every_row_with_an_option_is_tried() -> None:
    assert {name for _, name, _, _ in CONVERTED} == ROWS_BY_NAME.keys() - set(WITHOUT_OPTION)


@pytest.mark.parametrize("name", [*WITHOUT_OPTION, "max_prompt_length", "no_such_option"])
def test_what_has_no_counterpart_is_listed(name: str) -> None:
    _, _, left_out = convert_config({"beta": 0.1, name: "some value"})
    (line,) = left_out
    assert line.startswith(f"{name} (some value): ") and len(line.split()) > 4


@pytest.mark.parametrize(
    ("given", "unused"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing"),  # TRL's sigmoid loss ignores it
        ({"discopop_tau": 0.1}, "discopop_tau"),
        ({"f_alpha_divergence_coef": 0.1}, "f_alpha_divergence_coef"),
        ({"loss_type": "nca_pair", "f_divergence_type": "forward_kl"}, "f_divergence_type"),
        ({"lora_r": 8}, "lora_r"),
        ({"eval_steps": 8}, "eval_steps"),
        ({"ref_model_sync_steps": 8}, "ref_model_sync_steps"),
        ({"max_steps": 8, "num_train_epochs": 1}, "num_train_epochs"),
        ({"optim": "sgd", "adam_beta1": 0.8}, "adam_beta1"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 8}, "warmup_steps"),
        ({"report_to": "tensorboard"}, "report_to"),
    ],
)
def test_what_has_no_effect_is_listed(given: dict[str, Any], unused: str) -> None:
    _, _, left_out = convert_config(given)
    assert [line.split()[0] for line in left_out] == [unused]


def test_what_is_unknown_is_asked_for() -> None:
    given = {"warmup_ratio": 0.1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    known, unknown = options_of(given, devices=8, pairs=6401), options_of(given)
    assert known["data.batch_size"] == 64 and unknown["data.batch_size"] == 8
    assert known["lr_scheduler.total_steps"] == 303 and known["lr_scheduler.warmup_steps"] == 31  # 3 epochs of 101
    assert "lr_scheduler.total_steps" not in unknown and unknown["lr_scheduler.warmup_ratio"] == 0.1
    remarks = " ".join(convert_config(given)[1])
    assert "1 device(s) (--devices)" in remarks and remarks.count("--pairs") == 1


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("runs"))


def printed_options(lab: Lab, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        lab.only("fit", *words, "--print_config")
    assert end.value.code == 0, capsys.readouterr().err
    return dict(flatten_options(yaml.safe_load(capsys.readouterr().out)))


SAMPLES = {
    "TRL": (
        TRL,
        {
            "data": "PreferencePairs",
            "data.path": "trl-lib/ultrafeedback_binarized",
            "data.batch_size": 16,
            "data.max_length": 1024,
            "model.loss": "Sum",
            "model.loss.weights": [0.8, 0.2, 1.0],
            "model.reference": "Cached",
            "model.adapter": "LoRA",
            "model.adapter.r": 32,
            "model.adapter.alpha": 16,
            "model.adapter.targets": ["q_proj", "v_proj"],
            "model.gradient_checkpointing": True,
            "optimizer": "AdamW",
            "optimizer.lr": 5e-7,
            "lr_scheduler": "Warmup",
            "lr_scheduler.warmup_steps": 7,
            "lr_scheduler.total_steps": 63,
            "trainer.max_epochs": 1,
            "trainer.precision": "bf16-mixed",
            "trainer.val_check_interval": 50,
            "trainer.log_every_n_steps": 25,
            "seed_everything": 42,
            "name": "zephyr",
        },
        ["dtype", "push_to_hub"],
    ),
    "LLaMA-Factory": (
        LLAMA_FACTORY,
        {
            "data": "PreferencePairs",
            "data.batch_size": 16,
            "data.max_length": 2048,
            "data.limit": 1000,
            "data.val_fraction": 0.1,
            "model.trust_remote_code": True,
            "model.loss": "Sum",
            "model.loss.weights": [1.0, 0.5],
            "model.adapter": "LoRA",
            "model.adapter.r": 8,
            "model.adapter.alpha": 16,
            "model.adapter.targets": ["all-linear"],
            "optimizer.lr": 5e-6,
            "lr_scheduler.warmup_steps": 19,
            "lr_scheduler.total_steps": 189,
            "trainer.max_epochs": 3,
            "trainer.precision": "bf16-mixed",
        },
        ["do_train", "dataset", "template"],
    ),
    "Axolotl": (
        AXOLOTL,
        {
            "data.batch_size": 16,
            "data.max_length": 4096,
            "data.val_fraction": 0.05,
            "model.loss": "DPO",
            "model.loss.beta": 0.3,
            "model.adapter": "QLoRA",
            "model.adapter.r": 32,
            "model.adapter.alpha": 16,
            "optimizer.lr": 2e-4,
            "trainer.max_steps": 100,
            "trainer.val_check_interval": 12,  # 2 an epoch, 4 epochs: 8 in all
            "lr_scheduler": "CosineAnnealingLR",
            "lr_scheduler.T_max": 100,
        },
        ["num_train_epochs", "flash_attention"],
    ),
}


@pytest.mark.parametrize("program", SAMPLES)
def test_a_configuration_becomes_one_of_ours(
    program: str, lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, expected, left_out = SAMPLES[program]
    (tmp_path / "theirs.yaml").write_text(text)
    ours = tmp_path / "ours.yaml"
    words = [str(tmp_path / "theirs.yaml"), "--devices", "2", "--pairs", "1000", "--to", str(ours)]
    capsys.readouterr()
    assert verbs.main(["from-trl", *words]) == 0
    message = capsys.readouterr().err
    assert message.startswith(f"Converted from a configuration of {program};")
    comments = [line.removeprefix("# ") for line in ours.read_text().splitlines() if line.startswith("#")]
    assert comments == message.splitlines()
    listed = comments[comments.index("Left out:") + 1 :]
    assert sorted(line.split()[0] for line in listed) == sorted(left_out)
    printed = printed_options(lab, capsys, f"--config={ours}")
    assert {name: printed.get(name) for name in expected} == expected


def test_smoothing_and_parts() -> None:
    loss = options_of(yaml.safe_load(LLAMA_FACTORY))["model.loss.losses"][0]
    assert loss == {"class_path": "DPO", "init_args": {"beta": 0.2, "label_smoothing": 0.1}}
    found = options_of(yaml.safe_load(AXOLOTL))
    assert (found["data.path.part1.path"], found["data.path.part2.path"]) == ("owner/first", "owner/second")
    mixed = options_of({"datasets": [{"path": "a/b", "fraction": 0.3}, {"path": "c/d", "fraction": 0.7}]})
    assert (mixed["data.path.part1.share"], mixed["data.path.part2.share"]) == (0.3, 0.7)


def test_another_reference_is_kept() -> None:
    found = options_of({"stage": "dpo", "ref_model": "owner/other", "finetuning_type": "full"})
    assert found["model.reference"] == "owner/other" and "model.adapter" not in found
    cached = options_of({"stage": "dpo", "ref_model": "owner/other", "precompute_ref_log_probs": True})
    assert (cached["model.reference"], cached["model.reference.of.path"]) == ("Cached", "owner/other")


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("stage: sft", [], "stage: expected dpo, got 'sft'"),
        ("rl: kto", [], "rl: expected dpo or ipo, got 'kto'"),
        ("loss_type: dpo", [], "loss_type: expected some of sigmoid, hinge,"),
        ("f_divergence_type: kl", [], "f_divergence_type: expected some of reverse_kl,"),
        ("{sync_ref_model: true, precompute_ref_log_probs: true}", [], "sync_ref_model: expected neither"),
        ("- beta", [], "expected a YAML mapping of options, got ['beta']"),
        ("beta: [", [], "expected YAML, got: "),
        ("beta: 0.1", ["--devices", "0"], "--devices: expected 1 or more, got 0."),
    ],
)
def test_what_cannot_be_converted(
    text: str, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert verbs.main(["from-trl", str(file), *words]) == 1
    shown = capsys.readouterr()
    assert message in shown.err and not shown.out
