"""Metrics: every definition on numbers worked out by hand, and means that do not depend on batching."""

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo.losses import DPO, PairLogps
from dpo.models.batch import Batch, Example, collate
from dpo.models.scoring import TokenScores
from dpo.training.metrics import METRIC_NAMES, MetricMeans, sums_and_counts

LOSS = DPO(beta=0.5)


def batch_of(lengths: list[tuple[int, int]]) -> Batch:
    """Return pairs whose answers have these lengths."""
    return collate(
        [Example(f"row:{i}", [1], ([5] * chosen, [6] * rejected)) for i, (chosen, rejected) in enumerate(lengths)]
    )


def scores(logps: list[float], entropy: list[float], logits: list[float], hits: list[float]) -> TokenScores:
    return TokenScores(*torch.tensor([logps, entropy, logits, hits, entropy], dtype=torch.float32))


def measure(lengths: list[tuple[int, int]], policy: TokenScores, reference: list[list[float]]) -> MetricMeans:
    """Return the means of pairs, with rewards and losses by `LOSS`."""
    batch = batch_of(lengths)
    per_token = [torch.full((n,), lp / n) for lp, n in zip(chain(*reference), batch.lengths, strict=True)]
    logps = PairLogps(policy.logps, torch.cat(per_token), policy.collision_entropy, batch.lengths)
    means = MetricMeans()
    means.update(*sums_and_counts(batch, policy, logps, LOSS(logps), LOSS.rewards(logps)))
    return means


def test_every_metric_is_as_defined() -> None:
    # Pair 1: chosen of 2 tokens, rejected of 1. Pair 2: chosen of 1, rejected of 2.
    policy = scores(
        logps=[-1, -2, -4, -3, -1, -1],
        entropy=[1, 2, 3, 4, 5, 6],
        logits=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
        hits=[1, 0, 1, 1, 0, 0],
    )
    reference = [[-5.0, -4.0], [-2.0, -3.0]]
    measured = {name: value.item() for name, value in measure([(2, 1), (1, 2)], policy, reference).compute().items()}
    assert tuple(measured) == METRIC_NAMES
    # Summed log-probs: chosen -3 and -3, rejected -4 and -2. Log-ratios: chosen 2 and -1, rejected 0 and 1.
    rewards = {"chosen": 0.5 * (2 - 1) / 2, "rejected": 0.5 * (0 + 1) / 2}  # beta 0.5
    assert measured == pytest.approx(
        {
            "loss": sum(-torch.tensor(0.5 * h).sigmoid().log().item() for h in (2 - 0, -1 - 1)) / 2,
            "rewards/chosen": rewards["chosen"],
            "rewards/rejected": rewards["rejected"],
            "rewards/margins": rewards["chosen"] - rewards["rejected"],
            "rewards/accuracies": 1 / 2,
            "logps/chosen": (-3 - 3) / 2,
            "logps/rejected": (-4 - 2) / 2,
            "logits/chosen": (0.1 + 0.2 + 0.4) / 3,  # over tokens, not over pairs
            "logits/rejected": (0.3 + 0.5 + 0.6) / 3,
            "entropy": (1 + 2 + 3 + 4 + 5 + 6) / 6,
            "token_accuracy": (1 + 0 + 1) / 3,  # of the chosen answers
            "nll/chosen": (1 + 2 + 3) / 3,
            "length/chosen": 3 / 2,
            "length/rejected": 3 / 2,
            "displaced": 1 / 2,  # the second pair's chosen log-ratio is -1
        }
    )


def test_a_tie_does_not_count_as_accurate() -> None:
    policy = scores([-1, -1], [0, 0], [0, 0], [0, 0])
    assert measure([(1, 1)], policy, [[-1.0, -1.0]]).compute()["rewards/accuracies"] == 0


pair = st.tuples(st.integers(1, 4), st.integers(1, 4))


@given(st.lists(pair, min_size=2, max_size=8), st.data())
def test_means_do_not_depend_on_batching(lengths: list[tuple[int, int]], data: st.DataObject) -> None:
    tokens = sum(map(sum, lengths))
    values = torch.rand(5, tokens, generator=torch.Generator().manual_seed(tokens))
    reference = torch.rand(len(lengths), 2, generator=torch.Generator().manual_seed(1)).tolist()
    together = measure(lengths, TokenScores(*-values), reference)

    cut = data.draw(st.integers(1, len(lengths) - 1))
    first = sum(map(sum, lengths[:cut]))
    apart = measure(lengths[:cut], TokenScores(*-values[:, :first]), reference[:cut])
    rest = measure(lengths[cut:], TokenScores(*-values[:, first:]), reference[cut:])
    apart.update(rest.sums, rest.counts)  # as between devices

    for name, expected in together.compute().items():
        torch.testing.assert_close(apart.compute()[name], expected, rtol=1e-6, atol=1e-6)


def test_reset_discards_the_counts() -> None:
    means = measure([(1, 1)], scores([-1, -2], [0, 0], [0, 0], [0, 0]), [[-1.0, -1.0]])
    means.reset()
    assert means.counts.sum() == 0
