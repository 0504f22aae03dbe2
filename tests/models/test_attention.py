"""The two ways of attending over a flat row against each other; the kernel of the second is played by plain torch here.

On a CUDA device the kernel itself is compared by the preflight of every run, and by the last test where there is one.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from dpo.models import attention
from dpo.models.attention import MaskRule, NotShareableError, _by_segments, _in_one_call, make_mask_rule
from dpo.models.batch import Batch
from dpo.models.prompt_sharing import enable_prefix_sharing, standard_attention
from dpo.models.scoring import score
from tests.support.sharing import build, random_batch


def kernel(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, longest_q: int, longest_k: int,
    *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """What the variable-length kernel promises: causal from the bottom right, `window_size[0]` keys to the left."""
    assert longest_q == starts_q.diff().max() and longest_k == starts_k.diff().max()
    assert window_size[1] == 0 and enable_gqa == (q.shape[1] != k.shape[1])
    parts = []
    for i in range(len(starts_q) - 1):
        a, b, c, d = (int(starts[i + j]) for starts in (starts_q, starts_k) for j in (0, 1))
        query = torch.arange(d - c - (b - a), d - c)[:, None]
        key = torch.arange(d - c)[None]
        seen = (key <= query) & ((window_size[0] < 0) | (key >= query - window_size[0]))
        x, y, z = (each.transpose(0, 1)[None] for each in (q[a:b], k[c:d], v[c:d]))
        parts.append(F.scaled_dot_product_attention(x, y, z, attn_mask=seen, scale=scale, enable_gqa=True)[0])
    return torch.cat(parts, dim=1).transpose(0, 1)


def inputs(batch: Batch, heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    sizes = [(1, n, len(batch.tokens), 8) for n in (heads, groups, groups)]
    return tuple(torch.randn(size, generator=draw).requires_grad_() for size in sizes)  # type: ignore[return-value]


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("groups", [4, 2])
def test_one_call_equals_segments_in_values_and_gradients(
    window: int | None, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    batch = random_batch()
    rule = MaskRule(sliding_window_causal_mask_function(window), window) if window else None
    tensors = inputs(batch, 4, groups)
    none = {"softcap": None, "sinks": None}
    by_segments = _by_segments(batch.layout, *tensors, rule, 0.3, **none)
    in_one_call = _in_one_call(batch.layout, *tensors, window, 0.3)
    torch.testing.assert_close(in_one_call, by_segments)
    pull = torch.randn_like(by_segments)
    for one, other in zip(
        torch.autograd.grad(in_one_call, tensors, pull), torch.autograd.grad(by_segments, tensors, pull), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_a_window_is_told_from_chunks_and_from_everything_else() -> None:
    assert make_mask_rule(mask_function=causal_mask_function) is None
    for size in (1, 2, 7):
        sliding = make_mask_rule(mask_function=sliding_window_causal_mask_function(size), local_size=size)
        assert sliding is not None and sliding.window == size
        chunks = chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.long))
        chunked = make_mask_rule(mask_function=chunks, local_size=size)
        assert (chunked is not None and chunked.window is None) or size == 1  # chunks of one are windows of one
    other = make_mask_rule(mask_function=and_masks(causal_mask_function, lambda b, h, q, k: (q - k) % 2 == 0))
    assert other is not None and other.window is None


def test_a_mask_that_is_no_rule_of_positions_is_refused() -> None:
    with pytest.raises(NotShareableError, match="not a function of positions"):
        make_mask_rule(mask_function=causal_mask_function, use_vmap=True)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: the variable-length kernel runs there only"
)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 8}])
def test_the_kernel_on_the_device(options: dict[str, int]) -> None:
    family = "mistral" if options else "llama"
    model = build(family, {"hidden_size": 128, "num_attention_heads": 2, **options}).to("cuda", torch.bfloat16)
    batch = random_batch().to("cuda")
    enable_prefix_sharing(model)
    shared = score(model, batch).logps
    with standard_attention(model):
        torch.testing.assert_close(shared, score(model, batch).logps, rtol=0.05, atol=0.1)
