"""Choosing classes by name: defaults of the one that was chosen, and who takes an option that it does not."""

import re
from pathlib import Path
from pydoc import locate

import pytest
from jsonargparse import Namespace

from dpo import losses
from dpo.cli.main import SHORT_NAMES
from dpo.cli.parser import MOVED, HintingParser, _leaves, sibling_classes
from dpo.data.datamodule import TextData
from dpo.losses import PreferenceLoss
from dpo.models.lora import Adapter
from dpo.models.reference import Reference
from dpo.training.base import Stage
from dpo.training.dpo import DPO

SUM = [
    "--model.loss=Sum",
    '--model.loss.losses=[{"class_path": "DPO"}, {"class_path": "NLL"}]',
    "--model.loss.weights=[1, 0.2]",
]
SMOOTHED = "'label_smoothing' is taken by AOT, AOTUnpaired, CPO, DPO, EXO, RobustDPO."


def parse(words: list[str]) -> PreferenceLoss:
    """The loss of a command line, or SystemExit."""
    parser = HintingParser(exit_on_error=True)
    parser.add_subclass_arguments(Stage, "model")
    parser.set_defaults({"model": {"class_path": f"{DPO.__module__}.DPO"}})
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
        (["--model.loss.beta=0.3", "--model.loss=SimPO"], losses.SimPO(0.3)),  # somebody has asked for it
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
def test_an_option_of_another_loss_is_refused_with_those_who_take_it(words, takers, capsys) -> None:
    with pytest.raises(SystemExit):
        parse([f"--model.loss={words[0]}", *words[1:]])
    message = capsys.readouterr().err
    assert message.count(takers) == 1
    assert "is not accepted" in message


def test_a_message_is_not_lost_among_all_the_options(capsys) -> None:
    """What stands before it is the way to them."""
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
            # the type is a choice of several here: a class, or the path of a model
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
def test_an_option_that_the_next_class_does_not_take_is_refused(words, lost, takers) -> None:
    with pytest.raises(SystemExit) as refused:
        parse(words)
    assert lost in str(refused.value)
    assert takers in str(refused.value)


def test_a_configuration_over_another_loses_nothing(tmp_path) -> None:
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


def test_an_option_nested_in_one_that_is_not_accepted_is_refused_with_those_who_take_it(tmp_path, capsys) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "class_path: DPO\ninit_args: {loss: {class_path: NCA, init_args: {divergence: {class_path: Alpha}}}}"
    )
    with pytest.raises(SystemExit):
        parse([f"--model={file}"])
    assert "'divergence' is taken by DPO, DiscoPOP," in capsys.readouterr().err


def test_a_part_of_an_option_is_refused_with_those_who_take_it(capsys) -> None:
    parser = HintingParser(exit_on_error=True)
    parser.add_subclass_arguments(TextData, "data")
    with pytest.raises(SystemExit):
        parser.parse_args(["--data=dpo.data.preferences.HHRLHF", "--data.columns.prompt=question"])
    assert "'columns' is taken by PreferencePairs." in capsys.readouterr().err


def test_another_stage_says_what_it_leaves_out(caplog) -> None:
    """Its defaults are nobody's choice, and not worth a word."""
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    parser = HintingParser(exit_on_error=True)
    parser.add_subclass_arguments(Stage, "model")
    parser.set_defaults({"model": {"class_path": f"{DPO.__module__}.DPO"}})
    parser.parse_args(["--model=dpo.training.sft.SFT"])
    assert not caplog.messages
    parser.parse_args(["--model.loss=SPPO", "--model=dpo.training.sft.SFT"])
    assert caplog.messages == ["Left out: 'loss' was given for DPO, and SFT in its place does not take it."]


def test_an_option_of_nobody_has_no_takers(capsys) -> None:
    with pytest.raises(SystemExit):
        parse(["--model.loss=IPO", "--model.loss.nothing=1"])
    assert "taken by" not in capsys.readouterr().err


def test_relatives_are_the_final_classes_of_one_kind() -> None:
    assert {cls.__name__ for cls in sibling_classes("dpo.losses.divergences.Alpha")} == {
        "ReverseKL",
        "ForwardKL",
        "JensenShannon",
        "Alpha",
    }
    assert list(sibling_classes("torch.optim.SGD")) == list(sibling_classes("nowhere.Nothing")) == []


def moved(words: list[str], config: str, folder: Path) -> Namespace:
    """What the parser makes of a configuration."""
    parser = HintingParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(Stage, "model")
    parser.add_subclass_arguments(TextData, "data")
    (folder / "config.yaml").write_text(config)
    return parser.parse_args([f"--config={folder / 'config.yaml'}", *words])


def test_a_configuration_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    now = """
    model:
      class_path: dpo.training.dpo.DPO
      init_args:
        reference: {class_path: dpo.training.precomputed.Cached, init_args: {of: dpo.models.reference.Copy}}
        adapter: {class_path: dpo.models.lora.LoRA}
        loss: {class_path: dpo.losses.IPO}
    data: {class_path: dpo.data.preferences.HHRLHF}
    """
    before = now
    for old, new in MOVED.items():
        before = before.replace(new, old)
    assert before.count("dpo.") == 6 and before != now
    assert moved([], before, tmp_path) == moved([], now, tmp_path)


def test_every_class_that_moved_is_where_it_is_said_to_be() -> None:
    for old, new in MOVED.items():
        found = locate(new)
        assert found is not None and found.__module__ + "." + found.__name__ == new
        assert old.rpartition(".")[2] == found.__name__


def test_every_class_that_can_be_chosen_has_its_earlier_path() -> None:
    chosen = [*SHORT_NAMES, *_leaves(Reference), *_leaves(Adapter)]
    ours = {f"{cls.__module__}.{cls.__name__}" for cls in chosen if cls.__module__.startswith("dpo.")}
    assert ours <= set(MOVED.values())
