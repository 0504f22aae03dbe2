"""One optimizer step of a stage on tensors without data: what is in memory at its peak, and how much it computes.

Models are made of their configurations under torch's `FakeTensorMode`, so that a model of any size takes no memory and
no download. The step is the stage's own, with its loss, precision and optimizer, and torch's `MemTracker` adds up every
tensor that is alive. Whatever asks for the value of a tensor gets 1.
"""

import gc
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType, _RefType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo.data.sampler import Step
from dpo.models.attention import NotShareableError
from dpo.models.batch import Batch
from dpo.models.lora import Adapter, AsLoaded, LoRA, QLoRA
from dpo.models.prompt_sharing import ATTENTION_LAYER_TYPES, enable_prefix_sharing, vocabulary_size
from dpo.models.reference import AdapterOff, Copy, ReferenceModel
from dpo.planning.configs import ConfigLoader
from dpo.training.base import Stage
from dpo.training.dpo import DPO
from dpo.training.precomputed import Cached

aten = torch.ops.aten
FOUR_BIT_BYTES = 4.127 / 8  # of a weight in NF4 with quantized scales (Dettmers et al. 2023, section 3)


class _Part(_RefType):
    CAST = "Cast"  # weights in another number format, as autocast makes them
    HEAD = "Head"  # logits and what is as large


class _NoModules:
    """Takes the place of what follows modules: its hooks would keep layers that are computed again in memory."""

    parents: ClassVar = {"Global"}
    is_bw = False

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def register_user_hooks(self, *_: object) -> None:
        pass

    def clear_user_hooks(self) -> None:
        pass


class _PartTracker(MemTracker):
    """Adds up live tensors by part, without statistics of modules."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self._ref_class = [*_MemRefType, *_Part]  # type: ignore[assignment]  # an iterable is all that is needed
        self._vocabulary = vocabulary_size(stage.policy)
        self._casts_weight = False
        self._mod_tracker = _NoModules()  # type: ignore[assignment]
        for model in stage.models_by_role().values():
            self.track_external(model)
        for parameter in stage.policy.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._label_gradient)

    def _label_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._update_and_maybe_create_winfos(parameter.grad, _MemRefType.GRAD)

    def _track(self, reftype: _RefType, t: Tensor) -> None:
        if self._casts_weight:
            reftype = _Part.CAST
        elif t.ndim > 1 and t.shape[-1] == self._vocabulary:
            reftype = _Part.HEAD
        super()._track(reftype, t)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known: Any = self._WINFO.get(args[0].untyped_storage()) if func is aten._to_copy.default else None
        self._casts_weight = known is not None and known[0].reftype is _MemRefType.PARAM
        return super().__torch_dispatch__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


class _AnswerQuestions(TorchDispatchMode):
    """Gives 1 to whatever asks for the value of a tensor that has none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else 1
        return True if func is aten.equal.default else func(*args, **(kwargs or {}))


class _FileReference(ReferenceModel):
    """Stands for log-probabilities that are read from a file."""

    description, sha256, initial_distance = "", "", 0.0

    def forward(self, batch: Batch) -> Tensor:
        """Return one value for every scored token."""
        return torch.zeros_like(batch.targets, dtype=torch.float32)


@dataclass(frozen=True)
class Variant:
    """What of a stage is planned otherwise than it was given; None: as it was given.

    Attributes:
        adapter: Which weights train.
        is_cached: Log-probabilities of the reference come from a file, so that no model of it is in memory.
        checkpointing: Activations of layers are recomputed.
    """

    adapter: Adapter | None = None
    is_cached: bool | None = None
    checkpointing: bool | None = None

    def applied_to(self, stage: Stage) -> Stage:
        """Return a copy of a stage whose models were not read yet."""
        changed = deepcopy(stage)
        changed.adapter = self.adapter or stage.adapter
        if self.checkpointing is not None:
            changed.gradient_checkpointing = self.checkpointing
        return changed


DEFAULT_VARIANT = Variant()


@dataclass(frozen=True)
class UnitSizes:
    """Bytes of the weights of a model, or of those that train, by the units that are gathered when it is sharded.

    Attributes:
        total: All of them.
        largest_layer: Those of the largest layer.
        rest: Those outside of layers: embeddings, last norm and output head.
    """

    total: int
    largest_layer: int
    rest: int


