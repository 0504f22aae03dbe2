"""The training command line: every configuration, options by short name, refused options, and the four verbs."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from dpo.cli import main as cli
from dpo.cli.parser import CONFIG_FOLDER
from dpo.runs.folder import Run
from tests.support.runs import ROOT, Lab, checkpoint, metrics, pairs, policy

CONFIGS = sorted(set((ROOT / "configs").glob("*.yaml")) - {ROOT / "configs" / "sweep.yaml"})  # that one: test_sweeps
QUICK = ["--trainer.max_steps=1", "--data.val_fraction=0"]
NAME_MESSAGE = (
    "expected a folder name without slashes or spaces, not `latest` "
    "(letters, digits, _ and, after the first character, .+-), got "
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def run(lab: Lab) -> Run:
    return lab.fit("one", "--trainer.max_steps=2", "--trainer.val_check_interval=1", "--optimizer.lr=1e-3")


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # imported by torch's own compiler
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_runs_two_steps(lab: Lab, config: Path) -> None:
    """Only paths and sizes are overridden; layers are not compiled here (see test_compile)."""
    if "QLoRA" in config.read_text() and not torch.cuda.is_available():
        pytest.skip("weights of four bits need a CUDA device and bitsandbytes")
    sizes = {
        "data.path": pairs(),
        "data.max_length": 128,
        "data.batch_size": 4,
        "data.val_fraction": 0.1,
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
        "trainer.log_every_n_steps": 1,
        "trainer.limit_val_batches": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.default_root_dir": lab.folder,
    }
    given = yaml.safe_load(config.read_text())
    if "policy" in given.get("model", {}).get("init_args", {}):
        sizes["model.policy"] = policy()
    if "subsets" in given["data"]["init_args"]:
        sizes["data.subsets"] = "[pairs]"
    words = [f"--{name}={value}" for name, value in sizes.items()]
    with torch.compiler.set_stance("force_eager"):
        assert lab.only("fit", f"--config={config}", f"--name={config.stem}", *words) == 0
    rows = metrics(Run(lab.folder / config.stem))
    assert [row["step"] for row in rows] == [1, 2]
    assert "val/loss" in rows[-1]


def printed_config(lab: Lab, capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        lab.main("fit", *words, "--print_config")
    assert end.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_print_config_shows_everything_and_writes_nothing(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(lab.folder.iterdir())
    config = printed_config(lab, capsys, "--name=printed", "--data.limit=7", "--trainer.max_epochs=3")
    assert config["name"] == "printed"
    assert config["trainer"]["max_epochs"] == 3
    assert config["data"]["init_args"]["limit"] == 7
    assert config["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert sorted(lab.folder.iterdir()) == before


def test_a_printed_configuration_runs(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed_config(lab, capsys, "--name=again", *QUICK, "--model.loss.beta=0.3")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config))
    assert lab.only("fit", f"--config={tmp_path / 'again.yaml'}") == 0
    assert loss_of(Run(lab.folder / "again"))["init_args"]["beta"] == 0.3


def loss_of(run: Run) -> dict:
    return yaml.safe_load(run.config_path.read_text())["model"]["init_args"]["loss"]


def test_classes_have_short_names(lab: Lab) -> None:
    words = ["--model.loss=DPO", "--model.loss.beta=0.2", "--model.loss.label_smoothing=0.1"]
    run = lab.fit("short", *QUICK, *words, "--model.reference=Copy", "--optimizer=SGD", "--optimizer.lr=0.01")
    assert loss_of(run)["class_path"].endswith(".DPO")
    chosen = loss_of(run)["init_args"]
    assert (chosen["beta"], chosen["label_smoothing"]) == (0.2, 0.1)
    assert yaml.safe_load(run.config_path.read_text())["optimizer"]["class_path"] == "torch.optim.SGD"
    assert metrics(run)[0]["train/learning_rate"] == 0.01


def test_a_schedule_is_chosen_by_class(lab: Lab) -> None:
    words = ["--lr_scheduler=StepLR", "--lr_scheduler.step_size=1", "--lr_scheduler.gamma=0.5"]
    run = lab.fit("schedule", "--trainer.max_steps=3", "--data.val_fraction=0", "--optimizer.lr=0.01", *words)
    rates = [row["train/learning_rate"] for row in metrics(run)]
    assert [after / before for before, after in zip(rates, rates[1:])] == [0.5, 0.5]  # noqa: B905 RUF007


def test_a_warm_up_may_be_a_share_of_the_run(lab: Lab) -> None:
    """The whole run of 4 steps: n / 4 of the rate at step n, logged after the step before."""
    words = ["--lr_scheduler=Warmup", "--lr_scheduler.warmup_ratio=1", "--optimizer.lr=0.01"]
    run = lab.fit("share", "--trainer.max_steps=4", "--data.val_fraction=0", *words)
    rates = [row["train/learning_rate"] for row in metrics(run)]
    assert rates == pytest.approx([0.01 * 2 / 4, 0.01 * 3 / 4, 0.01, 0.01])


def test_another_model_is_the_reference(lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    run = lab.fit("other", *QUICK, f"--model.reference={policy(seed=1)}")
    assert metrics(run)[0]["train/rewards/margins"] != 0.0


def test_one_epoch_by_default(lab: Lab) -> None:
    assert len(metrics(lab.fit("length", "--data.val_fraction=0"))) == 24 / 4


def refused(lab: Lab, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the error message of a command line that is refused and leaves no files."""
    before = sorted(lab.folder.iterdir())
    capsys.readouterr()
    try:
        code = lab.main("fit", *words)
    except SystemExit as end:
        code = end.code
    assert code in (1, 2)
    assert sorted(lab.folder.iterdir()) == before
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--nothing=1", "nothing"),
        ("--data.nothing=1", "nothing"),
        ("--model.nothing=1", "nothing"),
        ("--model.loss.nothing=1", "nothing"),
        ("--trainer.nothing=1", "nothing"),
        ("--model.loss=Nothing", "Nothing"),
        ("--optimizer=Nothing", "Nothing"),
    ],
)
def test_unknown_options_and_classes_are_refused_by_name(
    lab: Lab, capsys: pytest.CaptureFixture[str], word: str, expected: str
) -> None:
    assert expected in refused(lab, capsys, word)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--model.polcy=x", "error: --model.polcy: DPO has no option 'polcy'. Did you mean policy?"),
        ("--data.bath_size=3", "error: --data.bath_size: HHRLHF has no option 'bath_size'. Did you mean batch_size?"),
        ("--model.loss.bta=1", "error: --model.loss.bta: DPO has no option 'bta'. Did you mean beta?"),
        ("--optimizer.lrr=1", "error: --optimizer.lrr: AdamW has no option 'lrr'. Did you mean lr?"),
        ("--model.loss=RobustDPOO", "error: --model.loss: expected one of AOT, AOTUnpaired, "),
        ("--model.loss=Foo", "error: --model.loss: expected one of AOT, AOTUnpaired, "),
        (
            "--model.adapter=Lora",
            "error: --model.adapter: expected one of AsLoaded, LoRA, QLoRA, got 'Lora'. Did you mean LoRA",
        ),
        ("--model=DPOO", "error: --model: expected one of DPO, SFT, got 'DPOO'. Did you mean DPO?"),
        ("--optimizer=Adm", "error: --optimizer: expected one of ASGD, Adadelta, "),
        ("--nothing=1", "error: --nothing: there is no such option."),
    ],
)
def test_the_last_line_names_the_error_and_close_matches(
    lab: Lab, capsys: pytest.CaptureFixture[str], word: str, expected: str
) -> None:
    assert refused(lab, capsys, word).splitlines()[-1].startswith(expected)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (
            "--model.loss.label_smoothing=0.9",
            "error: --model.loss.label_smoothing: expected a number in [0, 0.5], got 0.9.\n",
        ),
        ("--model.loss.beta=0", "error: --model.loss.beta: expected a number in (0, inf), got 0.0.\n"),
        ("--model.loss.beta=many", "beta"),
        ("--data.batch_size=0", "--data.batch_size: expected at least 1 pair, got 0"),
        ("--data.max_length=4", "--data.max_length: expected at least 8 tokens, got 4"),
        ("--data.val_fraction=1", "--data.val_fraction: expected a share from 0 to less than 1, got 1"),
        ("--name=a/b", NAME_MESSAGE + "'a/b'"),
        ("--name=latest", NAME_MESSAGE + "'latest'"),
        ("--name=..", NAME_MESSAGE + "'..'"),
    ],
)
def test_wrong_values_are_refused_with_a_message(
    lab: Lab, capsys: pytest.CaptureFixture[str], word: str, expected: str
) -> None:
    assert expected in refused(lab, capsys, word)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--optimizer.lr=-1", "--optimizer.lr: expected a finite number above 0, got -1"),
        ("--optimizer.betas=[2, 0.9]", "--optimizer: the optimizer refuses its options: Invalid beta parameter"),
        ("--optimizer.eps=-1", "--optimizer: the optimizer refuses its options: Invalid epsilon value"),
    ],
)
def test_options_of_the_optimizer_are_refused_before_anything_is_read(
    lab: Lab, capsys: pytest.CaptureFixture[str], word: str, expected: str
) -> None:
    assert refused(lab, capsys, word, "--model.policy=/nowhere").startswith(f"error: {expected}")


