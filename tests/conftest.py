"""What every test shares: an offline environment of its own, real data where it exists, and small models."""

from tests.support.environment import ROOT, SCRATCH, WORKER  # before anything that reads it

# isort: split
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import PreTrainedModel

from tests.support.models import make_tiny_model

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

settings.register_profile("dpo", deadline=None, derandomize=True, database=None)
settings.load_profile("dpo")


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """`tiny_model("mistral", vocab_size=64, seed=1, sliding_window=4)`: see `make_tiny_model`."""
    return make_tiny_model


def _folder(variable: str) -> Path:
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{variable} is not set (CONTRIBUTING.md says to what)")
    return Path(path).resolve(strict=True)


@pytest.fixture(scope="session")
def hh_rlhf() -> Path:
    """Folder of real dialogues, `<subset>/{train,test}.jsonl.gz`."""
    return _folder("DPO_HH_RLHF")


@pytest.fixture(scope="session")
def pretrained() -> Path:
    """Hugging Face folder of a small pretrained Llama."""
    return _folder("DPO_PRETRAINED")


@pytest.fixture(scope="session")
def rewardbench() -> Path:
    """File of real rows in RewardBench's layout: LLMBar."""
    return _folder("DPO_REWARDBENCH")


@pytest.fixture(scope="session", autouse=True)
def _scratch() -> Iterator[None]:
    SCRATCH.mkdir(parents=True, exist_ok=True)
    yield
    shutil.rmtree(SCRATCH, ignore_errors=True)


def pytest_unconfigure() -> None:
    if WORKER == "main":
        shutil.rmtree(ROOT, ignore_errors=True)