@dataclass(frozen=True)
class StepTrace:
    """What a step needs on one device that holds everything. All sizes are in bytes.

    Attributes:
        policy: Weights of the policy.
        trained: Those of them that train.
        reference: Weights of the reference that are not the policy's.
        gradients: Gradients of weights that are alive at the peak.
        optimizer: States of the optimizer.
        casts: Weights in the number format that is computed in, which autocast keeps for the backward pass.
        activations: Activations, their gradients and other tensors at the peak.
        head: Logits and probabilities of the output head at the peak.
        flops: Floating-point operations of the matrix products of one micro-batch, attention itself left out.
        parameters: Number of weights.
        trained_parameters: Number of weights that train.
    """

    policy: UnitSizes
    trained: UnitSizes
    reference: UnitSizes
    gradients: int
    optimizer: int
    casts: int
    activations: int
    head: int
    flops: int
    parameters: int
    trained_parameters: int

    @property
    def peak(self) -> int:
        """The sum of all parts."""
        held = self.policy.total + self.reference.total + self.optimizer
        return held + self.gradients + self.casts + self.activations + self.head


def trace_step(
    stage: Stage,
    batch: Batch,
    variant: Variant = DEFAULT_VARIANT,
    *,
    micro_batches: int = 1,
    autocast_dtype: torch.dtype | None = None,
    clip_norm: float | None = None,
    as_on_cuda: bool = False,
    configs: Mapping[str, PreTrainedConfig] = MappingProxyType({}),
) -> StepTrace:
    """Run one optimizer step without data.

    Args:
        stage: What is trained. It is left as it is.
        batch: The largest micro-batch; its token ids do not matter.
        variant: What is planned otherwise.
        micro_batches: How many micro-batches a step has; after the first, gradients are in memory all the time.
        autocast_dtype: Number format of mixed precision. None: float32.
        clip_norm: Norm to which gradients are clipped.
        as_on_cuda: Take the ways through attention, head and optimizer that are taken on CUDA.
        configs: Configurations by path, of models that are not looked for.

    Raises:
        ValueError: A model's configuration cannot be read, or an option does not suit it.
    """
    stage = variant.applied_to(stage)
    stage.loader = ConfigLoader(stage.loader.trust_remote_code, stage.loader.pickled_weights, configs)
    backward = SimpleNamespace(backward=lambda loss, _: loss.backward())
    precision = {None: "32-true", torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}[autocast_dtype]
    stage._trainer = SimpleNamespace(  # type: ignore[assignment]  # what a step asks of a trainer
        strategy=backward,
        precision=precision,
        world_size=1,
        accumulate_grad_batches=1,
        scaler=None,
        global_step=0,
        train_dataloader=None,
    )
    with _without_data(as_on_cuda):
        _make_models(stage, variant)
        optimizer = _optimizer_with_states(stage, as_on_cuda)
        tracker = _PartTracker(stage)
        tracker.track_external(optimizer)
        step = Step((batch,) * min(micro_batches, 2), len(batch), len(batch.targets))
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = _NoModules()  # type: ignore[assignment]
        with tracker, counter:
            with torch.autocast("cpu", autocast_dtype, enabled=autocast_dtype is not None):
                loss = stage.training_step(step, 0)
            loss.backward()
            stage.on_before_optimizer_step(optimizer)
            stage.configure_gradient_clipping(optimizer, clip_norm, "norm")
            optimizer.step()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
        flops = counter.get_total_flops() // len(step.micro_batches)
        return _step_trace(stage, peak, flops)


def _make_models(stage: Stage, variant: Variant) -> None:
    """Make the models of a stage, with the reference that is planned."""
    is_cached = variant.is_cached
    if isinstance(stage, DPO) and stage.loss.uses_reference:
        choice = stage.reference_choice
        if isinstance(choice, Cached):
            choice, is_cached = choice.of, is_cached is not False
        is_new_adapter = isinstance(stage.adapter, LoRA | QLoRA)
        stage.reference_choice = AdapterOff() if isinstance(choice, Copy) and is_new_adapter else choice
    stage.configure_model()
    if is_cached and isinstance(stage, DPO) and stage.loss.uses_reference:
        stage.reference = _FileReference()


