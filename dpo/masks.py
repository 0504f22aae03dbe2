"""Which tokens of a flat row see which, in the words of `transformers`' mask functions.

A mask function says for query and key *positions* who sees whom (causal, sliding window, chunks). Positions restart at
every branch, so the very same function, evaluated on position ids inside a branch, is right for the flat row too; plain
causal attention needs no mask at all on the trunk. Knows no model and no attention.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from dpo.batch import Layout

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
CAUSAL = cast(MaskFunction, causal_mask_function)  # declared for ints, meant for tensors


class NotShareable(ValueError):
    """The model asks its attention for something that branches cannot give."""


@dataclass(frozen=True, eq=False)
class Rule:
    """Which positions see which; `window` where that is "the newest so many keys" and nothing else."""

    sees: MaskFunction
    window: int | None = None

    def __getitem__(self, kept: object) -> "Rule":
        """Of the queries that are kept: it asks for their positions, not for their places (Gemma 4)."""
        return self


def rule_of(
    *,
    mask_function: MaskFunction,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: Any = None,
    **_: object,
) -> Rule | None:
    """What `transformers` hands to the layers as mask: the rule itself, or None for plain causal attention.

    Raises:
        NotShareable: The mask is no function of positions.
    """
    if use_vmap:
        raise NotShareable("it adds a mask of its own that is not a function of positions alone")
    if mask_function is CAUSAL:
        return None
    return Rule(mask_function, local_size if local_size and _slides(mask_function, local_size, device) else None)


def _slides(sees: MaskFunction, size: int, device: Any) -> bool:
    """Is it a window? Chunks also come with a size: their edge lies at its multiples, a window's moves along."""
    query, keys = (torch.tensor(places, device=device) for places in ([2 * size], [size, size + 1]))
    return _visible(sees, query, keys).tolist() == [[False, True]]


def _visible(sees: MaskFunction, queries: Tensor, keys: Tensor) -> Bool[Tensor, "queries keys"]:
    zero = torch.zeros((), dtype=torch.long, device=queries.device)
    return sees(zero, zero, queries[:, None], keys[None, :]).expand(len(queries), len(keys))


def masks(layout: Layout, rule: Rule | None) -> list[Bool[Tensor, "queries keys"] | None]:
    """One mask for every trunk (None: plain causal) and every further branch."""
    sees, found = rule.sees if rule else CAUSAL, list[Tensor | None]()
    for group in layout.groups:
        trunk = layout.positions[group.trunk]
        found.append(_visible(sees, trunk, trunk) if rule else None)
        for branch in group.others():
            own = layout.positions[branch]
            found.append(_visible(sees, own, torch.cat([trunk[: group.prompt], own])))
    return found
