"""What is logged of a batch, as sums and counts, so that no batch size and no number of devices can move a mean.

Takes the scores of a batch under policy and reference and the losses of its pairs; gives named means. Names and
definitions are those the field knows from TRL; every mean is over all pairs (or scored tokens) since the last reset.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from dpo.losses import PairLogps
from dpo.losses.base import sum_per_answer
from dpo.models.batch import Batch
from dpo.models.scoring import TokenScores

DerivedMetric = tuple[str, Callable[[Tensor], Tensor]]
METRIC_NAMES = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "token_accuracy",
    "nll/chosen",
    "length/chosen",
    "length/rejected",
    "displaced",
)


def sums_and_counts(
    batch: Batch,
    policy: TokenScores,
    logps: PairLogps,
    losses: Tensor,
    rewards: Tensor,
    names: tuple[str, ...] = METRIC_NAMES,
) -> tuple[Float[Tensor, " names"], Float[Tensor, " names"]]:
    """The sum and the count of every named metric over one batch.

    Per pair: loss, rewards, margins, accuracies (chosen reward strictly above the rejected one), logps (summed over an
    answer's tokens, nats), length (tokens), displaced (the policy holds the chosen answer less likely than the
    reference does).
    Per token: logits (vocabulary mean of the raw logits), entropy (nats, both answers), token_accuracy (the chosen
    answer's token was the most probable one), nll/chosen (nats).
    """
    logits, hits, entropy = (
        sum_per_answer(values, batch.lengths).unflatten(0, (-1, 2)).double().sum(0)
        for values in (policy.mean_logits, policy.top1_hits, policy.entropy)
    )
    chosen, rejected = logps.policy.detach().double().sum(0)
    reward_chosen, reward_rejected = rewards.double().sum(0)
    length_chosen, length_rejected = logps.lengths.double().sum(0)
    pairs = torch.full_like(chosen, len(batch))
    means = {
        "loss": (losses.detach().double().sum(), pairs),
        "rewards/chosen": (reward_chosen, pairs),
        "rewards/rejected": (reward_rejected, pairs),
        "rewards/margins": (reward_chosen - reward_rejected, pairs),
        "rewards/accuracies": ((rewards[:, 0] > rewards[:, 1]).double().sum(), pairs),
        "logps/chosen": (chosen, pairs),
        "logps/rejected": (rejected, pairs),
        "logits/chosen": (logits[0], length_chosen),
        "logits/rejected": (logits[1], length_rejected),
        "entropy": (entropy.sum(), length_chosen + length_rejected),
        "token_accuracy": (hits[0], length_chosen),
        "nll/chosen": (-chosen, length_chosen),
        "length/chosen": (length_chosen, pairs),
        "length/rejected": (length_rejected, pairs),
        "displaced": ((logps.logratios[:, 0] < 0).double().sum(), pairs),
    }
    sums, counts = zip(*(means[name] for name in names), strict=True)
    return torch.stack(sums), torch.stack(counts)


class MetricMeans(Metric):
    """Named means, as one vector of sums and one of counts that add up over batches and devices."""

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(
        self, names: tuple[str, ...] = METRIC_NAMES, derived_metrics: Mapping[str, DerivedMetric] = MappingProxyType({})
    ) -> None:
        """Start from nothing; `derived` makes further values of the means: name -> (name of a mean, function)."""
        super().__init__()
        self.names, self.derived_metrics = names, derived_metrics
        self.add_state("sums", torch.zeros(len(names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(names), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, sums: Tensor, counts: Tensor) -> None:
        """Add one batch."""
        self.sums += sums
        self.counts += counts

    def compute(self) -> dict[str, Tensor]:
        """Name -> mean."""
        means = dict(zip(self.names, (self.sums / self.counts).unbind(), strict=True))
        return means | {name: function(means[source]) for name, (source, function) in self.derived_metrics.items()}
