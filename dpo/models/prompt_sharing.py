"""May this model attend over flat rows? Tried, not believed.

Takes a model, leaves it sharing prompts between answers where that is exact, and says why where it is not. Recurrent
layers, attention outside the interface of `transformers`, biases by row index: whatever the cause, a model whose hidden
states differ from those of each sequence alone keeps to separate sequences.
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
from dpo.models.scoring import TokenScores, hidden_states, score

SHARING_TOLERANCE = 1e-4  # of the largest hidden state: rounding gives 1e-6 in float32, a token seen wrongly 1e-2
CHECKED_TOKENS = 64  # tokens
ATTENTION_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


def vocabulary_size(model: PreTrainedModel) -> int:
    """How many token ids the model knows."""
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, Tensor)
    return len(embeddings)


def _probe(vocabulary: int) -> Batch:
    """Two prompts with two answers of random tokens each."""
    draw = random.Random(0)
    return collate(
        [
            Example(f"probe:{i}", [draw.randrange(vocabulary) for _ in range(12 + 7 * i)], answers)
            for i in range(2)
            for answers in [tuple([draw.randrange(vocabulary) for _ in range(n + i)] for n in (9, 5))]
        ]
    )


def enable_prefix_sharing(model: PreTrainedModel) -> None:
    """Make the model attend over flat rows from now on: every forward needs ``layout=``.

    It stays so (and is not switched per call) because recomputation in the backward pass must find it as it was.

    Raises:
        NotShareable: The model does not go through the attention interface of `transformers`, or its rotary
            frequencies depend on the longest position of the whole row.
    """
    if not model._can_set_attn_implementation():
        raise NotShareableError(f"{type(model).__name__} does not use the attention interface of transformers")
    config = model.config.get_text_config().to_dict()
    if config.get("attn_temperature_tuning"):  # Llama 4
        raise NotShareableError("its attention is scaled by the place in the row, not by the position in the sequence")
    scaling = str(config.get("rope_parameters"))
    if "'dynamic'" in scaling or "'longrope'" in scaling:
        raise NotShareableError("its rotary frequencies change with the length of the longest sequence in a row")
    model.set_attn_implementation(PREFIX_SHARED_NAME)


def _ordinary(model: PreTrainedModel) -> str:
    return "sdpa" if model._supports_sdpa else "eager"


def disable_prefix_sharing(model: PreTrainedModel) -> None:
    """Make the model attend to ordinary rows again."""
    model.set_attn_implementation(_ordinary(model))


@contextmanager
def standard_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within: the model attends to ordinary rows, as for generation. Not for passes that keep a graph."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    flat = [config for config in configs.values() if config._attn_implementation == PREFIX_SHARED_NAME]
    for config in flat:
        config._attn_implementation_internal = _ordinary(model)
    try:
        yield
    finally:
        for config in flat:
            config._attn_implementation_internal = PREFIX_SHARED_NAME


def weight_sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Another object around the very same weights, for another thread.

    Its configuration and buffers are its own: some models overwrite rotary frequencies by the length of what they read.
    """
    return deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


@torch.no_grad()
def sharing_error(model: PreTrainedModel, batch: Batch) -> float:
    """Largest difference of hidden states, shared against separate, in parts of the largest hidden state."""
    _, together = hidden_states(model, batch)
    with standard_attention(model):
        _, alone = hidden_states(model, batch)
    return ((together - alone).abs().max() / alone.abs().max()).item()


def score_or_raise(model: PreTrainedModel, batch: Batch) -> TokenScores:
    """Score a batch with a model that perhaps cannot be scored.

    Raises:
        ValueError: It cannot.
    """
    try:
        return score(model, batch)
    except Exception as error:  # whatever a foreign model raises
        raise ValueError(f"{type(model).__name__} cannot be scored: {type(error).__name__}: {error}") from error


@torch.no_grad()
def scoring_error(model: PreTrainedModel, row: Int[Tensor, " tokens"]) -> float:
    """Largest difference of the scorer's log-probabilities to those of the model's own forward pass, nats.

    Args:
        model: With or without sharing.
        row: Two tokens or more, of which the first few are looked at: all their logits are held.
    """
    inputs, targets = row[:CHECKED_TOKENS][:-1], row[1:CHECKED_TOKENS]
    found = score_or_raise(model, collate([Example("row", [int(row[0])], (targets.tolist(),))]).to(row.device)).logps
    with standard_attention(model):
        logits: Tensor = model(input_ids=inputs[None], use_cache=False).logits[0].float()
    return (found - logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]).abs().max().item()


def share_if_exact(model: PreTrainedModel) -> str:
    """Let the model share prompts if that changes nothing; empty, or the reason why it does not.

    Whatever a foreign model raises on a flat row is a reason too.
    """
    layers = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - ATTENTION_LAYER_TYPES
    if layers:
        return f"it has layers that carry state along the row ({', '.join(sorted(layers))})"
    before = model.config._attn_implementation
    try:
        enable_prefix_sharing(model)
        found = sharing_error(model, _probe(vocabulary_size(model)).to(model.device))
        reason = "" if found <= SHARING_TOLERANCE else f"its hidden states differ by {found:.1e} on a flat row"
    except NotShareableError as error:
        reason = str(error)
    except Exception as error:
        reason = f"it fails on a flat row ({type(error).__name__}: {error})"
    if reason:
        model.set_attn_implementation(before)
    return reason
