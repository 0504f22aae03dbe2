"""Attention over a flat row in which answers branch from a shared prompt, for any Hugging Face model.

Takes the queries, keys and values of one layer and the `Layout` of the row; gives what each sequence would have got
alone. Knows no model: it is registered once with the attention and mask interfaces of `transformers`, and every model
that goes through them can be told to use it (`dpo.models.prompt_sharing`).

Which tokens of the row see which is said in the words of `transformers`' mask functions: for query and key *positions*
they say who sees whom (causal, sliding window, chunks). Positions restart at every branch, so the very same function,
evaluated on position ids inside a branch, is right for the flat row too; plain causal attention needs no mask at all on
the trunk.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from dpo.models.batch import RowLayout, move_to_device

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
CAUSAL_MASK = cast(MaskFunction, causal_mask_function)  # declared for ints, meant for tensors


class NotShareableError(ValueError):
    """The model asks its attention for something that branches cannot give."""


@dataclass(frozen=True, eq=False)
class MaskRule:
    """Which positions see which; `window` where that is "the newest so many keys" and nothing else."""

    mask_function: MaskFunction
    window: int | None = None

    def __getitem__(self, kept: object) -> "MaskRule":
        """Of the queries that are kept: it asks for their positions, not for their places (Gemma 4)."""
        return self


def make_mask_rule(
    *,
    mask_function: MaskFunction,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: Any = None,
    **_: object,
) -> MaskRule | None:
    """What `transformers` hands to the layers as mask: the rule itself, or None for plain causal attention.

    Raises:
        NotShareable: The mask is no function of positions.
    """
    if use_vmap:
        raise NotShareableError("it adds a mask of its own that is not a function of positions alone")
    if mask_function is CAUSAL_MASK:
        return None
    return MaskRule(mask_function, local_size if local_size and _slides(mask_function, local_size, device) else None)


def _slides(sees: MaskFunction, size: int, device: Any) -> bool:
    """Is it a window? Chunks also come with a size: their edge lies at its multiples, a window's moves along."""
    query, keys = (torch.tensor(places, device=device) for places in ([2 * size], [size, size + 1]))
    return _visible(sees, query, keys).tolist() == [[False, True]]


def _visible(sees: MaskFunction, queries: Tensor, keys: Tensor) -> Bool[Tensor, "queries keys"]:
    zero = torch.zeros((), dtype=torch.long, device=queries.device)
    return sees(zero, zero, queries[:, None], keys[None, :]).expand(len(queries), len(keys))


def segment_masks(layout: RowLayout, rule: MaskRule | None) -> list[Bool[Tensor, "queries keys"] | None]:
    """One mask for every trunk (None: plain causal) and every further branch."""
    sees, found = rule.mask_function if rule else CAUSAL_MASK, list[Tensor | None]()
    for group in layout.groups:
        trunk = layout.position_ids[group.trunk_slice]
        found.append(_visible(sees, trunk, trunk) if rule else None)
        for branch in group.other_branch_slices():
            own = layout.position_ids[branch]
            found.append(_visible(sees, own, torch.cat([trunk[: group.prompt_length], own])))
    return found


PREFIX_SHARED_NAME = "prefix_shared"


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention written out, for what no kernel does: capped scores (Gemma 2) and sinks (gpt-oss)."""
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


def _by_segments(
    layout: RowLayout, query: Tensor, key: Tensor, value: Tensor, rule: MaskRule | None, scale: float, **special: Any
) -> Tensor:
    """One attention call for every trunk and every branch."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if any(option is not None for option in special.values()):
            return _explicit(q, k, v, mask, scale, **special)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)

    # split, not slices: the gradient of a slice is as large as the whole row
    queries = query.split(layout.segment_lengths, dim=2)
    keys, values = _branch_keys(layout, key), _branch_keys(layout, value)
    seen = layout.compute_once(rule, lambda: segment_masks(layout, rule))
    parts = [attend(*inputs) for inputs in zip(queries, keys, values, seen, strict=True)]
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1)


