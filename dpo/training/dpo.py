"""The LightningModule: a policy, its frozen reference, and one step that scores both and applies the loss.

Takes `Step`s, gives gradients and metrics. Knows nothing of text, files or what the loss and the reference are made of.
"""

from typing import Any

import torch
from jsonargparse import lazy_instance
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel

from dpo import losses
from dpo.data.prompts import PromptBatch
from dpo.data.sampler import Step
from dpo.losses import PairLogps, PreferenceLoss
from dpo.models.batch import Batch
from dpo.models.reference import Copy, Model, Nothing, Reference, ReferenceModel
from dpo.models.scoring import TokenScores, score
from dpo.training import metrics
from dpo.training.base import Stage
from dpo.training.metrics import MetricMeans, sums_and_counts
from dpo.training.predict import predict_rows

DEFAULT_LOSS: PreferenceLoss = lazy_instance(losses.DPO)  # the default of the command line, made when it is used

WHOLE_BATCH_HINT = "Use --data.max_tokens null, one device and --trainer.accumulate_grad_batches 1."


def resolve_reference(reference: Reference | str | None, loss: PreferenceLoss) -> Reference:
    """The reference that a loss is to have.

    Raises:
        ValueError: It needs one and there is to be none, or the other way round.
    """
    if isinstance(reference, str):
        reference = Model(reference)
    default = Copy() if loss.uses_reference else Nothing()
    chosen = reference or default
    if isinstance(chosen, Nothing) == loss.uses_reference:
        needs = "needs a reference" if loss.uses_reference else "takes no reference"
        raise ValueError(f"the loss {loss} {needs}, got {chosen}: leave --model.reference out for {default}.")
    return chosen


