"""The LightningModule: a policy, its frozen reference, and one step that scores both and applies the loss.

Takes `Step`s, gives gradients and metrics. Knows nothing of text, files or what the loss and the reference are made of.
"""

from typing import Any

import torch
from jsonargparse import lazy_instance
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel

from dpo import losses, metrics
from dpo.batch import Batch
from dpo.logps import TokenScores, score, sum_answers
from dpo.losses import PairLogps, PreferenceLoss
from dpo.metrics import Means, sums_and_counts
from dpo.models import weights_sha256
from dpo.reference import Copy, Frozen, Model, Reference
from dpo.sampler import Step
from dpo.training import Stage

REFERENCE = "reference."  # prefix of what is never in a checkpoint
# Defaults of the command line, made when they are used.
COPY: Reference = lazy_instance(Copy)
DPO_LOSS: PreferenceLoss = lazy_instance(losses.DPO)


class DPO(Stage):
    """Direct Preference Optimization of a causal language model (Rafailov et al. 2023, arXiv 2305.18290)."""

    answers = ("chosen", "rejected")
    metrics = metrics.NAMES
    reference: Frozen

    def __init__(self, reference: Reference | str = COPY, loss: PreferenceLoss = DPO_LOSS, **options: Any) -> None:
        """Choose what the policy learns from, beside the options of every stage.

        Args:
            reference: What the policy is compared with: a class, or the folder or hub id of another model.
            loss: The preference loss.
            options: See `Stage`.
        """
        super().__init__(**options)
        self.reference_choice = Model(reference) if isinstance(reference, str) else reference
        self.loss = loss
        self.strict_loading = False  # the reference is not in checkpoints; load_state_dict checks the rest

    @property
    def story(self) -> str:
        """For the model card."""
        return f"trained on preferences with the loss `{self.loss}` against a reference ({self.reference.origin})"

    def prepare_models(self) -> None:
        """Make the reference of the policy as it is before it has learned anything."""
        self.reference = self.reference_choice.build(self.policy, self.loader)
        self.reference_sha256 = weights_sha256(self.reference)
        rank_zero_info(f"Reference: {self.reference.origin}, SHA-256 of its weights {self.reference_sha256[:16]}.")
        super().prepare_models()

    def models(self) -> dict[str, PreTrainedModel]:
        """The policy and its reference."""
        return {"policy": self.policy, "reference": self.reference.model}

    def score_pairs(self, batch: Batch) -> tuple[TokenScores, PairLogps]:
        """Score both answers of every pair under policy and reference."""
        policy = score(self.policy, batch)
        ours, theirs = (sum_answers(logps, batch) for logps in (policy.logps, self.reference(batch)))
        lengths = torch.tensor(batch.lengths, dtype=torch.float32, device=self.device)
        return policy, PairLogps(*(values.unflatten(0, (-1, 2)) for values in (ours, theirs, lengths)))

    def losses(self, batch: Batch, means: Means) -> Tensor:
        """The loss of every pair of a micro-batch; everything else about it goes into the means."""
        policy, logps = self.score_pairs(batch)
        losses = self.loss(logps)
        means.update(*sums_and_counts(batch, policy, logps, losses, self.loss.rewards(logps)))
        return losses

    def total(self, step: Step) -> int:
        """The pairs of the optimizer step."""
        return step.pairs

    def predict_step(self, step: Step, batch_idx: int) -> list[dict[str, Any]]:
        """Log-probabilities and implicit rewards of every pair."""
        rows: list[dict[str, Any]] = []
        for batch in step.micro_batches:
            _, logps = self.score_pairs(batch)
            rewards, sums = self.loss.rewards(logps).tolist(), logps.policy.tolist()
            rows += [{"id": i, "logps": s, "rewards": r} for i, s, r in zip(batch.ids, sums, rewards, strict=True)]
        return rows

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Without the reference."""
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if not name.startswith(REFERENCE)}

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        """Everything but the reference must be there, and nothing else.

        Raises:
            ValueError: Weights are missing or left over.
        """
        result = super().load_state_dict(state, strict=False, assign=assign)
        missing = [name for name in result.missing_keys if not name.startswith(REFERENCE)]
        if missing or result.unexpected_keys:
            raise ValueError(
                f"this checkpoint is of another model: weights missing {missing[:3]}, left over "
                f"{result.unexpected_keys[:3]}. Give the --model.policy that the run was started with."
            )
        return result

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember which reference these weights were trained against."""
        checkpoint["reference_sha256"] = self.reference_sha256

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with another reference.

        Raises:
            ValueError: The reference differs from the one of the checkpoint.
        """
        before = checkpoint["reference_sha256"]
        if before != self.reference_sha256:
            raise ValueError(
                f"the checkpoint was trained against a reference with SHA-256 {before[:16]}, this one has "
                f"{self.reference_sha256[:16]}. Give the --model.policy and --model.reference that the run began with."
            )
