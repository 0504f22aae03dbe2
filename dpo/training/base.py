"""What every stage of training shares: a policy, one optimizer step over micro-batches, means logged at steps.

Takes `Step`s, gives gradients and metrics. A stage (`dpo.training.dpo.DPO`, `dpo.training.sft.SFT`) says what the
examples of a micro-batch cost and by what their sum is divided. Checkpoints hold what training changes: weights that
are frozen (a base under an adapter, a reference) are read again from where they came from. Knows nothing of text or
files.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import lightning as L
import torch
from jsonargparse import lazy_instance
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel

from dpo.data.sampler import Step
from dpo.models.batch import Batch
from dpo.models.loading import ModelLoader, prepare_layers
from dpo.models.lora import Adapter, AsLoaded
from dpo.models.prompt_sharing import share_if_exact
from dpo.training.metrics import DerivedMetric, MetricMeans
from dpo.training.nonfinite import FiniteMonitor
from dpo.training.position import loop_state_after_step
from dpo.training.schedules import validate_optimizer


class PartialCheckpointModule(L.LightningModule):
    """A module that saves the weights that training changes."""

    def __init__(self) -> None:
        """Let Lightning accept checkpoints that do not hold everything; `load_state_dict` checks what they must."""
        super().__init__()
        self.strict_loading = False

    def checkpointed_names(self) -> set[str]:
        """Names of the weights that training changes, which are those in a checkpoint; all others are read again."""
        return {name for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What training changes."""
        changing = self.checkpointed_names()
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in changing}

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        """All that training changes must be there, and nothing else.

        Raises:
            ValueError: Weights are missing, left over, or of another shape.
        """
        changing, ours = self.checkpointed_names(), super().state_dict()
        missing, left_over = sorted(changing - state.keys()), sorted(state.keys() - changing)
        misfits = sorted(name for name in changing & state.keys() if state[name].shape != ours[name].shape)
        if missing or left_over or misfits:
            raise ValueError(
                f"this checkpoint is of another model: weights missing {missing[:3]}, left over {left_over[:3]}, of "
                f"other shapes {misfits[:3]}. Give the --model.policy and --model.adapter that the run began with."
            )
        return super().load_state_dict(state, strict=False, assign=assign)


DEFAULT_ADAPTER: Adapter = lazy_instance(AsLoaded)  # the default of the command line, made when it is used


