"""Every loss that TRL has too, against TRL's trainer: twenty steps, equal losses, rewards and gradients.

What differs between the two on purpose is left out by name: TRL ignores label smoothing with its sigmoid loss, logs
log-probabilities as LD-DPO weighs them (ours are those of the policy), and takes the supervised term over the tokens of
a micro-batch, so that there a pair by itself is compared.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest

from dpo import quickstart
from tests.support.trl import BATCH, METRICS, RATES, compare, fitting, random_model
from tests.support.trl import _own_arguments as _own_arguments

EVERYTHING = METRICS | RATES
REWARDS = [f"rewards/{what}" for what in ("chosen", "rejected", "margins", "accuracies")]
OF_PAIRS = {name: name for name in ("loss", "grad_norm", *REWARDS)}  # one pair at a time: means over pairs, not tokens
ONE_BY_ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": BATCH}
PAIR = '[{"class_path": "DPO"}, {"class_path": "%s"}]'

Case = tuple[str, dict[str, object], dict[str, object], Mapping[str, str]]  # loss, its options, TRL's, what is compared
CASES: list[Case] = [
    ("Hinge", {}, {"loss_type": "hinge"}, EVERYTHING),
    ("IPO", {}, {"loss_type": "ipo"}, EVERYTHING),
    ("EXO", {"label_smoothing": 0.01}, {"loss_type": "exo_pair", "label_smoothing": 0.01}, EVERYTHING),
    ("RobustDPO", {"label_smoothing": 0.2}, {"loss_type": "robust", "label_smoothing": 0.2}, EVERYTHING),
    ("NCA", {}, {"loss_type": "nca_pair"}, EVERYTHING),
    ("BCO", {}, {"loss_type": "bco_pair"}, EVERYTHING),
    ("SPPO", {}, {"loss_type": "sppo_hard"}, EVERYTHING),
    ("APOZero", {}, {"loss_type": "apo_zero"}, EVERYTHING),
    ("APODown", {}, {"loss_type": "apo_down"}, EVERYTHING),
    ("AOT", {"label_smoothing": 0.1}, {"loss_type": "aot", "label_smoothing": 0.1}, EVERYTHING),
    ("AOTUnpaired", {}, {"loss_type": "aot_unpaired"}, EVERYTHING),
    ("DiscoPOP", {"tau": 0.1}, {"loss_type": "discopop", "discopop_tau": 0.1}, EVERYTHING),
    ("LengthNormalizedDPO", {"beta": 2.0}, {"loss_type": "sigmoid_norm", "beta": 2.0}, EVERYTHING),
    ("DPO", {"divergence": "ForwardKL"}, {"f_divergence_type": "forward_kl"}, EVERYTHING),
    ("DPO", {"divergence": "JensenShannon"}, {"f_divergence_type": "js_divergence"}, EVERYTHING),
    (
        "IPO",
        {"divergence": "Alpha", "divergence.alpha": 0.7},
        {"loss_type": "ipo", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
        EVERYTHING,
    ),
    ("WPO", {"loss": "DPO"}, {"use_weighting": True}, EVERYTHING),
    (
        "LD",
        {"loss": "DPO", "alpha": 0.3},
        {"ld_alpha": 0.3},
        {name: own for name, own in EVERYTHING.items() if not name.startswith("logps")},
    ),
    (
        "Sum",
        {"losses": PAIR % "BCO", "weights": "[0.8, 0.2]"},
        {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2]},
        EVERYTHING,
    ),
    (
        "Sum",
        {"losses": PAIR % "NLL", "weights": "[1.0, 0.5]"},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], **ONE_BY_ONE},
        OF_PAIRS,
    ),
]
FAST = (1, 16)  # in the default suite; all others are run by `make test-slow`


@pytest.mark.parametrize(
    ("name", "options", "trls", "compared"),
    [
        pytest.param(*case, id=f"{case[0]}-{case[2]}", marks=() if i in FAST else pytest.mark.slow)
        for i, case in enumerate(CASES)
    ],
)
def test_twenty_steps_are_those_of_trl(
    name: str, options: dict[str, object], trls: dict[str, object], compared: Mapping[str, str], tmp_path: Path
) -> None:
    policy = random_model(tmp_path / "policy", "llama")
    rows = fitting(quickstart.draw_rows(seed=5, n=200), policy, 20 * BATCH)
    loss = {"model.loss": name, **{f"model.loss.{key}": value for key, value in options.items()}}
    whole = {"data.max_tokens": "null"} if name.startswith("AOT") else {}
    # Adam divides by the size of gradients: where some of them vanish, as under Jensen-Shannon, it multiplies rounding
    steps = ("SGD", 0.1) if "js_divergence" in trls.values() else ("AdamW", 1e-3)
    compare(tmp_path, policy, rows, *steps, loss=loss | whole, trls=trls, names=compared)
