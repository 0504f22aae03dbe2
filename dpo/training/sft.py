"""The supervised stage before preferences: the policy learns to give the chosen answers.

Takes `Step`s of examples with one answer each; the same scorer, batches and loop as preference training. Knows no
reference and no loss but the log-likelihood.
"""

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo.data.prompts import PromptBatch
from dpo.data.sampler import Step
from dpo.losses.base import sum_per_answer
from dpo.models.batch import Batch
from dpo.models.scoring import score
from dpo.training.base import Stage
from dpo.training.metrics import MetricMeans
from dpo.training.predict import predict_rows


class SFT(Stage):
    """Supervised fine-tuning on the chosen answers; the loss of a step is its mean over tokens, in nats."""

    answer_sides = ("chosen",)
    derived_metrics = MappingProxyType({"perplexity": ("loss", torch.exp)})
    metric_names = ("loss", "token_accuracy", "entropy", "length/chosen")

    @property
    def card_summary(self) -> str:
        """For the model card."""
        return "fine-tuned on the chosen answers"

    def models_by_role(self) -> dict[str, PreTrainedModel]:
        """The policy alone."""
        return {"policy": self.policy}

    def loss_denominator(self, step: Step) -> int:
        """The answer tokens of the optimizer step: every token weighs the same."""
        return step.num_scored_tokens

    def losses(self, batch: Batch, means: MetricMeans) -> Tensor:
        """-log p(answer), nats, of every example times its weight; logged per token, without the weights."""
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
        """Log-probability of every answer under the policy, nats; there is no reference and no reward."""
        logps = sum_per_answer(score(self.policy, batch).logps, batch.lengths)
        nothing = torch.full_like(logps, torch.nan)
        return logps, nothing, nothing

    def prediction_rows(self, batch: Batch) -> list[dict[str, Any]]:
        """Log-probabilities of answers."""
        return [{"id": i, "logps": [s]} for i, s in zip(batch.ids, self.score_answers(batch)[0].tolist(), strict=True)]

    def predict_step(self, step: Step | PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Of questions: answers. Of examples: log-probabilities of the chosen answers."""
        return predict_rows(step, self, self.models_by_role(), self.score_answers, self.prediction_rows)
