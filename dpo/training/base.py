"""What every training stage shares: a policy, one optimizer step over micro-batches, means logged at steps.

A stage (`dpo.training.dpo.DPO`, `dpo.training.sft.SFT`) defines the loss of every example and what the sum of a step
is divided by. It runs in any Lightning Trainer.
"""

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel

from dpo.data.sampler import Step
from dpo.models.batch import Batch
from dpo.models.half import halve_frozen_weights
from dpo.models.loading import ModelLoader, prepare_layers
from dpo.models.lora import Adapter, AsLoaded
from dpo.models.prompt_sharing import share_if_exact
from dpo.models.sharding import whole_tensor
from dpo.training.hyperparameters import to_plain
from dpo.training.measuring import MeasuredModule
from dpo.training.nonfinite import FiniteMonitor, OnNonFinite, require_finite_weights
from dpo.training.own_loaders import check_same_denominator, step_from_loader
from dpo.training.position import is_logged_step, log_interval
from dpo.training.resuming import (
    FixedOptions,
    apply_optimizer_options,
    check_fixed_options,
    check_optimizer_class,
    excluded_pairs,
    report_exclusion,
    trainer_fixed_options,
)
from dpo.training.schedules import Warmup, default_optimizer, suit_device, validate_optimizer, validate_schedule
from dpo.training.trainer_checks import check_trainer_support, check_training_options


