"""Classes chosen by name: their own defaults, and messages that name the classes which take a refused option."""

import re
from pathlib import Path
from pydoc import locate

import pytest
from jsonargparse import Namespace

import dpo
from dpo import losses
from dpo.cli.class_names import sibling_classes
from dpo.cli.parser import CONFIG_FOLDER, HintingParser, complete_arguments
from dpo.data.datamodule import TextData
from dpo.losses import PreferenceLoss
from dpo.training.base import Stage

SUM = [
    "--model.loss=Sum",
    '--model.loss.losses=[{"class_path": "DPO"}, {"class_path": "NLL"}]',
    "--model.loss.weights=[1, 0.2]",
]
SMOOTHED = "'label_smoothing' is taken by AOT, AOTUnpaired, CPO, DPO, EXO, RobustDPO."


def parse(words: list[str]) -> PreferenceLoss:
    """Return the loss of a command line, or raise SystemExit."""
    parser = HintingParser(exit_on_error=True)
    parser.add_subclass_arguments(Stage, "model")
    parser.set_defaults({"model": {"class_path": "dpo.DPO"}})
    return parser.instantiate_classes(parser.parse_args(words)).model.loss


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], losses.DPO()),
        (["--model.loss=SimPO"], losses.SimPO()),  # not the default's beta of 0.1
        (["--model.loss=EXO"], losses.EXO()),  # not the default's label_smoothing of 0
        (["--model.loss=LengthNormalizedDPO"], losses.LengthNormalizedDPO()),
        (["--model.loss=RobustDPO", "--model.loss.beta=0.3"], losses.RobustDPO(0.3)),
        (["--model.loss.beta=0.3"], losses.DPO(0.3)),
        (["--model.loss.beta=0.3", "--model.loss=SimPO"], losses.SimPO(0.3)),  # the option was given
        (["--model.loss=IPO", "--model.loss.divergence=ForwardKL"], losses.IPO(divergence=losses.ForwardKL())),
        (
            ["--model.loss=DPO", "--model.loss.divergence=Alpha", "--model.loss.divergence.alpha=0.2"],
            losses.DPO(divergence=losses.Alpha(0.2)),
        ),
        (["--model.loss=LD", "--model.loss.loss=IPO", "--model.loss.alpha=0.2"], losses.LD(losses.IPO(), 0.2)),
        (["--model.loss=WPO", "--model.loss.loss=SimPO"], losses.WPO(losses.SimPO())),
        (SUM, losses.Sum((losses.DPO(), losses.NLL()), (1.0, 0.2))),
    ],
)
def test_a_loss_is_chosen_by_name(words, expected) -> None:
    assert parse(words) == expected


@pytest.mark.parametrize(
    ("words", "takers"),
    [
        (
            ["IPO", "--model.loss.label_smoothing=0.1"],
            SMOOTHED,
        ),
        (["LD", "--model.loss.loss=DPO", "--model.loss.loss.tau=0.1"], "'tau' is taken by DiscoPOP."),
        (["DPO", "--model.loss.alpha=0.1"], "'alpha' is taken by CPO, LD."),
        (
            ["NCA", "--model.loss.divergence=ForwardKL"],
            "'divergence' is taken by DPO, DiscoPOP, EXO, Hinge, IPO, LengthNormalizedDPO, ODPO, RobustDPO.",
        ),
    ],
)
def test_an_option_of_another_loss_is_refused_and_its_losses_are_named(words, takers, capsys) -> None:
    with pytest.raises(SystemExit):
        parse([f"--model.loss={words[0]}", *words[1:]])
    message = capsys.readouterr().err
    assert message.count(takers) == 1
    assert f"has no option '{words[-1].partition('=')[0].rpartition('.')[2]}'" in message


def test_a_message_is_printed_without_the_usage(capsys) -> None:
    """Only a tip that names --help stands before it."""
    with pytest.raises(SystemExit):
        parse(["--nothing=1"])
    assert re.fullmatch(r"tip: .* --help\nerror: .*--nothing.*\n", capsys.readouterr().err)


CDPO = ["--model.loss=DPO", "--model.loss.label_smoothing=0.1"]


