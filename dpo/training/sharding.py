"""The strategy `fsdp2`: weights, gradients and optimizer states spread over devices, by torch's FSDP2.

Losses, gradients and weights are those of one process, but for rounding: every device takes a share of the pairs of a
step, as under `ddp`.
"""

from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any, cast

import lightning as L
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy

from dpo.data.prompts import Prompts
from dpo.models.lora import adapter_layers
from dpo.models.prompt_sharing import weight_sharing_copy
from dpo.models.reference import InMemoryReference, MovingReference
from dpo.models.sharding import shard_model, slice_like, whole_tensor
from dpo.training.inference import PolicyModule


class FSDP2(ModelParallelStrategy):
    """Spreads every model over the devices, with replicas if asked for (HSDP).

    Each process first reads the models into host memory, and each device then keeps its slices. Checkpoints are those
    of one process: they are gathered in the host memory of the first one, tensor by tensor.

    Attributes:
        replicas: Copies of every model, each spread over world size / replicas devices that follow one another.
        cpu_offload: Keep slices and optimizer states in host memory, where the optimizer then steps.
        reduce_once: Add gradients up over the devices once per optimizer step. This keeps whole gradients on every
            device (4 bytes per trained weight) instead of slices, for one reduction per step instead of one per
            micro-batch.
    """

    strategy_name = "fsdp2"

    def __init__(
        self,
        replicas: int = 1,
        cpu_offload: bool = False,
        reduce_once: bool = False,
        process_group_backend: str | None = None,
    ) -> None:
        """Choose how the models are spread.

        Args:
            replicas: Copies of every model; the number of devices is a multiple of it.
            cpu_offload: Keep slices and optimizer states in host memory.
            reduce_once: Add gradients up over the devices once per optimizer step.
            process_group_backend: torch.distributed's backend. Default: the one for the device.

        Raises:
            ValueError: There are no replicas.
        """
        super().__init__(save_distributed_checkpoint=False, process_group_backend=process_group_backend)
        if replicas < 1:
            raise ValueError(f"--trainer.strategy.replicas: expected 1 or more, got {replicas}.")
        self.replicas = replicas
        self.cpu_offload = cpu_offload
        self.reduce_once = reduce_once
        self._accumulates = False

    @property
    def stage(self) -> PolicyModule:
        """The module whose models are spread."""
        return cast(PolicyModule, self.lightning_module)

    def setup_environment(self) -> None:
        """Start the processes' communication, and arrange the devices as replicas x slices.

        Raises:
            ValueError: The number of devices is no multiple of the number of replicas.
        """
        devices = self.num_nodes * self.num_processes
        if devices % self.replicas:
            raise ValueError(
                f"--trainer.strategy.replicas: expected a divisor of the number of devices {devices}, got "
                f"{self.replicas}."
            )
        self._data_parallel_size, self._tensor_parallel_size = self.replicas, devices // self.replicas
        super().setup_environment()

    def _get_process_group_backend(self) -> str:
        chosen = super()._get_process_group_backend()
        return "cpu:gloo,cuda:nccl" if self.cpu_offload and chosen == "nccl" else chosen

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """What a sampler over the devices is made with: every device reads rows of its own."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Whether weights are restored once they are spread; they are before."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether `load_optimizer_state_dict` is called."""
        return True

    def setup(self, trainer: L.Trainer) -> None:
        """Spread the models, then make the optimizer of their slices.

        Raises:
            ValueError: Something was chosen that is not exact, or not possible, with spread weights.
        """
        check_sharding_options(trainer, self.stage, getattr(trainer, "datamodule", None))
        _check_models(self.stage)
        mesh = self.device_mesh if self.replicas > 1 else self.device_mesh["tensor_parallel"]
        offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if self.cpu_offload else OffloadPolicy()
        for part in self.stage.modules():
            if isinstance(part, InMemoryReference) and not isinstance(part.model, FSDPModule):
                part.model = weight_sharing_copy(part.model)  # it may share layers with the policy
        for model in self.stage.models_by_role().values():
            shard_model(model, mesh, offload)
        # Weights that are first gathered in inference mode could not be trained later.
        for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
            loop.inference_mode = False
        trainer.predict_loop.inference_mode = False
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Move what is not spread; slices are where they belong."""
        for part in self.stage.children():
            if not any(isinstance(inner, FSDPModule) for inner in part.modules()):
                part.to(self.root_device)
        self.stage._device = self.root_device

    @contextmanager
    def block_backward_sync(self) -> Any:
        """Mark a Lightning batch that does not end its optimizer step."""
        self._accumulates = True
        try:
            yield
        finally:
            self._accumulates = False

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run the backward pass of a micro-batch; only that of the last one of a step is given the optimizer."""
        policy = cast(FSDPModule, self.stage.policy)
        is_last = optimizer is not None and not self._accumulates
        policy.set_requires_gradient_sync(is_last or not self.reduce_once)  # which sets the next one, too
        policy.set_requires_all_reduce(is_last)  # over replicas
        return super().backward(closure_loss, optimizer, *args, **kwargs)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights of a checkpoint, whole, in the first process."""
        return cast(dict[str, Any], self._gathered(self.stage.state_dict()))

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return the state of the optimizer, whole, in the first process.

        Raises:
            ValueError: The optimizer keeps tensors that belong to no single weight, so that they could not be spread.
        """
        optimizer = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                    raise ValueError(
                        f"--optimizer: expected one whose state has the shapes of the weights, got "
                        f"{type(optimizer).__name__} with {name} of shape {tuple(value.shape)}: its checkpoint could "
                        "not be spread again. Use torch.optim.AdamW, or --trainer.strategy ddp."
                    )
        return cast(dict[str, Any], self._gathered(optimizer.state_dict()))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights of a checkpoint into models that are whole, or already spread."""
        own = self.stage.state_dict()
        weights = {name: slice_like(value, own.get(name)) for name, value in checkpoint["state_dict"].items()}
        self.stage.load_state_dict(weights, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the state of the optimizer, as slices."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                index: {name: slice_like(value, parameters[index]) for name, value in values.items()}
                for index, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint in the first process, as with weights that are not spread."""
        super(ModelParallelStrategy, self).save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, as with weights that are not spread."""
        return super(ModelParallelStrategy, self).load_checkpoint(checkpoint_path, weights_only)

    def _gathered(self, values: Any) -> Any:
        """Return the values with whole tensors in host memory; None in their place in all processes but the first."""
        keep = self.is_global_zero

        def gather(tensor: Tensor) -> Tensor | None:
            whole = whole_tensor(tensor.detach())
            return whole.cpu() if keep else None

        return apply_to_collection(values, Tensor, gather)


def check_sharding_options(trainer: L.Trainer, stage: PolicyModule, data: object) -> None:
    """Refuse options that are not exact, or not possible, where weights are spread; they are known before a start.

    Raises:
        ValueError: There is such an option.
    """
    if isinstance(trainer.strategy, FSDP2):
        _refuse(
            {
                "--trainer.precision 16-mixed": trainer.precision == "16-mixed",
                "--model.compile true": bool(stage.plain_options()["compile"]),
                # devices would run different numbers of forward passes
                "--data Prompts": isinstance(data, Prompts),
            }
        )


def _check_models(stage: PolicyModule) -> None:
    models = stage.models_by_role().values()
    moving = any(isinstance(part, MovingReference) for part in stage.modules())
    _refuse(
        {
            "a model in 4 bits": not all(p.is_floating_point() for model in models for p in model.parameters()),
            "--model.reference Moving with an adapter": moving and bool(adapter_layers(stage.policy)),
        }
    )


def _refuse(choices: Mapping[str, bool]) -> None:
    for choice, is_made in choices.items():
        if is_made:
            raise ValueError(
                f"--trainer.strategy fsdp2: expected a run without {choice}. Leave it out, or use --trainer.strategy "
                "ddp, which reads the same checkpoints."
            )


StrategyRegistry.register(FSDP2.strategy_name, FSDP2, description="Weights spread over devices by FSDP2")
