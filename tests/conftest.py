"""What every test shares: an offline environment of its own, real data where it exists, and small models.

The environment is set before anything that reads it is imported. Nothing of the person's own caches, tokens
or W&B account is seen by a test.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")
# The main process makes the folder; xdist's workers inherit its name and have a sub-folder each.
if _WORKER == "main":
    os.environ["DPO_TEST_ROOT"] = tempfile.mkdtemp(prefix="dpo-tests-")
_ROOT = Path(os.environ["DPO_TEST_ROOT"])
_SCRATCH = _ROOT / _WORKER

for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
    os.environ.pop(_name, None)
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": str(_SCRATCH / "huggingface"),
    "HF_DATASETS_CACHE": str(_SCRATCH / "datasets"),
    "DPO_CACHE": str(_SCRATCH / "dpo"),
    "WANDB_MODE": "disabled",
    "WANDB_SILENT": "true",
    "MPLBACKEND": "Agg",
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

settings.register_profile("dpo", deadline=None, derandomize=True, database=None)
settings.load_profile("dpo")

# What a family needs beyond the sizes that all share, in its configuration's own words.
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {"num_key_value_heads": 2},
    "gpt_neox": {},
    "gpt2": {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 8},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.1},
    "olmo2": {"num_key_value_heads": 2},
    "bloom": {},
    "bert": {},  # sees what comes next
}


def make_tiny_model(
    family: str = "llama", *, vocab_size: int = 128, seed: int = 0, **config: object
) -> PreTrainedModel:
    """A new random model: float32, 2 layers, 4 heads of 8, in eval mode; pad 0, bos 1, eos 2.

    The weights are ten times larger than usual, so that attention to a wrong token shows in the log-probs.
    """
    sizes: dict[str, object] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        configuration = AutoConfig.for_model(family, **(sizes | FAMILIES[family] | config))
        return AutoModelForCausalLM.from_config(configuration, dtype=torch.float32).eval()


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


@pytest.fixture(scope="session", autouse=True)
def _scratch() -> Iterator[None]:
    _SCRATCH.mkdir(parents=True, exist_ok=True)
    yield
    shutil.rmtree(_SCRATCH, ignore_errors=True)


def pytest_unconfigure() -> None:
    if _WORKER == "main":
        shutil.rmtree(_ROOT, ignore_errors=True)
