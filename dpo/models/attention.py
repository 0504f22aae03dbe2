"""Attention over a flat row in which several answers share one prompt, for Hugging Face models.

A `RowLayout` says where prompts and answers lie in the row. Each answer attends to its prompt and to itself, exactly as
if it stood alone behind the prompt. The functions here are registered with the attention and mask interfaces of
`transformers`; `dpo.models.prompt_sharing` switches a model to them.

Masks stay those of `transformers`: functions that say which query *position* sees which key position (causal, sliding
window, chunked). Position ids restart at every branch, so the same functions are right inside a branch of a flat row.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from inspect import signature
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from dpo.models.batch import RowLayout, move_to_device

PREFIX_SHARED_NAME = "prefix_shared"
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
CAUSAL_MASK = cast(MaskFunction, causal_mask_function)  # annotated for ints, called with tensors
KERNEL_GROUPS_HEADS = "enable_gqa" in signature(varlen_attn).parameters  # not in torch 2.11


class NotShareableError(ValueError):
    """The model needs something of its attention that a flat row with shared prompts cannot provide."""


_IN_FLAT_ROW = ContextVar("in_flat_row", default=False)


@contextmanager
def flat_row() -> Iterator[None]:
    """Mark forward passes as reading a flat row; outside, the same model reads ordinary rows, e.g. to generate."""
    token = _IN_FLAT_ROW.set(True)
    try:
        yield
    finally:
        _IN_FLAT_ROW.reset(token)


@dataclass(frozen=True, eq=False)
class MaskRule:
    """A rule that says which positions see which.

    Attributes:
        mask_function: A mask function of `transformers`, called with (batch, head, query, key) positions.
        window: The number of newest keys that a query sees, itself included, if the rule is exactly that; otherwise
            None.
    """

    mask_function: MaskFunction
    window: int | None = None

    def __getitem__(self, kept: object) -> "MaskRule":
        """Return the rule itself: Gemma 4 indexes its masks by kept queries, and a rule holds for all positions."""
        return self


def make_mask_rule(
    *,
    mask_function: MaskFunction,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: Any = None,
    **shape: Any,
) -> MaskRule | Tensor | None:
    """Return the mask that `transformers` passes to every layer (its mask interface).

    Returns:
        Within `flat_row` the rule, or None for plain causal attention; otherwise an ordinary boolean mask.

    Raises:
        NotShareableError: The mask does not depend on positions alone.
    """
    if not _IN_FLAT_ROW.get():
        shape |= {"local_size": local_size, "use_vmap": use_vmap, "device": device, "allow_is_causal_skip": False}
        return cast(Tensor, sdpa_mask(mask_function=mask_function, **shape))
    if use_vmap:
        raise NotShareableError("it adds a mask of its own that is not a function of positions alone")
    if mask_function is CAUSAL_MASK:
        return None
    return MaskRule(mask_function, local_size if local_size and _slides(mask_function, local_size, device) else None)


def _slides(mask_function: MaskFunction, size: int, device: Any) -> bool:
    """Tell a sliding window from chunks, which have a size too: at position 2 * size a chunk has just begun."""

    def seen(device: Any) -> bool:
        query, keys = (torch.tensor(positions, device=device) for positions in ([2 * size], [size, size + 1]))
        return bool(_visible(mask_function, query, keys).tolist() == [[False, True]])

    try:
        return seen("cpu")  # on the device the host would wait for it, in every forward pass
    except RuntimeError:  # the function holds tensors, as that of chunks does
        return seen(device)


def _visible(mask_function: MaskFunction, queries: Tensor, keys: Tensor) -> Bool[Tensor, "queries keys"]:
    zero = torch.zeros((), dtype=torch.long, device=queries.device)
    return mask_function(zero, zero, queries[:, None], keys[None, :]).expand(len(queries), len(keys))


def segment_masks(layout: RowLayout, rule: MaskRule | None) -> list[Bool[Tensor, "queries keys"] | None]:
    """Return the mask of every segment; None for a trunk with plain causal attention."""
    mask_function = rule.mask_function if rule else CAUSAL_MASK
    masks: list[Tensor | None] = []
    for group in layout.groups:
        trunk = layout.position_ids[group.trunk_slice]
        masks.append(_visible(mask_function, trunk, trunk) if rule else None)
        for branch in group.other_branch_slices():
            own = layout.position_ids[branch]
            masks.append(_visible(mask_function, own, torch.cat([trunk[: group.prompt_length], own])))
    return masks


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend, causally where there is no mask; key heads that serve several query heads are repeated before."""
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)
    # written out, as no kernel caps scores (Gemma 2) or has sinks (gpt-oss)
    scores = (query @ key.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:  # a learned column that takes probability and gives no value
        scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return weights[..., : value.shape[-2]] @ value


def _repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat the heads of keys and values that several query heads share."""
    repeats = query.shape[1] // key.shape[1]
    if repeats == 1:
        return key, value
    return key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)


def _attend_per_segment(
    layout: RowLayout, query: Tensor, key: Tensor, value: Tensor, rule: MaskRule | None, **options: Any
) -> Tensor:
    """Make one attention call for every trunk and every further branch."""
    key, value = _repeat_heads(query, key, value)
    # split, not slices: the gradient of every slice would be as large as the whole row
    queries = query.split(layout.segment_lengths, dim=2)
    keys = _segment_keys(layout, key)
    values = _segment_keys(layout, value)
    masks = layout.compute_once(rule, lambda: segment_masks(layout, rule))
    parts = [_attend(*inputs, **options) for inputs in zip(queries, keys, values, masks, strict=True)]
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1)


def _segment_keys(layout: RowLayout, x: Tensor) -> Iterator[Tensor]:
    """Yield the keys (or values) that each segment sees: a trunk its own, a further branch its prompt's and its own."""
    segments = iter(x.split(layout.segment_lengths, dim=2))
    lengths = [n for group in layout.groups for n in (group.prompt_length, sum(group.branch_lengths))]
    prompts = x.split(lengths, dim=2)[::2]
    for group, prompt in zip(layout.groups, prompts, strict=True):
        yield next(segments)
        for _ in group.branch_lengths[1:]:
            yield torch.cat([prompt, next(segments)], dim=2)


@dataclass(frozen=True)
class VarlenSegments:
    """All segments of a row, as one call of a variable-length attention kernel takes them.

    Attributes:
        query_starts: Index of the first query of every segment, and the number of queries.
        key_starts: The same for keys, of which a branch also has those of its prompt.
        key_indices: Index in the row of every key, segment after segment.
        max_query_length: Queries of the longest segment.
        max_key_length: Keys of the longest segment.
    """

    query_starts: Tensor
    key_starts: Tensor
    key_indices: Tensor
    max_query_length: int
    max_key_length: int


def _varlen_segments(layout: RowLayout) -> VarlenSegments:
    keys: list[list[int]] = []
    for group in layout.groups:
        trunk = list(range(group.trunk_slice.start, group.trunk_slice.stop))
        prompt = trunk[: group.prompt_length]
        keys.append(trunk)
        keys.extend(prompt + list(range(branch.start, branch.stop)) for branch in group.other_branch_slices())
    lengths = (layout.segment_lengths, list(map(len, keys)))
    starts = (torch.tensor([0, *accumulate(each)], dtype=torch.int32) for each in lengths)
    indices = torch.tensor([token for segment in keys for token in segment])
    tensors = (move_to_device(tensor, layout.position_ids.device) for tensor in (*starts, indices))
    query_starts, key_starts, key_indices = tensors
    return VarlenSegments(query_starts, key_starts, key_indices, *map(max, lengths))


def _attend_in_one_call(
    layout: RowLayout, query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float
) -> Float[Tensor, "1 tokens heads dim"]:
    """Attend in all segments by one kernel call; it is causal from the last key, so a branch sees its whole prompt."""
    segments = layout.compute_once(VarlenSegments, lambda: _varlen_segments(layout))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    keys, values = k[segments.key_indices], v[segments.key_indices]
    grouped: dict[str, Any] = {}
    if KERNEL_GROUPS_HEADS:
        grouped["enable_gqa"] = q.shape[1] != k.shape[1]
    else:
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (keys, values))
    attended = varlen_attn(
        q.contiguous(),
        keys,
        values,
        segments.query_starts,
        segments.key_starts,
        segments.max_query_length,
        segments.max_key_length,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    return cast(Tensor, attended)[None]


def _kernel_supports(query: Tensor, value: Tensor) -> bool:
    """Whether the variable-length kernel (FlashAttention) takes these devices, types and head sizes."""
    sizes = query.shape[-1] == value.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and half and sizes and torch.cuda.get_device_capability(query.device) >= (8, 0)


def prefix_shared_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch groups keys dim"],
    value: Float[Tensor, "batch groups keys value"],
    attention_mask: MaskRule | Tensor | None,
    *,
    layout: RowLayout | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Float[Tensor, "batch tokens heads value"], None]:
    """Attend over a flat row, where every answer sees its prompt and itself; without a layout, over ordinary rows.

    Args:
        module: The attention layer.
        query: Queries.
        key: Keys, of fewer heads than the queries where several of these share one.
        value: Values.
        attention_mask: What `make_mask_rule` returned.
        layout: Where prompts and answers lie in the flat row.
        scaling: Factor of the scores; by default 1 / sqrt(dim).
        softcap: Bound of the scores (Gemma 2).
        s_aux: A logit per head that takes probability and has no value (the sinks of gpt-oss).

    Raises:
        NotShareableError: The layer is not causal.
    """
    if not getattr(module, "is_causal", True):
        raise NotShareableError(f"{type(module).__name__} is not causal")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(query.device.type):  # rotary positions leave queries and keys in float32
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": s_aux}
    if layout is None:
        assert isinstance(attention_mask, Tensor)
        key, value = _repeat_heads(query, key, value)
        return _attend(query, key, value, attention_mask, **options).transpose(1, 2), None
    assert not isinstance(attention_mask, Tensor)
    plain_or_window = attention_mask is None or attention_mask.window is not None
    if softcap is None and s_aux is None and plain_or_window and _kernel_supports(query, value):
        window = attention_mask.window if attention_mask else None
        return _attend_in_one_call(layout, query, key, value, window, scale), None
    return _attend_per_segment(layout, query, key, value, attention_mask, **options), None


# Not compiled: the loops over segments would be, for every batch anew. The rest of the layer is compiled once.
AttentionInterface.register(PREFIX_SHARED_NAME, torch.compiler.disable(prefix_shared_attention))
AttentionMaskInterface.register(PREFIX_SHARED_NAME, make_mask_rule)