class Stage(PartialCheckpointModule, ABC):
    """A stage of training a policy.

    Attributes:
        answers: What an example of this stage holds: sides of a pair, in this order.
        metrics: Names of what `losses` adds to the means.
        derived: What is logged besides, as a function of a mean.
        policy: The model that is trained; there from `configure_model` on.
    """

    answer_sides: tuple[str, ...]
    metric_names: tuple[str, ...]
    derived_metrics: Mapping[str, DerivedMetric] = MappingProxyType({})
    policy: PreTrainedModel

    def __init__(
        self,
        policy: str = "quickstart",
        adapter: Adapter = DEFAULT_ADAPTER,
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
            policy: Folder or hub id of the causal language model to train; `quickstart` is the one in the package. Also
                of a LoRA adapter, which is then trained on.
            adapter: What of it trains: all (or the adapter that it is), or an adapter that is added.
            sharing: Compute every prompt once for all its answers, where that is exact for the model.
            gradient_checkpointing: Keep only the inputs of every layer and compute the rest again in the backward pass.
            compile: Compile every layer with torch.compile.
            preflight: Check before the first step what must hold before it.
            trust_remote_code: Run Python code that comes with a model. Only for models that you trust.
            pickled_weights: Also read weights that are not safetensors. Only for models that you trust.
            optimizer: Makes the optimizer of the parameters it is given.
            lr_scheduler: Makes the learning rate schedule of an optimizer; it advances every optimizer step.

        Raises:
            ValueError: The optimizer does not take its options.
        """
        super().__init__()
        self.adapter = adapter
        self.loader = ModelLoader(trust_remote_code, pickled_weights)
        self.policy_path, self.sharing, self.preflight = policy, sharing, preflight
        self.gradient_checkpointing, self.compile_layers = gradient_checkpointing, compile
        self.optimizer, self.lr_scheduler = validate_optimizer(optimizer), lr_scheduler
        self.train_means, self.val_means, self.test_means = (
            MetricMeans(self.metric_names, self.derived_metrics) for _ in range(3)
        )
        self.finite_monitor = FiniteMonitor()
        self.grad_norm = torch.zeros(())

    @property
    @abstractmethod
    def card_summary(self) -> str:
        """How the policy is trained, as a predicate: "fine-tuned on ..."."""

    @abstractmethod
    def losses(self, batch: Batch, means: MetricMeans) -> Tensor:
        """The loss of every example of a micro-batch; everything else about it goes into the means."""

    @abstractmethod
    def loss_denominator(self, step: Step) -> int:
        """By what the sum of the losses of a whole optimizer step is divided."""

    @abstractmethod
    def models_by_role(self) -> dict[str, PreTrainedModel]:
        """Every model there is, by its role."""

    def configure_model(self) -> None:
        """Read the policy, once."""
        if "policy" not in self._modules:
            self.policy = self.adapter.load_policy(self.loader, self.policy_path)
            self.prepare_models()
            for role, model in self.models_by_role().items():  # all of them, or their kernels would differ
                prepare_layers(model, self.compile_layers, self.gradient_checkpointing and role == "policy")

    def prepare_models(self) -> None:
        """Let every model share prompts where that is exact."""
        for role, model in self.models_by_role().items():
            reason = share_if_exact(model) if self.sharing else "--model.sharing is false"
            if reason:
                rank_zero_info(f"The {role} runs every answer as a sequence of its own: {reason}.")

    def configure_optimizers(self) -> Any:
        """The optimizer of the parameters that train, and its schedule.

        Raises:
            ValueError: There are none.
        """
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        if not trained:
            raise ValueError("the policy is frozen: expected parameters that need a gradient, got none. Unfreeze it.")
        optimizer = self.optimizer(trained)
        if self.lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"},
        }

    def training_step(self, step: Step, batch_idx: int) -> Tensor:
        """The sum of the losses over the total of the optimizer step, so that no way of cutting it changes it.

        Devices average their gradients and Lightning divides by the accumulated batches: both are multiplied away.
        The backward pass of every micro-batch but the last is run here, so that one graph is alive at a time.
        """
        scale = self.trainer.world_size / self.loss_denominator(step)
        *others, last = step.micro_batches
        for batch in others:
            self.trainer.strategy.backward(self._watched(batch).sum() * scale, None)
        return self._watched(last).sum() * scale * self.trainer.accumulate_grad_batches

    def _watched(self, batch: Batch) -> Tensor:
        losses = self.losses(batch, self.train_means)
        self.finite_monitor.add_losses(batch.ids, losses)
        return losses

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let no number that is not finite reach the weights.

        A fused optimizer skips such a step, and all after it, on the device; the host asks at the next logged step or
        checkpoint. Any other is stopped here.

        Raises:
            NonFinite: With the ids of the examples of this step that it came from.
        """
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norm = torch.nn.utils.get_total_norm(gradients)
        scaled = self.trainer.scaler is not None  # float16: the scaler skips a step whose gradient overflows
        norm = torch.zeros_like(self.grad_norm) if scaled else self.grad_norm
        broken = self.finite_monitor.close_step(self.trainer.global_step + 1, norm)
        if getattr(optimizer, "_step_supports_amp_scaling", False) and not scaled:  # torch's mark of a fused one
            optimizer.found_inf = broken  # type: ignore[attr-defined]
        else:
            self.finite_monitor.raise_if_nonfinite()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save nothing that comes after a step that was skipped, and the place among the data after the last step."""
        self.finite_monitor.raise_if_nonfinite()
        self._count_steps(checkpoint["loops"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Find that place also in a checkpoint of an earlier version, which has Lightning's own counters."""
        self._count_steps(checkpoint["loops"])

    def _count_steps(self, loops: dict[str, Any]) -> None:
        loops["fit_loop"] = loop_state_after_step(loops["fit_loop"], self.trainer.accumulate_grad_batches)

    def on_train_epoch_start(self) -> None:
        """Begin an epoch that a checkpoint has not begun as any other: it is no restart within one."""
        self.trainer.fit_loop.epoch_loop.restarting = False

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip by the norm that is already known; Lightning's own way refuses fused optimizers in bfloat16 too."""
        if gradient_clip_val and self.trainer.scaler is None and gradient_clip_algorithm != "value":
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, self.grad_norm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_start(self) -> None:
        """Begin with no gradients.

        Raises:
            ValueError: The last optimizer step of an epoch would be cut short.
        """
        self.zero_grad()
        batches, accumulate = self.trainer.num_training_batches, self.trainer.accumulate_grad_batches
        if batches % accumulate:
            raise ValueError(
                "--trainer.limit_train_batches: expected a multiple of --trainer.accumulate_grad_batches "
                f"{accumulate}, got {batches} batches an epoch: the last optimizer step would lack pairs."
            )

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
        if is_logged_step(self.trainer, batch_idx):
            self._report_training()

    def on_train_epoch_end(self) -> None:
        """Log what the last steps of the run have left."""
        ends = self.trainer.current_epoch + 1 == self.trainer.max_epochs
        ends |= self.trainer.should_stop or self.trainer.global_step == self.trainer.max_steps
        if ends and self.train_means.counts.any():
            self._report_training()

    def _report_training(self) -> None:
        self.finite_monitor.raise_if_nonfinite()
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log_means("train", self.train_means, {"learning_rate": rate, "grad_norm": self.grad_norm.item()})

    def log_means(self, stage: str, means: MetricMeans, extra: Mapping[str, float] = MappingProxyType({})) -> None:
        """Log means under the names of a stage, at the number of optimizer steps taken, and start them anew."""
        measured = {name: value.item() for name, value in means.compute().items()}
        values = {f"{stage}/{name}": value for name, value in {**measured, **extra}.items()}
        means.reset()
        self.log_dict(values, logger=False, sync_dist=True)
        for logger in self.loggers if not self.trainer.sanity_checking else ():
            logger.log_metrics(values, step=self.trainer.global_step)

    def validation_step(self, step: Step, batch_idx: int) -> None:
        """Evaluate examples; no graph is kept."""
        for batch in step.micro_batches:
            self.losses(batch, self.val_means)

    def on_validation_epoch_end(self) -> None:
        """Log the means over the whole validation split."""
        self.log_means("val", self.val_means)

    def test_step(self, step: Step, batch_idx: int) -> None:
        """Evaluate examples; no graph is kept."""
        for batch in step.micro_batches:
            self.losses(batch, self.test_means)

    def on_test_epoch_end(self) -> None:
        """Log the means over the whole test split."""
        self.log_means("test", self.test_means)


def is_logged_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether an optimizer step that is to be logged has just ended with this batch."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets but does not declare it
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and trainer.global_step % every == 0


def check_trainer_support(trainer: L.Trainer) -> None:
    """Refuse number formats that weights are kept in, and strategies that cut the model.

    Raises:
        ValueError: Weights are not kept in float32, or not whole on every device.
    """
    if isinstance(trainer.precision_plugin, HalfPrecision | DoublePrecision):
        raise ValueError(
            f"--trainer.precision: expected 32-true, bf16-mixed or 16-mixed, got {trainer.precision}. Weights are "
            "kept in float32: in 16 bits the small steps of preference training are lost, 64 serve no purpose."
        )
    if type(trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy):
        raise ValueError(
            f"--trainer.strategy: expected auto or ddp, got {type(trainer.strategy).__name__}. Every device holds the "
            "whole model: the number of micro-batches of a step may differ from device to device, and where weights "
            "are spread over devices each forward pass needs all of them. Use LoRA, --model.reference Cached or "
            "--model.gradient_checkpointing true for models that do not fit."
        )
