"""Attention over a flat row in which answers branch from a shared prompt, for any Hugging Face model.

Takes the queries, keys and values of one layer and the `Layout` of the row; gives what each sequence would have got
alone. Knows no model: it is registered once with the attention and mask interfaces of `transformers`, and every model
that goes through them can be told to use it (`share`).

A mask function of `transformers` says for query and key *positions* who sees whom (causal, sliding window, chunks).
Positions restart at every branch, so the very same function, evaluated on position ids inside a branch, is right for
the flat row too; plain causal attention needs no mask at all on the trunk.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from dpo.batch import Group, Layout

NAME = "prefix_shared"
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
CAUSAL = cast(MaskFunction, causal_mask_function)  # declared for ints, meant for tensors


class NotShareable(ValueError):
    """The model asks its attention for something that branches cannot give."""


def mask_function(*, mask_function: MaskFunction, use_vmap: bool = False, **_: object) -> MaskFunction | None:
    """What `transformers` hands to the layers as mask: the rule itself, or None for plain causal attention."""
    if use_vmap:
        raise NotShareable("The model adds a mask of its own that is not a function of positions alone.")
    return None if mask_function is CAUSAL else mask_function


def _visible(rule: MaskFunction, queries: Tensor, keys: Tensor) -> Bool[Tensor, "queries keys"]:
    zero = torch.zeros((), dtype=torch.long, device=queries.device)
    return rule(zero, zero, queries[:, None], keys[None, :]).expand(len(queries), len(keys))


def _group_masks(group: Group, positions: Tensor, rule: MaskFunction | None) -> list[Tensor | None]:
    """One mask for the trunk (None: plain causal) and one for every further branch."""
    trunk = positions[group.trunk]
    prompt = trunk[: group.prompt]
    masks: list[Tensor | None] = [None if rule is None else _visible(rule, trunk, trunk)]
    for branch in group.others():
        own = positions[branch]
        masks.append(_visible(rule or CAUSAL, own, torch.cat([prompt, own])))
    return masks


def _masks(layout: Layout, rule: MaskFunction | None) -> list[Tensor | None]:
    """All masks of the row under one rule, made once and shared by the layers."""
    if rule not in layout.masks:
        layout.masks[rule] = [mask for group in layout.groups for mask in _group_masks(group, layout.positions, rule)]
    return layout.masks[rule]


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


def attention(
    module: nn.Module,
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 groups tokens dim"],
    value: Float[Tensor, "1 groups tokens value"],
    attention_mask: MaskFunction | None,
    *,
    layout: Layout,
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
        raise NotShareable(f"{type(module).__name__} is not causal.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if softcap is not None or s_aux is not None:
            return _explicit(q, k, v, mask, scale, softcap, s_aux)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)

    masks = iter(_masks(layout, attention_mask))
    keys, values = _branch_keys(layout, key), _branch_keys(layout, value)
    # split, not slices: the gradient of a slice is as large as the whole row
    queries = query.split([length for group in layout.groups for length in group.segments], dim=2)
    parts = [attend(*inputs) for inputs in zip(queries, keys, values, masks, strict=True)]
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1), None


def _branch_keys(layout: Layout, x: Tensor) -> Iterator[Tensor]:
    """Keys (or values) of every segment: of a trunk its own, of any further branch those of its prompt and its own."""
    segments = iter(x.split([length for group in layout.groups for length in group.segments], dim=2))
    prompts = iter(x.split([n for g in layout.groups for n in (g.prompt, sum(g.branches))], dim=2)[::2])
    for group, prompt in zip(layout.groups, prompts, strict=True):
        yield next(segments)
        for _ in group.branches[1:]:
            yield torch.cat([prompt, next(segments)], dim=2)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask_function)


def share(model: PreTrainedModel) -> None:
    """Make the model attend over flat rows from now on: every forward needs ``layout=``.

    It stays so (and is not switched per call) because recomputation in the backward pass must find it as it was.

    Raises:
        NotShareable: The model does not go through the attention interface of `transformers`, or its rotary
            frequencies depend on the longest position of the whole row.
    """
    if not model._can_set_attn_implementation():
        raise NotShareable(f"{type(model).__name__} does not use the attention interface of transformers.")
    scaling = str(model.config.to_dict().get("rope_parameters"))
    if "'dynamic'" in scaling or "'longrope'" in scaling:
        raise NotShareable("The rotary frequencies change with the length of the longest sequence in a row.")
    model.set_attn_implementation(NAME)


@contextmanager
def plain(model: PreTrainedModel) -> Iterator[None]:
    """Within: the model attends to ordinary rows, as for generation. Not for passes that keep a graph."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    flat = [config for config in configs.values() if config._attn_implementation == NAME]
    for config in flat:
        config._attn_implementation_internal = "sdpa" if model._supports_sdpa else "eager"
    try:
        yield
    finally:
        for config in flat:
            config._attn_implementation_internal = NAME
