"""A run that is stopped any number of times, anywhere, trains what the uninterrupted run trains."""

from collections.abc import Callable
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch

from dpo.runs.folder import Run
from dpo.training.dpo import DPO
from dpo.training.position import loop_state_after_step
from tests.support.runs import Lab, checkpoint, metrics, weights

WORDS = ["--optimizer.lr=1e-3", "--lr_scheduler=Warmup", "--lr_scheduler.warmup_steps=4", "--data.shuffle=true"]
EPOCHS = 3  # of five optimizer steps


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("runs"))


VARIANTS = {
    "plain": ["--trainer.val_check_interval=2"],
    "unvalidated": ["--data.val_fraction=0"],
    "accumulated": ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=3"],
    "counted": ["--trainer.check_val_every_n_epoch=null", "--trainer.val_check_interval=3"],
}


@pytest.fixture(scope="module")
def whole(lab: Lab) -> Callable[[str], Run]:
    """Three epochs of a variant without interruption."""
    return cache(lambda variant: lab.fit(variant, *WORDS, *VARIANTS[variant], f"--trainer.max_epochs={EPOCHS}"))


def go_on(lab: Lab, name: str, words: list[str], *stops: str) -> Run:
    """Stop with each of these options, one after the other, and go on to the end."""
    for number, stop in enumerate([*stops, f"--trainer.max_epochs={EPOCHS}"]):
        more = ["--ckpt_path=last"] if number else []
        run = lab.fit(name, *words, stop, *more)
    return run


def trained(run: Run) -> list[tuple[float, ...]]:
    """Step, loss and learning rate of every step: the pairs of a step decide its loss."""
    names = ("step", "train/loss", "train/learning_rate", "train/grad_norm")
    return [tuple(row[name] for name in names) for row in metrics(run)]


def validated(run: Run) -> dict[float, float]:
    return {row["step"]: row["val/loss"] for row in metrics(run) if "val/loss" in row}


def same(run: Run, expected: Run) -> None:
    assert trained(run) == trained(expected)
    assert validated(expected).items() <= validated(run).items()  # a stop validates besides
    found, wanted = weights(run), weights(expected)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert checkpoint(run)["loops"]["fit_loop"] == checkpoint(expected)["loops"]["fit_loop"]


def steps(*numbers: int) -> list[str]:
    return [f"--trainer.max_steps={number}" for number in numbers]


CHAINS = {
    "edge": steps(5, 8),
    "one epoch": ["--trainer.max_epochs=1", *steps(7, 9)],
    "two edges": steps(5, 10),
    "every step": steps(*range(1, 15)),
    "end": [*steps(15), f"--trainer.max_epochs={EPOCHS}"],
}


@pytest.mark.parametrize(
    ("variant", "chain"),
    [("plain", chain) for chain in CHAINS]
    + [(variant, chain) for variant in VARIANTS if variant != "plain" for chain in ("edge", "one epoch")],
)
def test_a_chain_of_stops_trains_what_the_uninterrupted_run_does(
    lab: Lab, whole: Callable[[str], Run], variant: str, chain: str
) -> None:
    words = [*WORDS, *VARIANTS[variant]]
    same(go_on(lab, f"{variant}-{chain.replace(' ', '-')}", words, *CHAINS[chain]), whole(variant))


def lightnings(ready: int, last: bool, ended: int = 0) -> dict[str, Any]:
    """What Lightning itself saves in the hook after a batch, with two batches a step."""
    counts = {"ready": ready, "started": ready, "processed": ready, "completed": ready - 1}
    epochs = {"ready": ended + 1, "started": ended + 1, "processed": ended, "completed": ended}
    steps = {"ready": ready // 2, "completed": ready // 2}
    return {
        "epoch_loop.batch_progress": {"total": counts, "current": counts, "is_last_batch": last},
        "epoch_loop.automatic_optimization.optim_progress": {"optimizer": {"step": {"total": steps, "current": steps}}},
        "epoch_progress": {"total": epochs, "current": epochs},
        "state_dict": {"combined_loader": [{"position": ready}]},
    }


@pytest.mark.parametrize(
    ("ready", "last", "position", "ended"),
    [(4, False, 4, 0), (5, False, 4, 0), (1, False, 0, 0), (10, True, 0, 1), (9, True, 8, 0)],
)
def test_what_lightning_saves_becomes_the_place_after_the_last_step(
    ready: int, last: bool, position: int, ended: int
) -> None:
    place = loop_state_after_step(lightnings(ready, last), accumulate=2)
    assert place["state_dict"]["combined_loader"] == [{"position": position}]
    assert place["epoch_loop.batch_progress"]["current"]["ready"] == position
    assert place["epoch_loop.batch_progress"]["total"]["ready"] == ready // 2 * 2
    assert place["epoch_progress"]["total"]["processed"] == ended
    assert loop_state_after_step(place, accumulate=2) == place


class Killed(BaseException):
    """As if the process were gone: nothing is saved."""


def killed(lab: Lab, batch: int, *words: str) -> None:
    """Train until a batch of the first epoch begins."""
    step = DPO.training_step

    def training_step(module: DPO, given: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == batch:
            raise Killed
        return step(module, given, batch_idx)

    with patch.object(DPO, "training_step", training_step), pytest.raises(Killed):
        lab.main("fit", *words)


def test_a_checkpoint_inside_an_accumulation_window_loses_no_gradient(lab: Lab, whole: Callable[[str], Run]) -> None:
    words = [*WORDS, *VARIANTS["accumulated"]]
    killed(lab, 3, "--name=window", *words, f"--trainer.max_epochs={EPOCHS}")  # right after the validation in a window
    saved = checkpoint(Run(lab.folder / "window"))
    assert saved["global_step"] == 1
    assert saved["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [{"position": 2}]
    run = lab.fit("window", *words, f"--trainer.max_epochs={EPOCHS}", "--ckpt_path=last")
    same(run, whole("accumulated"))


def test_a_cut_accumulation_window_is_refused(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--trainer.accumulate_grad_batches=2", "--trainer.limit_train_batches=3"]
    assert lab.main("fit", "--name=cut", *words) == 1
    assert "expected a multiple of --trainer.accumulate_grad_batches 2, got 3 batches" in capsys.readouterr().err
