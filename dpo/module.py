"""The LightningModule: a policy, its frozen reference, and one step that scores both and applies the loss.

Takes `Step`s, gives gradients and metrics. Knows nothing of text, files or what the loss and the reference are made of.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import lightning as L
import torch
from jsonargparse import lazy_instance
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo import losses, quickstart
from dpo.batch import Batch
from dpo.logps import TokenScores, score, sum_answers
from dpo.losses import PairLogps, PreferenceLoss
from dpo.metrics import Means, sums_and_counts
from dpo.models import Source, weights_sha256
from dpo.reference import Copy, Frozen, Model, Reference
from dpo.sampler import Step
from dpo.sharing import share_if_exact

REFERENCE = "reference."  # prefix of what is never in a checkpoint


class NonFinite(RuntimeError):
    """A loss or a gradient is not a finite number."""


class DPO(L.LightningModule):
    """Direct Preference Optimization of a causal language model (Rafailov et al. 2023, arXiv 2305.18290)."""

    policy: PreTrainedModel
    reference: Frozen

    def __init__(
        self,
        policy: str = str(quickstart.POLICY),
        reference: Reference | str = lazy_instance(Copy),
        loss: PreferenceLoss = lazy_instance(losses.DPO),
        sharing: bool = True,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        preflight: bool = True,
        trust_remote_code: bool = False,
        pickled_weights: bool = False,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        """Choose what is trained, and how; models are read when the trainer sets up.

        Args:
            policy: Folder or hub id of the causal language model to train.
            reference: What the policy is compared with: a class, or the folder or hub id of another model.
            loss: The preference loss.
            sharing: Compute every prompt once for all its answers, where that is exact for the model.
            gradient_checkpointing: Keep only the inputs of every layer and compute the rest again in the backward pass.
            compile: Compile every layer with torch.compile.
            preflight: Check before the first step what must hold before it.
            trust_remote_code: Run Python code that comes with a model. Only for models that you trust.
            pickled_weights: Also read weights that are not safetensors. Only for models that you trust.
            optimizer: Makes the optimizer of the parameters it is given.
            lr_scheduler: Makes the learning rate schedule of an optimizer; it advances every optimizer step.
        """
        super().__init__()
        self.source = Source(trust_remote_code, pickled_weights)
        self.policy_path = policy
        self.reference_choice = Model(reference) if isinstance(reference, str) else reference
        self.loss = loss
        self.sharing, self.compiled = sharing, compile
        self.gradient_checkpointing, self.preflight = gradient_checkpointing, preflight
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.train_means, self.val_means, self.test_means = Means(), Means(), Means()
        self.unchecked: list[tuple[tuple[str, ...], Tensor]] = []  # ids and losses of the pairs of this step
        self.grad_norm = torch.zeros(())
        self.strict_loading = False  # the reference is not in checkpoints; load_state_dict checks the rest

    def configure_model(self) -> None:
        """Read the policy and make its reference, once."""
        if "policy" in self._modules:
            return
        self.policy = self.source.model(self.policy_path)
        self.reference = self.reference_choice.build(self.policy, self.source)
        self.reference_sha256 = weights_sha256(self.reference)
        rank_zero_info(f"Reference: {self.reference.origin}, SHA-256 of its weights {self.reference_sha256[:16]}.")
        for name, model in {"policy": self.policy, "reference": self.reference.model}.items():
            reason = share_if_exact(model) if self.sharing else "--model.sharing is false"
            if reason:
                rank_zero_info(f"The {name} runs every answer as a sequence of its own: {reason}.")
        for layer in self.policy.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                self._adapt(layer)

    def _adapt(self, layer: torch.nn.Module) -> None:
        """Compile or checkpoint a layer; not through transformers, which checkpoints in train mode (with dropout) only."""
        if self.compiled:
            layer.compile(dynamic=True)
        if self.gradient_checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)  # type: ignore[method-assign]

    def configure_optimizers(self) -> Any:
        """The optimizer of the parameters that train, and its schedule."""
        optimizer = self.optimizer([p for p in self.policy.parameters() if p.requires_grad])
        if self.lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"},
        }

    def score_pairs(self, batch: Batch) -> tuple[TokenScores, PairLogps]:
        """Score both answers of every pair under policy and reference."""
        policy = score(self.policy, batch)
        sums = [sum_answers(logps, batch).unflatten(0, (-1, 2)) for logps in (policy.logps, self.reference(batch))]
        lengths = torch.tensor(batch.lengths, dtype=torch.float32, device=self.device).unflatten(0, (-1, 2))
        return policy, PairLogps(*sums, lengths)

    def _losses(self, batch: Batch, means: Means) -> Tensor:
        """The loss of every pair of a micro-batch; everything else about it goes into the means."""
        policy, logps = self.score_pairs(batch)
        losses = self.loss(logps)
        means.update(*sums_and_counts(batch, policy, logps, losses, self.loss.rewards(logps)))
        return losses

    def training_step(self, step: Step, batch_idx: int) -> Tensor:
        """The sum of the pairs' losses over the pairs of the optimizer step, so that no way of cutting it changes it.

        Devices average their gradients and Lightning divides by the accumulated batches: both are multiplied away.
        The backward pass of every micro-batch but the last is run here, so that one graph is alive at a time.
        """
        scale = self.trainer.world_size / step.pairs
        *others, last = step.micro_batches
        for batch in others:
            self.trainer.strategy.backward(self._training_losses(batch).sum() * scale, None)
        return self._training_losses(last).sum() * scale * self.trainer.accumulate_grad_batches

    def _training_losses(self, batch: Batch) -> Tensor:
        losses = self._losses(batch, self.train_means)
        self.unchecked.append((batch.ids, losses.detach()))
        return losses

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop before a number that is not finite can reach the weights.

        Raises:
            NonFinite: With the ids of the pairs of this step that it came from.
        """
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norm = torch.nn.utils.get_total_norm(gradients)
        finite = self.grad_norm.isfinite() | (self.trainer.scaler is not None)  # float16: the scaler skips such a step
        for _, losses in self.unchecked:
            finite &= losses.isfinite().all()
        if not finite:
            rows = [
                row
                for ids, losses in self.unchecked
                for row, good in zip(ids, losses.isfinite(), strict=True)
                if not good
            ]
            raise NonFinite(
                f"step {self.trainer.global_step + 1}: the {'loss' if rows else 'gradient'} is not finite for the pairs "
                f"{', '.join(rows or [row for ids, _ in self.unchecked for row in ids])}. The weights are those before this step and "
                "the last checkpoint is intact. Try a smaller --optimizer.lr, --trainer.precision 32-true or bf16-mixed, or look at these rows."
            )
        self.unchecked.clear()

    def on_train_start(self) -> None:
        """Begin with no gradients."""
        self.zero_grad()

    def optimizer_zero_grad(self, *_: object) -> None:
        """Nothing: Lightning calls this after `training_step`, which has already left gradients behind."""

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step, then clear the gradients."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    def on_train_batch_end(self, outputs: object, batch: Step, batch_idx: int) -> None:
        """Log the means since the last logged step."""
        stepped = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        if stepped and self.trainer.global_step % self.trainer.log_every_n_steps == 0:
            rates = {
                "learning_rate": self.trainer.optimizers[0].param_groups[0]["lr"],
                "grad_norm": self.grad_norm.item(),
            }
            self.report("train", self.train_means, rates)

    def report(self, stage: str, means: Means, more: Mapping[str, float] = MappingProxyType({})) -> None:
        """Log means under the names of a stage, at the number of optimizer steps taken, and start them anew."""
        means_and_more = {**means.compute(), **more}
        values = {f"{stage}/{name}": float(value) for name, value in means_and_more.items()}
        means.reset()
        self.log_dict(values, logger=False, sync_dist=True)
        for logger in self.loggers if not self.trainer.sanity_checking else ():
            logger.log_metrics(values, step=self.trainer.global_step)

    def validation_step(self, step: Step, batch_idx: int) -> None:
        """Evaluate pairs; no graph is kept."""
        for batch in step.micro_batches:
            self._losses(batch, self.val_means)

    def on_validation_epoch_end(self) -> None:
        """Log the means over the whole validation split."""
        self.report("val", self.val_means)

    def test_step(self, step: Step, batch_idx: int) -> None:
        """Evaluate pairs; no graph is kept."""
        for batch in step.micro_batches:
            self._losses(batch, self.test_means)

    def on_test_epoch_end(self) -> None:
        """Log the means over the whole test split."""
        self.report("test", self.test_means)

    def predict_step(self, step: Step, batch_idx: int) -> list[dict[str, Any]]:
        """Log-probabilities and implicit rewards of every pair."""
        rows: list[dict[str, Any]] = []
        for batch in step.micro_batches:
            _, logps = self.score_pairs(batch)
            rewards, sums = self.loss.rewards(logps).tolist(), logps.policy.tolist()
            rows += [{"id": i, "logps": s, "rewards": r} for i, s, r in zip(batch.ids, sums, rewards, strict=True)]
        return rows

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Without the reference."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
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
                f"this checkpoint is of another model: weights missing {missing[:3]}, left over {result.unexpected_keys[:3]}. "
                "Give the --model.policy that the run was started with."
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
                f"the checkpoint was trained against a reference with SHA-256 {before[:16]}, this one has {self.reference_sha256[:16]}. "
                "Give the --model.policy and --model.reference that the run was started with."
            )