@pytest.mark.parametrize("way", ["short", "long", "configuration"])
def test_a_tokenizer_option_is_refused(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str], way: str) -> None:
    config = tmp_path / "tokenizer.yaml"
    config.write_text("data: {class_path: HHRLHF, init_args: {tokenizer: gpt2}}")
    ways = {"short": "--data.tokenizer=gpt2", "long": "--data.init_args.tokenizer=gpt2"}
    message = refused(lab, capsys, ways.get(way, f"--config={config}"))
    assert f"expected none, got 'gpt2': the tokenizer is the one that comes with --model.policy ({policy()})" in message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model.policy=/nowhere"], "/nowhere"),
        (["--data.path=/nowhere"], "/nowhere"),
        (["--data.subsets=[nothing]"], "nothing"),
        (["--trainer.accumulate_grad_batches=8"], "expected a batch_size of at least"),
        (["--trainer.enable_checkpointing=false"], "enable_checkpointing"),
        *((["--trainer.precision", name], f"got {name}. Weights are kept") for name in ("bf16-true", "64-true")),
    ],
)
def test_what_cannot_be_read_or_done_is_refused_with_a_message(
    lab: Lab, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    assert lab.main("fit", "--name=unreadable", *QUICK, *words) == 1
    message = capsys.readouterr().err
    assert expected in message and "Traceback" not in message


@pytest.mark.parametrize("word", ["--data.path=/nowhere", "--model.policy=/nowhere", "--data.max_length=300"])
def test_a_failed_start_leaves_no_folder_and_keeps_latest(lab: Lab, run: Run, word: str) -> None:
    """Refused while reading data, while reading models, and by the preflight."""
    newest = os.readlink(lab.folder / "latest")
    assert lab.main("fit", "--name=retry", *QUICK, word) == 1
    assert not (lab.folder / "retry").exists()
    assert os.readlink(lab.folder / "latest") == newest


def test_a_failed_start_keeps_files_that_were_there(lab: Lab) -> None:
    notes = lab.folder / "with-notes" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    assert lab.main("fit", "--name=with-notes", *QUICK, "--data.path=/nowhere") == 1
    assert notes.read_text() == "mine"
    lab.fit("with-notes", *QUICK)


def test_callbacks_and_loggers_of_the_user_are_added(lab: Lab) -> None:
    words = [
        "--trainer.callbacks+=LearningRateMonitor",
        "--trainer.logger=CSVLogger",
        f"--trainer.logger.save_dir={lab.folder}",
    ]
    run = lab.fit("added", *QUICK, *words, "--trainer.logger.name=extra", "--trainer.logger.version=1")
    assert "lr-AdamW" in (lab.folder / "extra" / "version_1" / "metrics.csv").read_text()
    assert "train/loss" in metrics(run)[-1]


def test_without_a_logger_there_is_still_metrics_csv(lab: Lab) -> None:
    assert metrics(lab.fit("unlogged", *QUICK, "--trainer.logger=false"))


def results(run: Run, stage: str) -> dict[str, float]:
    return {k: v for k, v in json.loads(run.results_path.read_text()).items() if k.startswith(f"{stage}/")}


def test_validate_measures_a_checkpoint_again(lab: Lab, run: Run) -> None:
    before, table = results(run, "val"), run.metrics_path.read_bytes()
    run.results_path.unlink()
    assert lab.main("validate", "--name=one", "--ckpt_path=last") == 0
    assert results(run, "val") == pytest.approx(before, rel=1e-6)
    assert run.metrics_path.read_bytes() == table, "what was logged during training stays"


def test_test_measures_the_test_pairs(lab: Lab, run: Run) -> None:
    assert lab.main("test", f"--ckpt_path={run.checkpoint_folder / 'best.ckpt'}") == 0
    measured = results(run, "test")
    assert measured["test/length/chosen"] > 0
    assert measured["test/loss"] != pytest.approx(0.693147, abs=1e-6), "these are the trained weights"


def test_predict_writes_every_pair(lab: Lab, run: Run) -> None:
    for _ in range(2):  # the second time replaces the first
        assert lab.main("predict", "--name=one", "--ckpt_path=last") == 0
    rows = [json.loads(line) for line in run.predictions_path.read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == sorted(f"pairs/test:{line}" for line in range(1, 7))
    assert lab.main("test", "--name=one", "--ckpt_path=last") == 0
    measured = results(run, "test")
    for side, name in enumerate(("chosen", "rejected")):
        mean = sum(row["rewards"][side] for row in rows) / len(rows)
        assert mean == pytest.approx(measured[f"test/rewards/{name}"], rel=1e-5)


def test_without_a_checkpoint_the_given_policy_is_measured(lab: Lab) -> None:
    assert lab.main("test", "--name=untrained") == 0
    assert results(Run(lab.folder / "untrained"), "test")["test/loss"] == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_a_trained_run_stores_values_of_its_own_checkpoints_only(
    lab: Lab, run: Run, verb: str, tmp_path, capsys
) -> None:
    """Values of the policy before training, or of another run, would end up in its results and model card."""
    before = run.results_path.read_bytes()
    foreign = shutil.copy(run.checkpoint_folder / "last.ckpt", tmp_path)
    for words in ([], [f"--ckpt_path={foreign}"]):
        assert lab.main(verb, "--name=one", *words) == 1
        assert "--ckpt_path: expected last, best or another checkpoint" in capsys.readouterr().err
    assert run.results_path.read_bytes() == before


def test_other_verbs_do_not_change_checkpoints_or_latest(lab: Lab, run: Run) -> None:
    newest = os.readlink(lab.folder / "latest")
    step = checkpoint(run)["global_step"]
    for verb in ("validate", "test", "predict"):
        assert lab.main(verb, "--name=one", "--ckpt_path=last") == 0
    assert checkpoint(run)["global_step"] == step
    assert os.readlink(lab.folder / "latest") == newest


def test_fit_without_options_trains_the_quickstart(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setattr(cli, "TrainingCLI", lambda *_, **__: seen.update(words=list(cli.sys.argv)) or exit(0))
    for words in (["fit"], ["fit", "--name", "x"], ["fit", "--trainer.max_steps=1"]):
        with pytest.raises(SystemExit):
            cli.main(words)
        assert seen["words"] == ["train.py", "fit", "--config", str(CONFIG_FOLDER / "quickstart.yaml"), *words[1:]]
    named = [["--config=x.yaml"], ["--data.path", "x"], ["--data.init_args.path=x"], ["--model.policy=x"]]
    named += [["--model.init_args.policy", "x"], ["--conf", "x.yaml"], ["-c", "x.yaml"]]
    for words in (*(["fit", *more] for more in named), ["test"]):
        with pytest.raises(SystemExit):
            cli.main(words)
        assert seen["words"] == ["train.py", *words]


def test_results_of_other_data_are_kept_beside_the_own(lab: Lab, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    other = pairs(20, 4)
    assert lab.main("test", "--name=one", "--ckpt_path=last", "--data.batch_size=2") == 0
    own = results(run, "test")
    assert lab.main("test", "--name=one", "--ckpt_path=last", f"--data.path={other}") == 0
    assert results(run, "test") == own
    assert f"Other data than the run's own (path={other})" in capsys.readouterr().out
    kept = json.loads(run.results_path.read_text())
    assert kept[f"test[path={other}]/loss"] != own["test/loss"]


def test_results_without_training_keep_whose_they_are(lab: Lab) -> None:
    for path in (pairs(), pairs(20, 4)):
        assert lab.main("test", "--name=measured", f"--data.path={path}") == 0
    values = json.loads(Run(lab.folder / "measured").results_path.read_text())
    assert {"test/loss", f"test[path={pairs(20, 4)}]/loss"} <= values.keys()


def test_a_run_cut_short_says_so_and_how_to_go_on(lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    run = lab.fit("short-time", "--trainer.max_time=00:00:00:00", "--trainer.max_steps=5", "--data.val_fraction=0")
    out, log = capfd.readouterr()
    assert "of 5 steps: the time of --trainer.max_time is up. To go on:" in out
    assert f"fit --config {run.config_path} --ckpt_path {run.checkpoint_folder / 'last.ckpt'} --trainer.max_time" in out
    assert "reached" not in out + log.replace("Time limit reached", "")
    lab.fit("whole", *QUICK)
    out, _ = capfd.readouterr()
    assert "Trained 1 of 1 steps: --trainer.max_steps 1 is reached." in out


def test_help_has_no_marks_of_sphinx_and_names_the_helps_of_classes(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        lab.only("fit", "--help")
    text = capsys.readouterr().out
    assert "``" not in text and ":class:" not in text and ":paramref:" not in text
    assert all(f"--{name}.help" in text for name in ("model", "model.loss", "data", "optimizer", "lr_scheduler"))
