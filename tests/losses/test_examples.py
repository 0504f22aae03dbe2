"""The examples in docstrings run and print what they say."""

import doctest
import gc
from importlib import import_module
from pkgutil import iter_modules

import pytest

import dpo.losses
from dpo.losses import Divergence, PairLogps, PreferenceLoss

MODULES = [f"dpo.losses.{module.name}" for module in iter_modules(dpo.losses.__path__)]
CLASSES = [cls for cls in map(vars(dpo.losses).get, dpo.losses.__all__) if issubclass(cls, PreferenceLoss | Divergence)]


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module: str) -> None:
    results = doctest.testmod(import_module(module))
    gc.collect()  # an example's own loss would otherwise stay among the subclasses that other tests list
    assert results.failed == 0


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls is not Divergence], ids=lambda cls: cls.__name__)
def test_every_loss_and_divergence_has_an_example_with_its_number(cls: type) -> None:
    (test,) = (test for test in doctest.DocTestFinder(recurse=False).find(cls) if test.examples)
    assert "tensor(" in test.examples[-1].want


def test_examples_are_found_behind_type_checks() -> None:
    """`from_sums` is a class method that the shape checks wrap while tests run."""
    found = doctest.DocTestFinder().find(import_module("dpo.losses.base"))
    assert {test.name.rpartition(".")[2] for test in found if test.examples} >= {
        PairLogps.from_sums.__name__,
        PreferenceLoss.__name__,
    }
