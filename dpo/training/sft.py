"""The supervised stage before preference training: the policy learns to give the chosen answers."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from dpo.data.prompts import PromptBatch
from dpo.data.sampler import Step
from dpo.losses.base import sum_per_answer
from dpo.models.batch import Batch
from dpo.models.origin import PolicyOrigin
from dpo.models.scoring import score
from dpo.training.base import Stage
from dpo.training.metrics import DerivedMetric, MetricMeans
from dpo.training.predict import predict_rows


class SFT(Stage):
    """Supervised fine-tuning on the chosen answers; the loss of a step is its mean over answer tokens, in nats."""

    answer_sides = ("chosen",)
    derived_metrics: ClassVar[Mapping[str, DerivedMetric]] = {"perplexity": ("loss", torch.exp)}
    metric_names = ("loss", "token_accuracy", "entropy", "length/chosen")

    @property
    def card_summary(self) -> str:
        """How the policy is trained, as a predicate for the model card."""
        return "fine-tuned on the chosen answers"

    def origin(self) -> PolicyOrigin:
        """Say how the policy came about: the base model stands in for a reference."""
        return PolicyOrigin(self.policy_path, self.policy_path, has_reference=False, format=self.encoder.format)

    def models_by_role(self) -> dict[str, PreTrainedModel]:
        """Return the policy, the only model of this stage."""
        return {"policy": self.policy}

    def loss_denominator(self, step: Step) -> int:
        """Return the number of answer tokens of the optimizer step: every token weighs the same."""
        return step.num_scored_tokens

    def losses(self, batch: Batch, means: MetricMeans) -> Float[Tensor, " examples"]:
        """Return -log p(answer) in nats times the weight of every example; log the means per token, unweighted."""
        scores = score(self.policy, batch)
        losses = -sum_per_answer(scores.logps, batch.lengths)
        tokens, examples = (
            torch.full((), n, dtype=torch.float64, device=losses.device) for n in (len(batch.targets), len(batch))
        )
        sums = [losses.detach(), scores.top1_hits, scores.entropy]
        means.update(
            torch.stack([*(x.double().sum() for x in sums), tokens]), torch.stack([tokens, tokens, tokens, examples])
        )
        return batch.weights * losses

    def score_answers(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the log-probability of every answer under the policy in nats; NaN for reference and reward."""
        logps = sum_per_answer(score(self.policy, batch).logps, batch.lengths)
        nothing = torch.full_like(logps, torch.nan)
        return logps, nothing, nothing

    def prediction_rows(self, batch: Batch) -> list[dict[str, Any]]:
        """Return the log-probabilities of answers."""
        logps = self.score_answers(batch)[0].tolist()
        return [{"id": i, "logps": [s]} for i, s in zip(batch.ids, logps, strict=True)]

    def predict_step(self, step: Step | PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return answers to prompts, or log-probabilities of the chosen answers of examples."""
        return predict_rows(step, self, self.models_by_role(), self.score_answers, self.prediction_rows)
