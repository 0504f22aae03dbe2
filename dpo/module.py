"""The LightningModule: a policy, its frozen reference, and one step that scores both and applies the loss.

Takes `Step`s, gives gradients and metrics. Knows nothing of text, files or what the loss and the reference are made of.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import lightning as L
import torch
from jsonargparse import lazy_instance
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel

from dpo import losses
from dpo.batch import Batch
from dpo.finite import Watch
from dpo.logps import TokenScores, score, sum_answers
from dpo.losses import PairLogps, PreferenceLoss
from dpo.metrics import Means, sums_and_counts
from dpo.models import Loader, adapt_layers, weights_sha256
from dpo.reference import Copy, Frozen, Model, Reference
from dpo.sampler import Step
from dpo.sharing import share_if_exact

REFERENCE = "reference."  # prefix of what is never in a checkpoint
# Defaults of the command line, made when they are used.
COPY: Reference = lazy_instance(Copy)
DPO_LOSS: PreferenceLoss = lazy_instance(losses.DPO)


class DPO(L.LightningModule):
    """Direct Preference Optimization of a causal language model (Rafailov et al. 2023, arXiv 2305.18290)."""

    policy: PreTrainedModel
    reference: Frozen

    def __init__(
        self,
        policy: str = "quickstart",
        reference: Reference | str = COPY,
        loss: PreferenceLoss = DPO_LOSS,
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
            policy: Folder or hub id of the causal language model to train; `quickstart` is the one in the package.
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
        self.loader = Loader(trust_remote_code, pickled_weights)
        self.policy_path = policy
        self.reference_choice = Model(reference) if isinstance(reference, str) else reference
        self.loss = loss
        self.sharing, self.compiled = sharing, compile
        self.gradient_checkpointing, self.preflight = gradient_checkpointing, preflight
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.train_means, self.val_means, self.test_means = Means(), Means(), Means()
        self.watch = Watch()
        self.grad_norm = torch.zeros(())
        self.strict_loading = False  # the reference is not in checkpoints; load_state_dict checks the rest

    def configure_model(self) -> None:
        """Read the policy and make its reference, once."""
        if "policy" in self._modules:
            return
        self.policy = self.loader.model(self.policy_path)
        self.reference = self.reference_choice.build(self.policy, self.loader)
        self.reference_sha256 = weights_sha256(self.reference)
        rank_zero_info(f"Reference: {self.reference.origin}, SHA-256 of its weights {self.reference_sha256[:16]}.")
        for name, model in {"policy": self.policy, "reference": self.reference.model}.items():
            reason = share_if_exact(model) if self.sharing else "--model.sharing is false"
            if reason:
                rank_zero_info(f"The {name} runs every answer as a sequence of its own: {reason}.")
        adapt_layers(self.policy, self.compiled, self.gradient_checkpointing)

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
        ours, theirs = (sum_answers(logps, batch) for logps in (policy.logps, self.reference(batch)))
        lengths = torch.tensor(batch.lengths, dtype=torch.float32, device=self.device)
        return policy, PairLogps(*(values.unflatten(0, (-1, 2)) for values in (ours, theirs, lengths)))

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
        self.watch.add(batch.ids, losses)
        return losses

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop before a number that is not finite can reach the weights.

        Raises:
            NonFinite: With the ids of the pairs of this step that it came from.
        """
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norm = torch.nn.utils.get_total_norm(gradients)
        scaled = self.trainer.scaler is not None  # float16: the scaler skips a step whose gradient overflows
        self.watch.check(self.trainer.global_step + 1, torch.zeros(()) if scaled else self.grad_norm)

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
        if is_logged(self.trainer, batch_idx):
            rates = {
                "learning_rate": self.trainer.optimizers[0].param_groups[0]["lr"],
                "grad_norm": self.grad_norm.item(),
            }
            self.report("train", self.train_means, rates)

    def report(self, stage: str, means: Means, more: Mapping[str, float] = MappingProxyType({})) -> None:
        """Log means under the names of a stage, at the number of optimizer steps taken, and start them anew."""
        measured = {name: value.item() for name, value in means.compute().items()}
        values = {f"{stage}/{name}": value for name, value in {**measured, **more}.items()}
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


def is_logged(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether an optimizer step that is to be logged has just ended with this batch."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets but does not declare it
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and trainer.global_step % every == 0