@pytest.mark.parametrize(
    ("words", "lost", "takers"),
    [
        ([*CDPO, "--model.loss=IPO"], "'label_smoothing' was given for DPO, and IPO in its place", SMOOTHED),
        (
            ["--model.loss=DPO", "--model.loss.divergence=ForwardKL", "--model.loss=NCA"],
            "'divergence' was given for DPO, and NCA in its place",
            "'divergence' is taken by DPO, DiscoPOP, EXO, Hinge, IPO, LengthNormalizedDPO, ODPO, RobustDPO.",
        ),
        (
            [
                "--model.loss=LD",
                "--model.loss.loss=DPO",
                "--model.loss.loss.label_smoothing=0.1",
                "--model.loss.loss=IPO",
            ],
            "'label_smoothing' was given for DPO, and IPO in its place",
            SMOOTHED,
        ),
        (["--model.loss=LD", "--model.loss.loss=DPO", "--model.loss=DPO"], "'loss' was given for LD", "LD, WPO."),
        ([*SUM, "--model.loss=DPO"], "'losses' was given for Sum, and DPO in its place", "'losses' is taken by Sum."),
        (
            # This type is a union: a class, or the path of a model.
            ["--model.reference=Moving", "--model.reference.tau=5", "--model.reference=Copy"],
            "'tau' was given for Moving, and Copy in its place",
            "'tau' is taken by Moving.",
        ),
        (
            ["--model.adapter=LoRA", "--model.adapter.r=4", "--model.adapter=AsLoaded"],
            "'r' was given for LoRA",
            "QLoRA.",
        ),
    ],
)
def test_an_option_that_a_replacing_class_does_not_take_is_refused(words, lost, takers) -> None:
    with pytest.raises(SystemExit) as refused:
        parse(words)
    assert lost in str(refused.value)
    assert takers in str(refused.value)


def test_a_second_configuration_drops_no_option_silently(tmp_path) -> None:
    files = []
    for name, loss in (
        ("a", "DPO, init_args: {beta: 0.3, label_smoothing: 0.1}"),
        ("b", "IPO, init_args: {beta: 0.2}"),
    ):
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(f"class_path: DPO\ninit_args: {{loss: {{class_path: {loss}}}}}\n")
    with pytest.raises(SystemExit, match="'label_smoothing' was given for DPO, and IPO in its place does not take it"):
        parse([f"--model={file}" for file in files])
    assert parse([f"--model={file}" for file in reversed(files)]) == losses.DPO(0.3, 0.1)


def test_a_nested_value_of_a_refused_option_is_refused_and_its_classes_are_named(tmp_path, capsys) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "class_path: DPO\ninit_args: {loss: {class_path: NCA, init_args: {divergence: {class_path: Alpha}}}}"
    )
    with pytest.raises(SystemExit):
        parse([f"--model={file}"])
    assert "'divergence' is taken by DPO, DiscoPOP," in capsys.readouterr().err


def test_a_part_of_a_refused_option_is_refused_and_its_classes_are_named(capsys) -> None:
    parser = HintingParser(exit_on_error=True)
    parser.add_subclass_arguments(TextData, "data")
    with pytest.raises(SystemExit):
        parser.parse_args(["--data=dpo.HHRLHF", "--data.columns.prompt=question"])
    assert "'columns' is taken by PreferencePairs." in capsys.readouterr().err


def test_another_stage_logs_the_options_that_it_drops(caplog) -> None:
    """Dropped defaults are not logged."""
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    parser = HintingParser(exit_on_error=True)
    parser.add_subclass_arguments(Stage, "model")
    parser.set_defaults({"model": {"class_path": "dpo.DPO"}})
    parser.parse_args(["--model=dpo.SFT"])
    assert not caplog.messages
    parser.parse_args(["--model.loss=SPPO", "--model=dpo.SFT"])
    assert caplog.messages == ["Left out: 'loss' was given for DPO, and SFT in its place does not take it."]


def test_an_option_of_no_class_names_no_classes(capsys) -> None:
    with pytest.raises(SystemExit):
        parse(["--model.loss=IPO", "--model.loss.nothing=1"])
    assert "taken by" not in capsys.readouterr().err


def test_siblings_are_the_concrete_classes_below_one_base() -> None:
    assert {cls.__name__ for cls in sibling_classes("dpo.losses.divergences.Alpha")} == {
        "ReverseKL",
        "ForwardKL",
        "JensenShannon",
        "Alpha",
    }
    assert list(sibling_classes("torch.optim.SGD")) == list(sibling_classes("nowhere.Nothing")) == []


def parse_config(words: list[str], config: str, folder: Path) -> Namespace:
    """Return the parsed options of a configuration."""
    parser = HintingParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(Stage, "model")
    parser.add_subclass_arguments(TextData, "data")
    (folder / "config.yaml").write_text(config)
    return parser.parse_args([f"--config={folder / 'config.yaml'}", *words])


