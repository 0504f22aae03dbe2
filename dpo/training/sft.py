"""The supervised stage before preferences: the policy learns to give the chosen answers.

Takes `Step`s of examples with one answer each; the same scorer, batches and loop as preference training. Knows no
reference and no loss but the log-likelihood.
"""

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo.data.prompts import Questions
from dpo.data.sampler import Step
from dpo.losses.base import sum_answers
from dpo.models.batch import Batch
from dpo.models.scoring import score
from dpo.training.base import Stage
from dpo.training.metrics import Means
from dpo.training.predict import predicted


class SFT(Stage):
    """Supervised fine-tuning on the chosen answers; the loss of a step is its mean over tokens, in nats."""

    answers = ("chosen",)
    derived = MappingProxyType({"perplexity": ("loss", torch.exp)})
    metrics = ("loss", "token_accuracy", "entropy", "length/chosen")

    @property
    def story(self) -> str:
        """For the model card."""
        return "fine-tuned on the chosen answers"

    def models(self) -> dict[str, PreTrainedModel]:
        """The policy alone."""
        return {"policy": self.policy}

    def total(self, step: Step) -> int:
        """The answer tokens of the optimizer step: every token weighs the same."""
        return step.scored

    def losses(self, batch: Batch, means: Means) -> Tensor:
        """-log p(answer), nats, of every example times its weight; logged per token, without the weights."""
        scores = score(self.policy, batch)
        losses = -sum_answers(scores.logps, batch.lengths)
        tokens, examples = (
            torch.full((), n, dtype=torch.float64, device=losses.device) for n in (len(batch.targets), len(batch))
        )
        sums = [losses.detach(), scores.hits, scores.entropy]
        means.update(
            torch.stack([*(x.double().sum() for x in sums), tokens]), torch.stack([tokens, tokens, tokens, examples])
        )
        return batch.weights * losses

    def judge(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of every answer under the policy, nats; there is no reference and no reward."""
        logps = sum_answers(score(self.policy, batch).logps, batch.lengths)
        nothing = torch.full_like(logps, torch.nan)
        return logps, nothing, nothing

    def tell(self, batch: Batch) -> list[dict[str, Any]]:
        """Log-probabilities of answers."""
        return [{"id": i, "logps": [s]} for i, s in zip(batch.ids, self.judge(batch)[0].tolist(), strict=True)]

    def predict_step(self, step: Step | Questions, batch_idx: int) -> list[dict[str, Any]]:
        """Of questions: answers. Of examples: log-probabilities of the chosen answers."""
        return predicted(step, self, self.models(), self.judge, self.tell)
