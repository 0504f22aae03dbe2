"""Metrics of preference training, as sums and counts.

Sums and counts add up over micro-batches and devices, so a mean depends on neither batch size nor number of devices.
Names and definitions are those of TRL. Every mean is over all pairs (or answer tokens) since the last reset.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from dpo.losses import PairLogps
from dpo.losses.base import sum_per_answer
from dpo.models.batch import Batch
from dpo.models.scoring import TokenScores

DerivedMetric = tuple[str, Callable[[Tensor], Tensor]]
"""Name of a mean, and a function of that mean."""
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
    """Return the sum and the count of every named metric over one batch.

    Means over pairs: loss; rewards of chosen and rejected answers, their margins and accuracies (the chosen reward is
    strictly higher); logps (summed over the tokens of an answer, nats); length (tokens); displaced (the chosen answer
    is less likely under the policy than under the reference).

    Means over answer tokens: logits (mean of the raw logits over the vocabulary); entropy (of both answers, nats);
    token_accuracy (the token of the chosen answer is the most probable one); nll/chosen (nats).

    Args:
        batch: The pairs.
        policy: Scores of their answer tokens under the policy.
        logps: Their log-probabilities under policy and reference.
        losses: Loss of every pair.
        rewards: Implicit rewards, pairs x 2.
        names: Metrics to return, in this order.
    """
    wide = sum_dtype()
    logits, hits, entropy = (
        sum_per_answer(values, batch.lengths).unflatten(0, (-1, 2)).to(wide).sum(0)
        for values in (policy.mean_logits, policy.top1_hits, policy.entropy)
    )
    chosen, rejected = logps.policy.detach().to(wide).sum(0)
    reward_chosen, reward_rejected = rewards.to(wide).sum(0)
    length_chosen, length_rejected = logps.lengths.to(wide).sum(0)
    pairs = torch.full_like(chosen, len(batch))
    means = {
        "loss": (losses.detach().to(wide).sum(), pairs),
        "rewards/chosen": (reward_chosen, pairs),
        "rewards/rejected": (reward_rejected, pairs),
        "rewards/margins": (reward_chosen - reward_rejected, pairs),
        "rewards/accuracies": ((rewards[:, 0] > rewards[:, 1]).to(wide).sum(), pairs),
        "logps/chosen": (chosen, pairs),
        "logps/rejected": (rejected, pairs),
        "logits/chosen": (logits[0], length_chosen),
        "logits/rejected": (logits[1], length_rejected),
        "entropy": (entropy.sum(), length_chosen + length_rejected),
        "token_accuracy": (hits[0], length_chosen),
        "nll/chosen": (-chosen, length_chosen),
        "length/chosen": (length_chosen, pairs),
        "length/rejected": (length_rejected, pairs),
        "displaced": ((logps.logratios[:, 0] < 0).to(wide).sum(), pairs),
    }
    sums, counts = zip(*(means[name] for name in names), strict=True)
    return torch.stack(sums), torch.stack(counts)


def sum_dtype() -> torch.dtype:
    """Return the type that sums are kept in: float64, which Apple's GPUs lack."""
    return torch.float32 if torch.backends.mps.is_available() else torch.float64


class MetricMeans(Metric):
    """Named means, held as a vector of sums and a vector of counts that add up over batches and devices."""

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(
        self, names: tuple[str, ...] = METRIC_NAMES, derived_metrics: Mapping[str, DerivedMetric] | None = None
    ) -> None:
        """Start with sums and counts of zero.

        Args:
            names: Names of the means, in the order of the vectors.
            derived_metrics: Metrics that are computed from one of the means, by name.
        """
        super().__init__()
        self.names = names
        self.derived_metrics = derived_metrics or {}
        self.add_state("sums", torch.zeros(len(names), dtype=sum_dtype()), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(names), dtype=sum_dtype()), dist_reduce_fx="sum")

    def update(self, sums: Tensor, counts: Tensor) -> None:
        """Add the sums and counts of one batch."""
        self.sums += sums
        self.counts += counts

    def copy_state(self) -> dict[str, Tensor]:
        """Return copies of the sums and counts of this process."""
        return {"sums": self.sums.clone(), "counts": self.counts.clone()}

    def restore(self, state: Mapping[str, Tensor], where: Tensor) -> None:
        """Go back to copied sums and counts if `where` is 1, and change nothing if it is 0; the host does not wait."""
        for name, value in state.items():
            now = getattr(self, name)
            setattr(self, name, torch.where(where.to(now.device).bool(), value, now))

    def compute(self) -> dict[str, Tensor]:
        """Return every mean and derived metric by name."""
        means = dict(zip(self.names, (self.sums / self.counts).unbind(), strict=True))
        return means | {name: function(means[source]) for name, (source, function) in self.derived_metrics.items()}