EARLIER = {
    "adapters": ["AsLoaded", "LoRA", "QLoRA"],
    "reference": ["AdapterOff", "Copy", "Model", "Moving", "Nothing"],
    "data": ["HHRLHF", "PreferencePairs"],
    "prompts": ["Prompts"],
    "module": ["DPO"],
    "sft": ["SFT"],
    "cached": ["Cached"],
    "schedules": ["Warmup"],
}


def test_a_configuration_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    current = """
    model:
      class_path: dpo.DPO
      init_args:
        reference: {class_path: dpo.Cached, init_args: {of: dpo.Copy}}
        adapter: {class_path: dpo.LoRA}
        loss: {class_path: dpo.losses.IPO}
    data: {class_path: dpo.HHRLHF}
    """
    earlier = current
    for module, names in EARLIER.items():
        for name in names:
            earlier = earlier.replace(f"dpo.{name}", f"dpo.{module}.{name}")
    assert earlier.count("dpo.losses.IPO") == 1 and earlier.count("dpo.module.DPO") == 1
    assert parse_config([], earlier, tmp_path) == parse_config([], current, tmp_path)


@pytest.mark.parametrize("module", EARLIER)
def test_earlier_class_paths_are_translated_on_the_command_line(module: str) -> None:
    for name in EARLIER[module]:
        (word,) = complete_arguments([f"--x={{class_path: dpo.{module}.{name}}}"])
        assert word == f"--x={{class_path: dpo.{name}}}"
        assert locate(f"dpo.{name}") is getattr(dpo, name)
    assert complete_arguments(["dpo.precision.bfloat16_where_fast"]) == ["dpo.models.cpu.bfloat16_where_fast"]


def test_class_paths_in_a_resolved_configuration_are_the_public_ones(tmp_path: Path) -> None:
    parser = HintingParser(exit_on_error=False)
    parser.add_subclass_arguments(Stage, "model")
    parser.add_subclass_arguments(TextData, "data")
    text = parser.dump(parser.parse_args(["--model=DPO", "--model.adapter=LoRA", "--data=HHRLHF"]))
    paths = re.findall(r"class_path: (\S+)", text)
    assert paths == ["dpo.DPO", "dpo.losses.DPO", "dpo.losses.ReverseKL", "dpo.LoRA", "dpo.HHRLHF"]


def test_a_configuration_of_the_package_is_found_from_anywhere(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    packaged = str(CONFIG_FOLDER / "losses" / "ipo.yaml")
    assert complete_arguments(["test", "--config", "configs/losses/ipo.yaml"]) == ["test", "--config", packaged]
    assert complete_arguments(["test", "--config=losses/ipo.yaml"]) == ["test", f"--config={packaged}"]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "cpu.yaml").write_text("{}")
    assert complete_arguments(["fit", "-c", "configs/cpu.yaml"])[-1] == "configs/cpu.yaml"  # the user's own wins
    assert complete_arguments(["fit", "-c", "configs/nothing.yaml"])[-1] == "configs/nothing.yaml"


def test_the_quickstart_lies_under_a_configuration_that_names_neither_policy_nor_data(caplog) -> None:
    """With only the loss of ipo.yaml, the quickstart's pairs would be trained at 1e-6 instead of 5e-4."""
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    quickstart, ipo = str(CONFIG_FOLDER / "quickstart.yaml"), str(CONFIG_FOLDER / "losses" / "ipo.yaml")
    assert complete_arguments(["fit", "--config", ipo]) == ["fit", "--config", quickstart, "--config", ipo]
    assert caplog.messages == [f"{ipo}: names neither policy nor data, so {quickstart} lies under it."]
    for named in (["--config", quickstart], ["--model.policy", "x"], ["--data.path=x"]):
        assert complete_arguments(["fit", *named, "--config", ipo]) == ["fit", *named, "--config", ipo]


def test_a_negative_number_is_a_value() -> None:
    words = ["fit", "--data.path=x", "--optimizer.lr", "-1e-4", "--trainer.max_steps", "-1"]
    assert complete_arguments(words) == ["fit", "--data.path=x", "--optimizer.lr=-1e-4", "--trainer.max_steps=-1"]


def test_help_without_a_class_is_that_of_the_default_class() -> None:
    words = ["fit", "--data.path=x", "--model.help"]
    assert complete_arguments(words)[-1] == "--model.help=DPO"
    assert complete_arguments([*words, "SFT"])[-2:] == ["--model.help", "SFT"]
