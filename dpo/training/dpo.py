"""Preference training: a policy, its reference, and one step that scores both and applies the loss."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel

from dpo import losses
from dpo.data.prompts import Prompt, PromptBatch, encode_answers
from dpo.data.sampler import Step
from dpo.losses import PairLogps, PreferenceLoss
from dpo.models.batch import Batch, Example, collate
from dpo.models.lora import Adapter, AsLoaded
from dpo.models.origin import PolicyOrigin
from dpo.models.reference import REFERENCE_NAMES, Copy, Model, Nothing, Reference, ReferenceModel
from dpo.models.scoring import TokenScores, score
from dpo.training import metrics
from dpo.training.base import Stage
from dpo.training.hyperparameters import to_plain
from dpo.training.metrics import MetricMeans, sums_and_counts
from dpo.training.nonfinite import OnNonFinite
from dpo.training.predict import predict_rows
from dpo.training.resuming import FixedOptions
from dpo.training.schedules import default_optimizer
from dpo.training.scored_pairs import ScoredPairs

WHOLE_BATCH_HINT = "Use --data.max_tokens null, one device and --trainer.accumulate_grad_batches 1."


def resolve_reference(reference: Reference | str | None, loss: PreferenceLoss) -> Reference:
    """Return the reference to train a loss against.

    Raises:
        TypeError: It is of another kind.
        ValueError: The loss needs a reference and there is to be none, or the other way round.
    """
    if isinstance(reference, str):
        if reference in REFERENCE_NAMES:
            raise ValueError(f"reference: expected {reference}() as an object, or a folder or hub id, got the name.")
        reference = Model(reference)
    if not isinstance(reference, Reference | None):
        raise TypeError(f"reference: expected an object such as Copy(), or a folder or hub id, got {reference!r}.")
    default = Copy() if loss.uses_reference else Nothing()
    chosen = reference or default
    if isinstance(chosen, Nothing) == loss.uses_reference:
        needs = "needs a reference" if loss.uses_reference else "takes no reference"
        raise ValueError(f"the loss {loss} {needs}, got {chosen}: leave --model.reference out for {default}.")
    return chosen


class DPO(Stage):
    """Direct Preference Optimization of a causal language model (Rafailov et al. 2023, arXiv 2305.18290).

    Example:
        >>> from dpo import DPO, HHRLHF, losses
        >>> model = DPO("HuggingFaceTB/SmolLM2-135M", loss=losses.DPO(beta=0.1))
        >>> model.loss
        DPO(beta=0.1, label_smoothing=0.0, divergence=ReverseKL())
    """

    answer_sides = ("chosen", "rejected")
    metric_names: tuple[str, ...] = metrics.METRIC_NAMES
    reference: ReferenceModel

    def __init__(
        self,
        policy: str = "quickstart",
        loss: PreferenceLoss = losses.DPO(),  # noqa: B008  # frozen
        reference: Reference | str | None = None,
        adapter: Adapter = AsLoaded(),  # noqa: B008  # frozen
        sharing: bool = True,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        preflight: bool = True,
        trust_remote_code: bool = False,
        pickled_weights: bool = False,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        chunk_logits: int | None = None,
        on_nonfinite: OnNonFinite = "stop",
    ) -> None:
        """Choose what is trained, on which loss and against what.

        Args:
            policy: Folder or hub id of the causal language model to train, or of a LoRA adapter to train further;
                ``quickstart`` is the small one in the package.
            loss: The preference loss, such as ``losses.IPO(beta=0.1)``.
            reference: What the policy is compared with: a class, or the folder or hub id of another model. By default
                a frozen copy of the policy for a loss that uses a reference, and nothing for one that does not.
            adapter: Which weights train: all of them (or those of the adapter that the policy is), or a new adapter.
            sharing: Compute every prompt once for all its answers, where that is exact for the model.
            gradient_checkpointing: Keep only the inputs of every layer and recompute the rest in the backward pass.
            compile: Compile every layer with torch.compile.
            preflight: Check models and data before the first step.
            trust_remote_code: Run Python code that comes with a model. Only for models that you trust.
            pickled_weights: Also read weights that are not safetensors. Only for models that you trust.
            optimizer: Makes the optimizer from parameters. Default: AdamW, learning rate 1e-6, no weight decay.
            lr_scheduler: Makes the learning rate schedule from the optimizer; it advances every optimizer step.
            chunk_logits: Most logits in memory at a time. Default: 2**25 on a CPU (128 MiB), 2**28 on CUDA (1 GiB).
            on_nonfinite: Stop at a step whose loss or gradient is not finite (``stop``), or leave it out and count it
                (``skip``), at most 10 in a row.

        Raises:
            TypeError: The loss is not a loss, or the policy an object instead of a path.
            ValueError: The loss needs a reference and there is to be none, or the other way round.
        """
        if not isinstance(loss, PreferenceLoss):
            raise TypeError(f"loss: expected an object such as losses.DPO(beta=0.1), got {loss!r}.")
        if not loss.uses_reference:
            self.metric_names = tuple(name for name in metrics.METRIC_NAMES if name != "displaced")
        super().__init__(
            policy,
            adapter,
            sharing,
            gradient_checkpointing,
            compile,
            preflight,
            trust_remote_code,
            pickled_weights,
            optimizer,
            lr_scheduler,
            chunk_logits,
            on_nonfinite,
        )
        self.loss = loss
        self.reference_choice = resolve_reference(reference, loss)

    def plain_options(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain values."""
        given = {"loss": to_plain(self.loss), "reference": to_plain(self.reference_choice)}
        return super().plain_options() | given

    def fixed_options(self) -> FixedOptions:
        """Return the options that a resumed run must have in common with its checkpoint."""
        # How a fixed reference is given may change: `check_checkpoint` compares the hash of its weights.
        reference = str(self.reference_choice) if self.reference.checkpointed_names() else "fixed"
        return super().fixed_options() | {"--model.loss": str(self.loss), "--model.reference": reference}

    @property
    def card_summary(self) -> str:
        """How the policy is trained, as a predicate for the model card."""
        return f"trained on preferences with the loss `{self.loss}` against a reference ({self.reference.description})"

    def origin(self) -> PolicyOrigin:
        """Say how the policy came about, for whoever serves its export."""
        return PolicyOrigin(
            base=self.policy_path,
            reference=self.reference_choice.compared_path(self.policy_path),
            has_reference=self.loss.uses_reference,
            moving=bool(self.reference.checkpointed_names()),
            beta=self.loss.reward_scale,
            format=self.encoder.format,
        )

    def configure_model(self) -> None:
        """Read and make the models, once; before every stage, let the reference see the rows it will be asked for."""
        super().configure_model()
        if self._trainer is not None:
            self.reference.prepare_for_stage(self)

    def build_other_models(self) -> None:
        """Make the reference of the policy as it is before training."""
        self.reference = self.reference_choice.build_reference(self.policy, self.loader)
        weights = f", SHA-256 of its weights {self.reference.sha256[:16]}" if self.reference.sha256 else ""
        rank_zero_info(f"Reference: {self.reference.description}{weights}.")

    def halve_weights(self) -> None:
        """Keep frozen weights in bfloat16, those of the reference too."""
        super().halve_weights()
        self.reference.halve_weights(self.policy)

    def models_by_role(self) -> dict[str, PreTrainedModel]:
        """Return the policy and its reference."""
        return {"policy": self.policy, **self.reference.owned_models}

    def score_pairs(self, batch: Batch) -> tuple[TokenScores, PairLogps]:
        """Score both answers of every pair under policy and reference."""
        policy = score(self.policy, batch)
        on_policy = policy.logps.detach() + policy.collision_entropy
        return policy, PairLogps(policy.logps, self.reference(batch), on_policy, batch.lengths, batch.margins)

    def score_answers(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the log-probability of every answer under policy and reference in nats, and its reward.

        Each answer is paired with itself: an answer's reward does not depend on what stands beside it.
        """
        _, alone = self.score_pairs(batch)
        ours, theirs, on_policy = (
            torch.cat([part for part in values.split(batch.lengths) for _ in range(2)])
            for values in (
                alone.policy_token_logps.detach(),
                alone.reference_token_logps,
                alone.on_policy_log_weights,
            )
        )
        logps = PairLogps(ours, theirs, on_policy, tuple(n for n in batch.lengths for _ in range(2)))
        return logps.policy[:, 0], logps.reference[:, 0], self.loss.rewards(logps)[:, 0]

    @torch.no_grad()
    def rewards(self, prompt: Prompt, answers: Sequence[str]) -> list[float]:
        """Return the implicit reward of every answer to a prompt, as the loss defines it (DPO: beta * log-ratio).

        Args:
            prompt: A question or dialogue as text, or messages with ``role`` and ``content``.
            answers: Texts of whole answers.

        Raises:
            TypeError: A single string was given instead of a list of answers.
            ValueError: Prompt or answers cannot be used.
        """
        if isinstance(answers, str):
            raise TypeError(f"rewards: expected a list of answers, got the text {answers!r}: put it in a list.")
        self.configure_model()
        if not answers:
            return []
        encoded = encode_answers(self.encoder, prompt, answers)
        examples = [Example(str(i), ids, (answer,)) for i, (ids, answer) in enumerate(encoded)]
        _, _, rewards = self.score_answers(collate(examples).to(self.policy.device))
        return [float(reward) for reward in rewards]

    def losses(self, batch: Batch, means: MetricMeans) -> Float[Tensor, " pairs"]:
        """Return the weighted loss of every pair of a micro-batch, and add its metrics to the means."""
        policy, logps = self.score_pairs(batch)
        losses = self.loss(logps)
        if losses.shape != batch.weights.shape:
            raise ValueError(
                f"{self.loss}: expected one value for each of {len(batch)} pairs, got a tensor of shape "
                f"{tuple(losses.shape)}. A loss does not reduce over the batch."
            )
        losses = batch.weights * losses
        rewards = self.loss.rewards(logps)
        means.update(*sums_and_counts(batch, policy, logps, losses, rewards, self.metric_names))
        scored = ScoredPairs(batch, logps.policy.detach(), logps.reference, rewards.detach(), losses.detach())
        for listener in self.pair_listeners:
            listener(self, scored)
        return losses

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Refuse pairs that say more, or less, than the loss can use.

        Raises:
            ValueError: They have margins or weights that the loss does not take, or lack margins that it needs.
        """
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
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
        """Refuse a step in parts if the loss needs the whole step.

        Raises:
            ValueError: The step was cut by `max_tokens`, over devices, or into accumulated batches.
        """
        here = len(batch.micro_batches[0])
        if self.loss.needs_whole_batch and here < batch.num_examples:
            raise ValueError(
                f"{self.loss} sorts all pairs of an optimizer step together: expected {batch.num_examples} in one "
                f"piece, got a piece of {here}. {WHOLE_BATCH_HINT}"
            )

    def on_validation_batch_start(self, batch: Step, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Refuse a step in parts, as in training."""
        self.on_train_batch_start(batch, batch_idx)

    def on_test_batch_start(self, batch: Step, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Refuse a step in parts, as in training."""
        self.on_train_batch_start(batch, batch_idx)

    def loss_denominator(self, step: Step) -> int:
        """Return the number of pairs of the optimizer step."""
        return step.num_examples

    def prediction_rows(self, batch: Batch) -> list[dict[str, Any]]:
        """Return log-probabilities and implicit rewards of pairs."""
        _, logps = self.score_pairs(batch)
        rewards, sums = self.loss.rewards(logps).tolist(), logps.policy.tolist()
        return [{"id": i, "logps": s, "rewards": r} for i, s, r in zip(batch.ids, sums, rewards, strict=True)]

    def predict_step(self, step: Step | PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return answers to prompts, or log-probabilities and rewards of pairs."""
        return predict_rows(step, self, self.models_by_role(), self.score_answers, self.prediction_rows)

    def checkpointed_names(self) -> set[str]:
        """Return the names of the weights that training changes, those of a moving reference included."""
        moving = {f"reference.{name}" for name in self.reference.checkpointed_names()}
        return super().checkpointed_names() | moving

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Step, then update a moving reference."""
        super().optimizer_step(*arguments, **options)
        self.reference.update_from(self.policy, self.trainer.global_step + 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record which reference the weights were trained against."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["reference_sha256"] = self.reference.sha256

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained against another reference.

        Raises:
            ValueError: The reference differs from the one of the checkpoint, or the checkpoint has none.
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