class Stage(MeasuredModule):
    """A stage of training a policy.

    Attributes:
        answer_sides: Sides of a preference pair that an example of this stage holds, in this order.
        restored_step_is_logged: The loggers have the metrics of the step that training resumes from, or are new.
    """

    answer_sides: tuple[str, ...]

    def __init__(
        self,
        policy: str = "quickstart",
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
        """Choose what is trained and how; models are read when the trainer sets up, or on first use.

        Args:
            policy: Folder or hub id of the causal language model to train, or of a LoRA adapter to train further;
                ``quickstart`` is the small one in the package.
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
            TypeError: The policy is no path, or the adapter no adapter.
            ValueError: The optimizer or the schedule does not take its options.
        """
        super().__init__()
        if not isinstance(adapter, Adapter):
            raise TypeError(f"adapter: expected an object such as LoRA(r=16), got {adapter!r}.")
        if not isinstance(policy, str | Path):
            raise TypeError(
                f"policy: expected a folder or hub id, got a {type(policy).__name__}. Save the model with "
                "save_pretrained (and its tokenizer beside it) and give the folder."
            )
        self.policy_path = str(policy)
        self.adapter = adapter
        self.loader = ModelLoader(trust_remote_code, pickled_weights)
        self.sharing = sharing
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_layers = compile
        self.preflight = preflight
        self.chunk_logits = chunk_logits
        self.optimizer = validate_optimizer(optimizer)
        self.lr_scheduler = validate_schedule(optimizer, lr_scheduler)
        self.finite_monitor = FiniteMonitor(on_nonfinite)
        self.grad_norm = torch.zeros(())
        self._window_means: dict[str, Tensor] = {}  # as they were when the accumulation window began
        self._window_denominator = 0
        self._in_window = False
        self._checkpoint: dict[str, Any] | None = None  # that training resumes from
        self._restored_means: dict[str, Tensor] | None = None
        self.restored_step_is_logged = False
        self.has_trained = False  # or was loaded: the policy need not equal its reference any more

    @property
    @abstractmethod
    def card_summary(self) -> str:
        """How the policy is trained, as a predicate for the model card: "fine-tuned on ..."."""

    @abstractmethod
    def loss_denominator(self, step: Step) -> int:
        """Return what the sum of the losses of a whole optimizer step is divided by."""

    def plain_options(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain values."""
        return {
            "policy": self.policy_path,
            "adapter": to_plain(self.adapter),
            "sharing": self.sharing,
            "gradient_checkpointing": self.gradient_checkpointing,
            "compile": self.compile_layers,
            "preflight": self.preflight,
            "trust_remote_code": self.loader.trust_remote_code,
            "pickled_weights": self.loader.pickled_weights,
            "chunk_logits": self.chunk_logits,
            "on_nonfinite": self.finite_monitor.on_nonfinite,
            "lr_scheduler": to_plain(self.lr_scheduler),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the means since the last logged step; save nothing that is not finite.

        Raises:
            NonFiniteError: A step that was taken was not finite, or a weight is not.
        """
        self.finite_monitor.raise_if_nonfinite(self.trainer.global_step)
        require_finite_weights(self.policy, self.trainer.global_step)
        super().on_save_checkpoint(checkpoint)
        means = self._window_means if self._in_window else self.train_means.copy_state()
        checkpoint["train_means"] = {  # of all processes
            name: self.trainer.strategy.reduce(value.clone(), reduce_op="sum").cpu() for name, value in means.items()
        }
        checkpoint["grad_norm"] = self.grad_norm.cpu()
        checkpoint["nonfinite"] = self.finite_monitor.state_dict()
        checkpoint["optimizer"] = type(self.trainer.optimizers[0]).__name__
        checkpoint["fixed_options"] = self.fixed_options()
        checkpoint["excluded_pairs"] = excluded_pairs(self.trainer)

    def fixed_options(self) -> FixedOptions:
        """Return the options that a resumed run must have in common with its checkpoint."""
        own: FixedOptions = {"--model": type(self).__name__, "--model.adapter": str(self.adapter)}
        return own | trainer_fixed_options(self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the means since the last logged step, if training goes on.

        Raises:
            ValueError: The checkpoint was trained with other options.
        """
        super().on_load_checkpoint(checkpoint)
        if self.trainer.state.fn == "fit":
            check_fixed_options(checkpoint, self.fixed_options())
            report_exclusion(checkpoint, excluded_pairs(self.trainer))
            self._checkpoint = checkpoint
            self.finite_monitor.load_state_dict(checkpoint.get("nonfinite", self.finite_monitor.state_dict()))
        self._restored_means = checkpoint.get("train_means")
        self.grad_norm = checkpoint.get("grad_norm", self.grad_norm)

    def setup(self, stage: str) -> None:
        """Refuse precisions and strategies under which a step would not be exact, and a fit that trains nothing."""
        check_trainer_support(self.trainer)
        if stage == "fit":
            check_training_options(self.trainer)

    def configure_model(self) -> None:
        """Read the policy, once."""
        if "policy" not in self._modules:
            self.policy = self.adapter.load_policy(self.loader, self.policy_path)
            self.build_other_models()
            for role, model in self.models_by_role().items():
                self.prepare_scoring(role, model)
            if self._trainer is not None and self.trainer.precision == "bf16-mixed":
                self.halve_weights()

    def build_other_models(self) -> None:
        """Make what else the stage needs of the policy before training; by default nothing."""

    def prepare_scoring(self, role: str, model: PreTrainedModel) -> None:
        """Let a model share prompts between answers where that is exact; compile or checkpoint its layers.

        Every model of the stage is prepared alike, or their kernels would differ.
        """
        reason = share_if_exact(model) if self.sharing else "--model.sharing is false"
        if reason:
            rank_zero_info(f"Prompts are not shared between the answers of the {role}: {reason}.")
        model.chunk_logits = self.chunk_logits  # type: ignore[assignment]
        prepare_layers(model, self.compile_layers, self.gradient_checkpointing and role == "policy")

    def halve_weights(self) -> None:
        """Keep frozen weights in bfloat16 where autocast computes in it; a base may be merged, so it is not rounded."""
        halve_frozen_weights(self.policy, may_round=False)

    def configure_optimizers(self) -> Any:
        """Return the optimizer of the trainable parameters, and its schedule.

        Raises:
            ValueError: No parameter is trainable.
        """
        trainable = [p for p in self.policy.parameters() if p.requires_grad]
        if not trainable:
            raise ValueError("the policy is frozen: expected parameters that need a gradient, got none. Unfreeze it.")
        scaled = self._trainer is not None and self.trainer.scaler is not None
        optimizer = suit_device(self.optimizer(trainable), gradients_scaled=scaled)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        if self._trainer is not None and self.trainer.train_dataloader is not None:  # resuming
            self._set_run_steps(scheduler)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _set_run_steps(self, scheduler: Any) -> None:
        """Tell a schedule the length of the run, which is known once the data are set up."""
        if isinstance(scheduler, Warmup):
            scheduler.set_run_steps(self.trainer.estimated_stepping_batches)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Make a step of the examples of a user's own loader.

        Raises:
            TypeError: The batch is of another kind.
            ValueError: An example has another number of answers.
        """
        return step_from_loader(batch, self.trainer, self.answer_sides)

    def training_step(self, step: Step, batch_idx: int) -> Tensor:
        """Return the sum of the losses divided by the denominator of the whole optimizer step.

        However the step is cut, loss and gradient are the same: devices average their gradients and Lightning divides
        by the accumulated batches, so both are multiplied away. The backward pass of every micro-batch but the last
        runs here, so that one graph is alive at a time.
        """
        denominator = self.loss_denominator(step)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._window_means = self.train_means.copy_state()
            self._window_denominator = denominator
        check_same_denominator(denominator, self._window_denominator)
        self._in_window = True
        scale = self.trainer.world_size / denominator
        *others, last = step.micro_batches
        for batch in others:
            self.trainer.strategy.backward(self._monitored_losses(batch).sum() * scale, None)
        return self._monitored_losses(last).sum() * scale * self.trainer.accumulate_grad_batches

    def _monitored_losses(self, batch: Batch) -> Tensor:
        losses = self.losses(batch, self.train_means)
        self.has_trained = True
        self.finite_monitor.add_losses(batch.ids, losses)
        return losses

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep numbers that are not finite from the weights.

        A fused optimizer does not take such a step, which the device decides; the host asks at the next logged step or
        checkpoint. For any other optimizer it asks here; without gradients, a step changes nothing.

        Raises:
            NonFiniteError: With the ids of the examples of this step that are to blame.
        """
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norm = whole_tensor(torch.nn.utils.get_total_norm(gradients))
        scaled = self.trainer.scaler is not None  # float16: the scaler skips a step whose gradient overflows
        norm = torch.zeros_like(self.grad_norm) if scaled else self.grad_norm
        nonfinite = self.finite_monitor.close_step(self.trainer.global_step + 1, norm)
        self.train_means.restore(self._window_means, nonfinite)
        if getattr(optimizer, "_step_supports_amp_scaling", False) and not scaled:  # torch's mark of a fused one
            optimizer.found_inf = nonfinite  # type: ignore[attr-defined]
        elif self.finite_monitor.raise_if_nonfinite():
            optimizer.zero_grad()

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip by the norm that is already known; Lightning's own way refuses fused optimizers in bfloat16 too."""
        if gradient_clip_val and self.trainer.scaler is None and gradient_clip_algorithm != "value":
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, self.grad_norm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_fit_start(self) -> None:
        """Check models and data before the first step.

        Raises:
            PreflightError: Something does not hold.
            ValueError: The optimizer is not that of the checkpoint.
        """
        if self._checkpoint:
            check_optimizer_class(self._checkpoint, self.trainer.optimizers[0])
        if self.preflight:
            from dpo.training.preflight import run_preflight  # which knows the stages

            run_preflight(self)

    def on_train_start(self) -> None:
        """Begin without gradients, with a schedule that knows the length of the run.

        Raises:
            ValueError: The last optimizer step of an epoch would be cut short, or the schedule does not fit the run.
        """
        self.zero_grad()
        if self._checkpoint:
            apply_optimizer_options(self.trainer, self.configure_optimizers())
            self._checkpoint = None
        if self._restored_means:
            if self.trainer.is_global_zero:  # the means of all processes are added up
                self.train_means.update(**self._restored_means)
            self._restored_means = None
            if self.trainer.global_step % log_interval(self.trainer) == 0:
                self._complete_logged_step()
        for config in self.trainer.lr_scheduler_configs:
            self._set_run_steps(config.scheduler)
        batches, accumulate = self.trainer.num_training_batches, self.trainer.accumulate_grad_batches
        if batches != float("inf") and batches % accumulate:
            raise ValueError(
                "--trainer.limit_train_batches: expected a multiple of --trainer.accumulate_grad_batches "
                f"{accumulate}, got {batches} batches an epoch: the last optimizer step would lack pairs."
            )

    def _complete_logged_step(self) -> None:
        """Log a step that was saved but not yet logged when the run ended; begin new means after it."""
        if self.restored_step_is_logged:
            self.train_means.reset()
        elif self.train_means.counts.any():
            self._log_training()

    def on_train_epoch_start(self) -> None:
        """Tell Lightning that this epoch starts at its beginning, also after a resume."""
        self.trainer.fit_loop.epoch_loop.restarting = False

    def optimizer_zero_grad(self, *_: object) -> None:
        """Do nothing: Lightning calls this after `training_step`, which has already left gradients behind."""

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step, then clear the gradients."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._in_window = False
        optimizer.zero_grad()

    def on_train_batch_end(self, outputs: object, batch: Step, batch_idx: int) -> None:
        """Log the means since the last logged step."""
        if is_logged_step(self.trainer, batch_idx):
            self._log_training()

    def on_train_epoch_end(self) -> None:
        """Log what the last steps of the run have left."""
        ends = self.trainer.current_epoch + 1 == self.trainer.max_epochs
        ends |= self.trainer.should_stop or self.trainer.global_step == self.trainer.max_steps
        if ends and self.train_means.counts.any():
            self._log_training()

    def _log_training(self) -> None:
        self.finite_monitor.raise_if_nonfinite()
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        measured = {"learning_rate": rate, "grad_norm": self.grad_norm.item(), **self.finite_monitor.metrics()}
        self.log_means("train", self.train_means, measured)

    def on_train_end(self) -> None:
        """Say what was left out."""
        self.finite_monitor.report_skipped()
