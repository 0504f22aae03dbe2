"""Models that are spread over devices by torch's FSDP2, and the way back to whole ones.

Every layer is a unit, whose weights are gathered for the time that it computes; what is left of a model (embeddings,
last norm, output head) is one more unit, which `run_as_forward` keeps gathered while the model is scored. Between
passes every weight is a `DTensor`, of which a device holds a slice.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def shard_model(model: PreTrainedModel, mesh: DeviceMesh, offload: OffloadPolicy) -> None:
    """Spread a model over devices, once: every layer is a unit, and all other weights are one.

    Args:
        model: The model, whole. It is changed in place.
        mesh: The devices: a row of slices, or replicas x slices.
        offload: Where slices are kept.
    """
    if isinstance(model, FSDPModule):
        return
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    vars(model)["empty_copy"] = deepcopy(model, empty)  # not a submodule
    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    for unit in (*layers, model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, offload_policy=offload)


def gather_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return a spread model as an ordinary one in host memory; one that is not spread as it is.

    Of a spread model, all processes take part and the first gets the weights; elsewhere they are on the meta device.
    """
    if not isinstance(model, FSDPModule):
        return model
    empty: PreTrainedModel = vars(model)["empty_copy"]
    weights = {}
    for name, parameter in model.named_parameters():
        whole = whole_tensor(parameter.detach())
        target = empty.get_parameter(name)
        is_kept = torch.distributed.get_rank() == 0
        weights[id(target)] = nn.Parameter(whole.cpu(), target.requires_grad) if is_kept else target
    return deepcopy(empty, weights)


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor that is spread over devices as a whole one; all processes take part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def slice_like(value: Any, example: Tensor | None) -> Any:
    """Return this process's slice of a whole tensor, spread like another of its shape; anything else as it is."""
    if not (isinstance(example, DTensor) and isinstance(value, Tensor) and value.shape == example.shape):
        return value
    value = value.to(example.device_mesh.device_type)
    return distribute_tensor(value, example.device_mesh, example.placements, src_data_rank=None)
