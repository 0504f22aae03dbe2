"""Chains of stops, drawn at random: each ends in the very run that was never stopped."""

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import count
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo.runs.folder import Run
from dpo.training.base import Stage
from tests.support.runs import Lab, metrics, weights

END = "--trainer.max_epochs=3"  # of five optimizer steps
STEPS = 15
BASE = [
    "--optimizer.lr=1e-3",
    "--lr_scheduler=Warmup",
    "--lr_scheduler.warmup_steps=4",
    "--trainer.log_every_n_steps=2",
]
VARIANTS = {
    "plain": ["--trainer.val_check_interval=2"],
    "unvalidated": ["--data.val_fraction=0", "--checkpoint.every_n_steps=2"],
    "accumulated": ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=3"],
    "packed": ["--data.max_tokens=64", "--data.val_fraction=0", "--checkpoint.every_n_steps=3"],
    "moving": ["--model.reference=Moving", "--model.reference.tau=2", "--data.val_fraction=0"],
    "cached": ["--model.reference=Cached", "--trainer.val_check_interval=3"],
    "supervised": ["--model=SFT", "--trainer.val_check_interval=4"],
}
CLOCKS = ("seconds", "train/tokens_per_second", "train/time/step", "train/time/data")


class Killed(BaseException):
    """As if the process were gone."""


class BrokenError(RuntimeError):
    """An error in the middle of training."""


STOPS = {"killed": Killed, "error": BrokenError, "interrupted": KeyboardInterrupt}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(lab: Lab) -> Callable[[str], Run]:
    """The run of a variant without interruption."""
    return cache(lambda variant: lab.fit(f"whole-{variant}", *BASE, *VARIANTS[variant], END))


def run_until(lab: Lab, kind: str, place: int, *words: str) -> None:
    """Run until a number of optimizer steps is done, or until something happens in the batch after them."""
    if kind == "steps":
        assert lab.main("fit", *words, f"--trainer.max_steps={place}") == 0
        return
    step = Stage.training_step

    def training_step(stage: Stage, given: Any, batch_idx: int) -> torch.Tensor:
        if stage.global_step == place:
            raise STOPS[kind]
        return step(stage, given, batch_idx)

    with patch.object(Stage, "training_step", training_step), suppress(Killed, BrokenError, SystemExit):
        lab.main("fit", *words)


def logged(run: Run) -> list[dict[str, float]]:
    """The training rows of metrics.csv without what the clock says; stops validate besides."""
    rows = [{k: v for k, v in row.items() if not k.startswith("val/") and k not in CLOCKS} for row in metrics(run)]
    return [row for row in rows if row.keys() - {"step", "epoch"}]


CHAINS = st.lists(st.tuples(st.sampled_from(["steps", *STOPS]), st.integers(1, STEPS - 1)), min_size=1, max_size=3).map(
    lambda chain: sorted(chain, key=lambda stop: stop[1])
)
NUMBERS = count()


def check_chain(lab: Lab, whole: Callable[[str], Run], variant: str, chain: list[tuple[str, int]]) -> None:
    name = f"{variant}-{next(NUMBERS)}"
    words = [f"--name={name}", *BASE, *VARIANTS[variant], END, "--ckpt_path=auto"]
    for kind, place in chain:
        run_until(lab, kind, place, *words)
    assert lab.main("fit", *words) == 0
    run, expected = Run(lab.folder / name), whole(variant)
    assert logged(run) == logged(expected)
    found, wanted = weights(run), weights(expected)
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(variant=st.sampled_from(sorted(VARIANTS)), chain=CHAINS)
def test_a_chain_of_stops_ends_in_the_uninterrupted_run(lab, whole, variant, chain) -> None:
    check_chain(lab, whole, variant, chain)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(variant=st.sampled_from(sorted(VARIANTS)), chain=CHAINS)
def test_many_chains_of_stops_end_in_the_uninterrupted_run(lab, whole, variant, chain) -> None:
    check_chain(lab, whole, variant, chain)