def _optimizer_with_states(stage: Stage, as_on_cuda: bool) -> torch.optim.Optimizer:
    """Return the optimizer after a first step, whose states are there."""
    chosen = stage.configure_optimizers()
    optimizer: torch.optim.Optimizer = chosen["optimizer"] if isinstance(chosen, dict) else chosen
    for group in optimizer.param_groups:
        if as_on_cuda and group.get("foreach", 0) is None and not group.get("fused"):
            group["foreach"] = True  # the default on CUDA
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def _step_trace(stage: Stage, peak: Mapping[Any, int], flops: int) -> StepTrace:
    policy = list(stage.policy.parameters())
    models = stage.models_by_role()
    known = set(map(id, policy))
    reference = [p for role, m in models.items() if role != "policy" for p in m.parameters() if id(p) not in known]
    trained = [p for p in policy if p.requires_grad]
    layer_numbers = {id(p): n for m in models.values() for n, layer in _layers(m) for p in layer.parameters()}
    four_bits = _four_bit_weights(stage)
    casts = peak[_Part.CAST]
    if four_bits:  # they are restored one at a time
        head = stage.policy.get_output_embeddings().weight
        casts = 2 * (max(p.numel() for p in policy if id(p) in four_bits) + head.numel())
    others = (_MemRefType.ACT, _MemRefType.TEMP, _MemRefType.OTH, _MemRefType.BUFFER)
    return StepTrace(
        policy=_unit_sizes(policy, layer_numbers, four_bits),
        trained=_unit_sizes(trained, layer_numbers, four_bits),
        reference=_unit_sizes(reference, layer_numbers, four_bits),
        gradients=peak[_MemRefType.GRAD],
        optimizer=peak[_MemRefType.OPT],
        casts=casts,
        activations=sum(peak[part] for part in others),
        head=peak[_Part.HEAD],
        flops=flops,
        parameters=sum(p.numel() for p in policy),
        trained_parameters=sum(p.numel() for p in trained),
    )


def _layers(model: PreTrainedModel) -> Iterator[tuple[int, nn.Module]]:
    return enumerate(part for part in model.modules() if isinstance(part, GradientCheckpointingLayer))


def _four_bit_weights(stage: Stage) -> set[int]:
    """Return the ids of weights that would be in 4 bits: of all linear layers but the head and adapters."""
    if not (isinstance(stage.adapter, QLoRA) or (isinstance(stage.adapter, AsLoaded) and stage.adapter.four_bits)):
        return set()
    head = stage.policy.get_output_embeddings()
    linear = [part for part in stage.policy.modules() if isinstance(part, nn.Linear) and part is not head]
    return {id(part.weight) for part in linear if not part.weight.requires_grad}


def _unit_sizes(parameters: Sequence[Tensor], layer_numbers: Mapping[int, int], four_bits: Set[int]) -> UnitSizes:
    sizes: Counter[int] = Counter()
    for p in parameters:
        byte_count = p.numel() * FOUR_BIT_BYTES if id(p) in four_bits else p.numel() * p.element_size()
        sizes[layer_numbers.get(id(p), -1)] += round(byte_count)
    rest = sizes.pop(-1, 0)
    return UnitSizes(sizes.total() + rest, max(sizes.values(), default=0), rest)


def _share_prompts(model: PreTrainedModel) -> str:
    """Let a model share prompts unless its configuration speaks against it, as there are no values to compare."""
    if set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - ATTENTION_LAYER_TYPES:
        return "it has layers that carry state along the row"
    try:
        enable_prefix_sharing(model)
    except NotShareableError as error:
        return str(error)
    return ""


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Have Python collect no garbage within the block, and never what was made there.

    Collecting cycles that hold tensors without data sometimes frees their memory twice (torch 2.13), which ends the
    process. There are no data, so little is kept.
    """
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def _without_data(as_on_cuda: bool) -> Iterator[None]:
    """Have tensors without data, and nothing done that needs data, within the block."""
    replaced: dict[str, Any] = {
        "dpo.training.base.share_if_exact": _share_prompts,
        "torch.nn.Module.to": lambda module, *_, **__: module,  # peft's: all is where it belongs
        "dpo.models.reference.weights_sha256": lambda model: "",
        "dpo.models.lora._four_bits": dict,
        "dpo.training.nonfinite.FiniteMonitor.raise_if_nonfinite": lambda *_: None,
        "dpo.training.base.rank_zero_info": lambda text: None,
        "dpo.training.dpo.rank_zero_info": lambda text: None,
    }
    if as_on_cuda:
        replaced["dpo.models.attention._kernel_supports"] = lambda query, value: query.element_size() == 2
        replaced["dpo.models.scoring.CPU_CACHE_LOGITS"] = sys.maxsize
    with ExitStack() as stack:
        stack.enter_context(_no_garbage_collection())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # torch's own deepcopy does
        for name, value in replaced.items():
            stack.enter_context(patch(name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_AnswerQuestions())  # type: ignore[no-untyped-call]
        yield
