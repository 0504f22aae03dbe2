"""Every loss that TRL has too, against TRL's trainer: equal losses, rewards and gradient norms over twenty steps.

Intended differences are left out: TRL ignores label smoothing with its sigmoid loss; it logs the log-probabilities that
LD-DPO has weighted, where this project logs those of the policy; and it averages the supervised term over the tokens of
a micro-batch, so that term is compared with one pair per micro-batch.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest

from dpo import quickstart
from tests.support.trl import BATCH, METRICS, RATES, compare, fitting, random_model
from tests.support.trl import _own_arguments as _own_arguments

ALL_METRICS = METRICS | RATES
REWARDS = [f"rewards/{what}" for what in ("chosen", "rejected", "margins", "accuracies")]
PAIR_METRICS = {name: name for name in ("loss", "grad_norm", *REWARDS)}  # with one pair at a time, means over pairs
ONE_BY_ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": BATCH}
PAIR = '[{"class_path": "DPO"}, {"class_path": "%s"}]'

Case = tuple[str, dict[str, object], dict[str, object], Mapping[str, str]]  # loss, its options, TRL's, what is compared
CASES: list[Case] = [
    ("Hinge", {}, {"loss_type": "hinge"}, ALL_METRICS),
    ("IPO", {}, {"loss_type": "ipo"}, ALL_METRICS),
    ("EXO", {"label_smoothing": 0.01}, {"loss_type": "exo_pair", "label_smoothing": 0.01}, ALL_METRICS),
    ("RobustDPO", {"label_smoothing": 0.2}, {"loss_type": "robust", "label_smoothing": 0.2}, ALL_METRICS),
    ("NCA", {}, {"loss_type": "nca_pair"}, ALL_METRICS),
    ("BCO", {}, {"loss_type": "bco_pair"}, ALL_METRICS),
    ("SPPO", {}, {"loss_type": "sppo_hard"}, ALL_METRICS),
    ("APOZero", {}, {"loss_type": "apo_zero"}, ALL_METRICS),
    ("APODown", {}, {"loss_type": "apo_down"}, ALL_METRICS),
    ("AOT", {"label_smoothing": 0.1}, {"loss_type": "aot", "label_smoothing": 0.1}, ALL_METRICS),
    ("AOTUnpaired", {}, {"loss_type": "aot_unpaired"}, ALL_METRICS),
    ("DiscoPOP", {"tau": 0.1}, {"loss_type": "discopop", "discopop_tau": 0.1}, ALL_METRICS),
    ("LengthNormalizedDPO", {"beta": 2.0}, {"loss_type": "sigmoid_norm", "beta": 2.0}, ALL_METRICS),
    ("DPO", {"divergence": "ForwardKL"}, {"f_divergence_type": "forward_kl"}, ALL_METRICS),
    ("DPO", {"divergence": "JensenShannon"}, {"f_divergence_type": "js_divergence"}, ALL_METRICS),
    (
        "IPO",
        {"divergence": "Alpha", "divergence.alpha": 0.7},
        {"loss_type": "ipo", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
        ALL_METRICS,
    ),
    ("WPO", {"loss": "DPO"}, {"use_weighting": True}, ALL_METRICS),
    (
        "LD",
        {"loss": "DPO", "alpha": 0.3},
        {"ld_alpha": 0.3},
        {name: own for name, own in ALL_METRICS.items() if not name.startswith("logps")},
    ),
    (
        "Sum",
        {"losses": PAIR % "BCO", "weights": "[0.8, 0.2]"},
        {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2]},
        ALL_METRICS,
    ),
    (
        "Sum",
        {"losses": PAIR % "NLL", "weights": "[1.0, 0.5]"},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], **ONE_BY_ONE},
        PAIR_METRICS,
    ),
]
FAST = (1, 16)  # in the default suite; all others are run by `make test-slow`


@pytest.mark.parametrize(
    ("name", "options", "trl_options", "compared"),
    [
        pytest.param(*case, id=f"{case[0]}-{case[2]}", marks=() if i in FAST else pytest.mark.slow)
        for i, case in enumerate(CASES)
    ],
)
def test_twenty_steps_are_those_of_trl(
    name: str, options: dict[str, object], trl_options: dict[str, object], compared: Mapping[str, str], tmp_path: Path
) -> None:
    policy = random_model(tmp_path / "policy", "llama")
    rows = fitting(quickstart.draw_rows(seed=5, n=200), policy, 20 * BATCH)
    loss = {"model.loss": name, **{f"model.loss.{key}": value for key, value in options.items()}}
    whole = {"data.max_tokens": "null"} if name.startswith("AOT") else {}
    # Adam divides by the size of a gradient, which amplifies rounding where gradients vanish, as with Jensen-Shannon.
    steps = ("SGD", 0.1) if "js_divergence" in trl_options.values() else ("AdamW", 1e-3)
    compare(tmp_path, policy, rows, *steps, loss=loss | whole, trls=trl_options, names=compared)