class DPO(Stage):
    """Direct Preference Optimization of a causal language model (Rafailov et al. 2023, arXiv 2305.18290)."""

    answer_sides = ("chosen", "rejected")
    metric_names: tuple[str, ...] = metrics.METRIC_NAMES
    reference: ReferenceModel

    def __init__(
        self, reference: Reference | str | None = None, loss: PreferenceLoss = DEFAULT_LOSS, **options: Any
    ) -> None:
        """Choose what the policy learns from, beside the options of every stage.

        Args:
            reference: What the policy is compared with: a class, or the folder or hub id of another model. By default
                a frozen copy of the policy for a loss that uses a reference, and nothing for one that does not.
            loss: The preference loss.
            options: See `Stage`.

        Raises:
            ValueError: The loss needs a reference and there is to be none, or the other way round.
        """
        if not loss.uses_reference:
            self.metric_names = tuple(name for name in metrics.METRIC_NAMES if name != "displaced")
        super().__init__(**options)
        self.reference_choice, self.loss = resolve_reference(reference, loss), loss

    @property
    def card_summary(self) -> str:
        """For the model card."""
        return f"trained on preferences with the loss `{self.loss}` against a reference ({self.reference.description})"

    def configure_model(self) -> None:
        """Read and make the models, once; before every stage, let the reference see what it will be asked."""
        super().configure_model()
        self.reference.prepare_for_stage(self)

    def prepare_models(self) -> None:
        """Make the reference of the policy as it is before it has learned anything."""
        self.reference = self.reference_choice.build_reference(self.policy, self.loader)
        weights = f", SHA-256 of its weights {self.reference.sha256[:16]}" if self.reference.sha256 else ""
        rank_zero_info(f"Reference: {self.reference.description}{weights}.")
        super().prepare_models()

    def models_by_role(self) -> dict[str, PreTrainedModel]:
        """The policy and its reference."""
        return {"policy": self.policy, **self.reference.owned_models}

    def score_pairs(self, batch: Batch) -> tuple[TokenScores, PairLogps]:
        """Score both answers of every pair under policy and reference."""
        policy = score(self.policy, batch)
        on_policy = policy.logps.detach() + policy.collision_entropy
        return policy, PairLogps(policy.logps, self.reference(batch), on_policy, batch.lengths, batch.margins)

    def score_answers(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability under policy and reference, nats, and reward of every answer, as if beside itself."""
        _, alone = self.score_pairs(batch)
        ours, theirs, draws = (
            torch.cat([part for part in values.split(batch.lengths) for _ in range(2)])
            for values in (alone.policy_token_logps.detach(), alone.reference_token_logps, alone.on_policy_log_weights)
        )
        logps = PairLogps(ours, theirs, draws, tuple(n for n in batch.lengths for _ in range(2)))
        return logps.policy[:, 0], logps.reference[:, 0], self.loss.rewards(logps)[:, 0]

    def losses(self, batch: Batch, means: MetricMeans) -> Tensor:
        """The loss of every pair of a micro-batch; everything else about it goes into the means."""
        policy, logps = self.score_pairs(batch)
        losses = batch.weights * self.loss(logps)
        means.update(*sums_and_counts(batch, policy, logps, losses, self.loss.rewards(logps), self.metric_names))
        return losses

    def on_before_batch_transfer(self, batch: Step | PromptBatch, dataloader_idx: int) -> Step | PromptBatch:
        """Refuse pairs that say more, or less, than the loss can use.

        Raises:
            ValueError: They have margins, or weights, and the loss takes none; or it takes margins and they have none.
        """
        for micro in batch.micro_batches if isinstance(batch, Step) else ():
            given = not micro.margins.isnan().any()
            if len(micro) and given != self.loss.uses_margins:
                raise ValueError(
                    f"the data give margins, and {self.loss} takes none: choose --model.loss ODPO, or "
                    "--data.columns.margin= (nothing)."
                    if given
                    else f"{self.loss} takes margins, and the data give none: name their column with "
                    "--data.columns.margin (--data PreferencePairs)."
                )
            if self.loss.needs_whole_batch and (micro.weights != 1).any():
                raise ValueError(
                    f"{self.loss} sorts all pairs together and takes no weights of single pairs: choose another "
                    "--model.loss, or --data.columns.weight= (nothing)."
                )
        return batch

    def on_train_batch_start(self, batch: Step, batch_idx: int) -> None:
        """Refuse a step in parts where the loss is one of the whole step.

        Raises:
            ValueError: It was cut: by `max_tokens`, over devices, or into accumulated batches.
        """
        here = len(batch.micro_batches[0])
        if self.loss.needs_whole_batch and here < batch.num_examples:
            raise ValueError(
                f"{self.loss} sorts all pairs of an optimizer step together: expected {batch.num_examples} in one piece, "
                f"got a piece of {here}. {WHOLE_BATCH_HINT}"
            )

    def on_validation_batch_start(self, batch: Step, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As in training."""
        self.on_train_batch_start(batch, batch_idx)

    def on_test_batch_start(self, batch: Step, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As in training."""
        self.on_train_batch_start(batch, batch_idx)

    def loss_denominator(self, step: Step) -> int:
        """The pairs of the optimizer step."""
        return step.num_examples

    def prediction_rows(self, batch: Batch) -> list[dict[str, Any]]:
        """Log-probabilities and implicit rewards of pairs."""
        _, logps = self.score_pairs(batch)
        rewards, sums = self.loss.rewards(logps).tolist(), logps.policy.tolist()
        return [{"id": i, "logps": s, "rewards": r} for i, s, r in zip(batch.ids, sums, rewards, strict=True)]

    def predict_step(self, step: Step | PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Of questions: answers. Of pairs: log-probabilities and implicit rewards."""
        return predict_rows(step, self, self.models_by_role(), self.score_answers, self.prediction_rows)

    def checkpointed_names(self) -> set[str]:
        """Beside what trains, a reference that moves."""
        return super().checkpointed_names() | {f"reference.{name}" for name in self.reference.checkpointed_names()}

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Step; a reference that moves follows."""
        super().optimizer_step(*arguments, **options)
        self.reference.update_from(self.policy, self.trainer.global_step + 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember which reference these weights were trained against."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["reference_sha256"] = self.reference.sha256

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with another reference.

        Raises:
            ValueError: The reference differs from the one of the checkpoint, or that has none.
        """
        before = checkpoint.get("reference_sha256")
        if before is None:
            raise ValueError(
                "this checkpoint is of no preference stage. To train on what a supervised stage has left, give its "
                "export: --model.policy runs/NAME/export."
            )
        if before != self.reference.sha256:
            raise ValueError(
                f"the checkpoint was trained against a reference with SHA-256 {before[:16] or 'none'}, this one has "
                f"{self.reference.sha256[:16] or 'none'}. Give the --model.policy and --model.reference "
                "that the run began with."
            )
        super().on_load_checkpoint(checkpoint)
