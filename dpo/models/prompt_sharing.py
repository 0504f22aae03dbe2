"""Switch models to flat rows with shared prompts, but only models for which that is exact.

Whether it is exact is measured: a model whose hidden states on a flat row differ from those of separate sequences keeps
to separate sequences, whatever the cause (recurrent layers, attention outside the interface of `transformers`, biases
by index in the row).
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from dpo.models.attention import PREFIX_SHARED_NAME, NotShareableError
from dpo.models.batch import Batch, Example, collate
from dpo.models.loading import caps_scores
from dpo.models.scoring import TokenScores, hidden_states, run_as_forward, score

# Largest difference of hidden states on a flat row, relative to the largest of them, by the type computed in.
SHARING_TOLERANCES = {
    torch.float32: 1e-4,  # rounding is 1e-6, a wrongly seen token 1e-2
    torch.float16: 5e-3,  # rounding is 5e-4 a product
    torch.bfloat16: 2e-2,  # rounding is 4e-3 a product: 6e-3 was met in 4-bit models
}
CHECKED_TOKENS = 64
ATTENTION_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the number of token ids that a model has embeddings for."""
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, Tensor)
    return len(embeddings)


def _probe(vocabulary: int) -> Batch:
    """Return two prompts with two answers each, of random tokens."""
    draw = random.Random(0)

    def tokens(length: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(length)]

    return collate([Example(f"probe:{i}", tokens(12 + 7 * i), (tokens(9 + i), tokens(5 + i))) for i in range(2)])


def enable_prefix_sharing(model: PreTrainedModel) -> None:
    """Let the model read flat rows, by ``layout=`` within `flat_row`; without a layout it reads ordinary rows.

    The setting is not switched back after a pass, as recomputation in the backward pass must find it unchanged.

    Raises:
        NotShareableError: The model does not use the attention interface of `transformers`, or what it computes
            for a token depends on the whole row (rotary frequencies by its length, scores by the place in it).
    """
    if not model._can_set_attn_implementation():
        raise NotShareableError(f"{type(model).__name__} does not use the attention interface of transformers")
    config = model.config.get_text_config().to_dict()
    if config.get("attn_temperature_tuning"):  # Llama 4
        raise NotShareableError("its attention is scaled by the index in the row, not by the position in the sequence")
    scaling = str(config.get("rope_parameters"))
    if "'dynamic'" in scaling or "'longrope'" in scaling:
        raise NotShareableError("its rotary frequencies change with the length of the longest sequence in a row")
    model.set_attn_implementation(PREFIX_SHARED_NAME)


def _standard_implementation(model: PreTrainedModel) -> str:
    return "sdpa" if model._supports_sdpa and not caps_scores(model) else "eager"


def disable_prefix_sharing(model: PreTrainedModel) -> None:
    """Make the model use the attention of `transformers` again."""
    model.set_attn_implementation(_standard_implementation(model))


@contextmanager
def standard_attention(model: PreTrainedModel) -> Iterator[None]:
    """Make the model use the attention of `transformers` within the block; not for passes that keep a graph."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    shared = [config for config in configs.values() if config._attn_implementation == PREFIX_SHARED_NAME]
    for config in shared:
        config._attn_implementation_internal = _standard_implementation(model)
    try:
        yield
    finally:
        for config in shared:
            config._attn_implementation_internal = PREFIX_SHARED_NAME


def weight_sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return another model object with the very same weights, for use in another thread.

    It has its own configuration and buffers, as some models overwrite rotary frequencies by the length of their input.
    """
    return deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


@torch.no_grad()
def sharing_error(model: PreTrainedModel, batch: Batch) -> float:
    """Return the largest difference between hidden states on a flat row and on separate sequences.

    Returns:
        The difference relative to the largest hidden state.
    """
    _, on_flat_row = run_as_forward(model, lambda: hidden_states(model, batch))
    with standard_attention(model):
        _, separate = run_as_forward(model, lambda: hidden_states(model, batch))
    return ((on_flat_row - separate).abs().max() / separate.abs().max()).item()


def score_or_raise(model: PreTrainedModel, batch: Batch) -> TokenScores:
    """Score a batch, and name the model if that fails.

    Raises:
        ValueError: The model cannot be scored.
    """
    try:
        return score(model, batch)
    except Exception as error:  # a foreign model may raise anything
        raise ValueError(f"{type(model).__name__} cannot be scored: {type(error).__name__}: {error}") from error


@torch.no_grad()
def scoring_error(model: PreTrainedModel, row: Int[Tensor, " tokens"]) -> float:
    """Return the largest difference between log-probabilities of the scorer and of the model's own forward pass.

    Args:
        model: A model with or without shared prompts.
        row: Token ids of one sequence, at least two. Only the first few are used, as all their logits are in memory.

    Returns:
        The difference in nats.
    """
    inputs = row[:CHECKED_TOKENS][:-1]
    targets = row[1:CHECKED_TOKENS]
    batch = collate([Example("row", [int(row[0])], (targets.tolist(),))]).to(row.device)
    logps = score_or_raise(model, batch).logps
    with standard_attention(model):
        logits: Tensor = model(input_ids=inputs[None], use_cache=False).logits[0].float()
    return (logps - logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]).abs().max().item()


def product_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the type that matrix products are computed in: of 4-bit weights, that which they are expanded to."""
    expanded = (getattr(part, "compute_dtype", None) for part in model.modules())
    return next(filter(None, expanded), model.dtype)


def share_if_exact(model: PreTrainedModel) -> str:
    """Let the model share prompts if its hidden states stay the same; otherwise leave it as it was.

    Returns:
        Why the model does not share prompts; empty if it does. Any error on a flat row is a reason too.
    """
    layers = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - ATTENTION_LAYER_TYPES
    if layers:
        return f"it has layers that carry state along the row ({', '.join(sorted(layers))})"
    before = model.config._attn_implementation
    try:
        enable_prefix_sharing(model)
        difference = sharing_error(model, _probe(vocabulary_size(model)).to(model.device))
        exact = difference <= SHARING_TOLERANCES[product_dtype(model)]
        reason = "" if exact else f"its hidden states differ by {difference:.1e} on a flat row"
    except NotShareableError as error:
        reason = str(error)
    except Exception as error:
        reason = f"it fails on a flat row ({type(error).__name__}: {error})"
    if reason:
        model.set_attn_implementation(before)
    return reason
