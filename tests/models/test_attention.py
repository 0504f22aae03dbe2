"""Attention over a flat row: one call per segment against one kernel call for all, and ordinary rows.

The kernel is replaced by plain torch. On a CUDA device the real one is compared by the last test, and by the preflight
of every run.
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
from dpo.models.attention import (
    MaskRule,
    NotShareableError,
    _attend_in_one_call,
    _attend_per_segment,
    flat_row,
    make_mask_rule,
)
from dpo.models.batch import Batch
from dpo.models.prompt_sharing import enable_prefix_sharing, standard_attention
from dpo.models.scoring import score
from tests.support.sharing import SHARED, build, random_batch


def kernel(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, longest_q: int, longest_k: int,
    *, scale: float, window_size: tuple[int, int], enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Do what the variable-length kernel promises: causal from the last key, `window_size[0]` keys to the left."""
    assert longest_q == starts_q.diff().max() and longest_k == starts_k.diff().max()
    assert window_size[1] == 0 and enable_gqa == (q.shape[1] != k.shape[1])
    parts = []
    for i in range(len(starts_q) - 1):
        a, b, c, d = (int(starts[i + j]) for starts in (starts_q, starts_k) for j in (0, 1))
        query = torch.arange(d - c - (b - a), d - c)[:, None]
        key = torch.arange(d - c)[None]
        seen = (key <= query) & ((window_size[0] < 0) | (key >= query - window_size[0]))
        segment = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        parts.append(F.scaled_dot_product_attention(*segment, attn_mask=seen, scale=scale, enable_gqa=True)[0])
    return torch.cat(parts, dim=1).transpose(0, 1)


def inputs(batch: Batch, heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    sizes = [(1, n, len(batch.tokens), 8) for n in (heads, groups, groups)]
    return tuple(torch.randn(size, generator=draw).requires_grad_() for size in sizes)  # type: ignore[return-value]


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize(("groups", "kernel_groups"), [(4, True), (2, True), (2, False)])
def test_one_call_equals_segments_in_values_and_gradients(
    window: int | None, groups: int, kernel_groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel has no grouped heads (torch 2.11) it gets repeated ones."""
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "KERNEL_GROUPS_HEADS", kernel_groups)
    batch = random_batch()
    rule = MaskRule(sliding_window_causal_mask_function(window), window) if window else None
    tensors = inputs(batch, 4, groups)
    per_segment = _attend_per_segment(batch.layout, *tensors, rule, scale=0.3, softcap=None, sinks=None)
    in_one_call = _attend_in_one_call(batch.layout, *tensors, window, 0.3)
    torch.testing.assert_close(in_one_call, per_segment)
    upstream = torch.randn_like(per_segment)
    found = torch.autograd.grad(in_one_call, tensors, upstream)
    torch.testing.assert_close(found, torch.autograd.grad(per_segment, tensors, upstream))


@flat_row()
def test_a_sliding_window_is_distinguished_from_other_masks() -> None:
    assert make_mask_rule(mask_function=causal_mask_function) is None
    for size in (1, 2, 7):
        sliding = make_mask_rule(mask_function=sliding_window_causal_mask_function(size), local_size=size)
        assert sliding is not None and sliding.window == size
        chunks = chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.long))
        chunked = make_mask_rule(mask_function=chunks, local_size=size)
        assert (chunked is not None and chunked.window is None) or size == 1  # chunks of one are windows of one
    on_device = sliding_window_causal_mask_function(7)
    assert make_mask_rule(mask_function=on_device, local_size=7, device="meta").window == 7, "nothing is read from it"
    other = make_mask_rule(mask_function=and_masks(causal_mask_function, lambda b, h, q, k: (q - k) % 2 == 0))
    assert other is not None and other.window is None


@flat_row()
def test_a_mask_that_does_not_depend_on_positions_alone_is_refused() -> None:
    with pytest.raises(NotShareableError, match="not a function of positions"):
        make_mask_rule(mask_function=causal_mask_function, use_vmap=True)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "qwen3", "gpt_oss"])
def test_a_model_that_shares_prompts_generates_as_any_other(family: str) -> None:
    """Without a layout it reads ordinary rows, padded on the left and with cached keys.

    The windows of mistral, gemma2 and gpt_oss are shorter than the rows; gemma2 caps scores, gpt_oss has sinks.
    """
    model = build(family, SHARED[family])
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(ids, **options)
    enable_prefix_sharing(model)
    found = model.generate(ids, **options)
    assert torch.equal(found.sequences, expected.sequences) and found.sequences.shape[1] > 16
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)


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