def _branch_keys(layout: RowLayout, x: Tensor) -> Iterator[Tensor]:
    """Keys (or values) of every segment: of a trunk its own, of any further branch those of its prompt and its own."""
    segments = iter(x.split(layout.segment_lengths, dim=2))
    prompts = x.split([n for group in layout.groups for n in (group.prompt_length, sum(group.branch_lengths))], dim=2)[
        ::2
    ]
    for group, prompt in zip(layout.groups, prompts, strict=True):
        yield next(segments)
        for _ in group.branch_lengths[1:]:
            yield torch.cat([prompt, next(segments)], dim=2)


@dataclass(frozen=True)
class VarlenSegments:
    """All segments of a row for one call of a variable-length kernel: where each begins, and which keys it has."""

    query_starts: Tensor
    key_starts: Tensor
    key_indices: Tensor
    max_query_length: int
    max_key_length: int


def _ragged(layout: RowLayout) -> VarlenSegments:
    rows = []
    for group in layout.groups:
        rows.append(list(range(group.trunk_slice.start, group.trunk_slice.stop)))
        prompt = rows[-1][: group.prompt_length]
        rows.extend(prompt + list(range(branch.start, branch.stop)) for branch in group.other_branch_slices())
    lengths, keys = list(map(len, rows)), torch.tensor([token for row in rows for token in row])
    starts = (torch.tensor([0, *accumulate(each)], dtype=torch.int32) for each in (layout.segment_lengths, lengths))
    query_starts, key_starts, keys = (move_to_device(each, layout.position_ids.device) for each in (*starts, keys))
    return VarlenSegments(query_starts, key_starts, keys, max(layout.segment_lengths), max(lengths))


def _in_one_call(
    layout: RowLayout, query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float
) -> Float[Tensor, "1 tokens heads dim"]:
    """All segments in one call; causal from the bottom right, so a branch sees its whole prompt."""
    ragged: VarlenSegments = layout.compute_once(VarlenSegments, lambda: _ragged(layout))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    attended = varlen_attn(
        q.contiguous(),
        k[ragged.key_indices],
        v[ragged.key_indices],
        ragged.query_starts,
        ragged.key_starts,
        ragged.max_query_length,
        ragged.max_key_length,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return cast(Tensor, attended)[None]


def _has_kernel(query: Tensor, value: Tensor) -> bool:
    """What FlashAttention takes."""
    sizes = query.shape[-1] == value.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and half and sizes and torch.cuda.get_device_capability(query.device) >= (8, 0)


def prefix_shared_attention(
    module: nn.Module,
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 groups tokens dim"],
    value: Float[Tensor, "1 groups tokens value"],
    attention_mask: MaskRule | None,
    *,
    layout: RowLayout,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Float[Tensor, "1 tokens heads value"], None]:
    """One layer's attention over a flat row: every branch attends to its prompt and to itself.

    Raises:
        NotShareable: The layer is not causal.
    """
    if not getattr(module, "is_causal", True):
        raise NotShareableError(f"{type(module).__name__} is not causal")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(query.device.type):  # rotary positions leave queries and keys in float32
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    expressible = softcap is None and s_aux is None and (attention_mask is None or attention_mask.window is not None)
    if expressible and _has_kernel(query, value):
        window = attention_mask.window if attention_mask else None
        return _in_one_call(layout, query, key, value, window, scale), None
    return _by_segments(layout, query, key, value, attention_mask, scale, softcap=softcap, sinks=s_aux), None


# The loops over segments would be compiled anew for every batch; without them the layer around is compiled once.
AttentionInterface.register(PREFIX_SHARED_NAME, torch.compiler.disable(prefix_shared_attention))
AttentionMaskInterface.register(PREFIX_SHARED_NAME, make_mask_rule)
