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
from torch import Tensor
from transformers import PreTrainedModel

from dpo.attention import NAME
from dpo.batch import Batch, Example, collate
from dpo.logps import hidden_states
from dpo.masks import NotShareable

TOLERANCE = 1e-4  # of the largest hidden state: rounding gives 1e-6 in float32, a token seen wrongly 1e-2
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


def vocabulary(model: PreTrainedModel) -> int:
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


def share(model: PreTrainedModel) -> None:
    """Make the model attend over flat rows from now on: every forward needs ``layout=``.

    It stays so (and is not switched per call) because recomputation in the backward pass must find it as it was.

    Raises:
        NotShareable: The model does not go through the attention interface of `transformers`, or its rotary
            frequencies depend on the longest position of the whole row.
    """
    if not model._can_set_attn_implementation():
        raise NotShareable(f"{type(model).__name__} does not use the attention interface of transformers")
    if model.config.to_dict().get("attn_temperature_tuning"):  # Llama 4
        raise NotShareable("its attention is scaled by the place in the row, not by the position in the sequence")
    scaling = str(model.config.to_dict().get("rope_parameters"))
    if "'dynamic'" in scaling or "'longrope'" in scaling:
        raise NotShareable("its rotary frequencies change with the length of the longest sequence in a row")
    model.set_attn_implementation(NAME)


def _ordinary(model: PreTrainedModel) -> str:
    return "sdpa" if model._supports_sdpa else "eager"


def unshare(model: PreTrainedModel) -> None:
    """Make the model attend to ordinary rows again."""
    model.set_attn_implementation(_ordinary(model))


@contextmanager
def plain(model: PreTrainedModel) -> Iterator[None]:
    """Within: the model attends to ordinary rows, as for generation. Not for passes that keep a graph."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    flat = [config for config in configs.values() if config._attn_implementation == NAME]
    for config in flat:
        config._attn_implementation_internal = _ordinary(model)
    try:
        yield
    finally:
        for config in flat:
            config._attn_implementation_internal = NAME


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Another object with a configuration of its own around the very same tensors, for another thread."""
    return deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


@torch.no_grad()
def difference(model: PreTrainedModel, batch: Batch) -> float:
    """Largest difference of hidden states, shared against separate, in parts of the largest hidden state."""
    _, together = hidden_states(model, batch)
    with plain(model):
        _, alone = hidden_states(model, batch)
    return ((together - alone).abs().max() / alone.abs().max()).item()


def share_if_exact(model: PreTrainedModel) -> str:
    """Let the model share prompts if that changes nothing; empty, or the reason why it does not.

    Whatever a foreign model raises on a flat row is a reason too.
    """
    layers = set(getattr(model.config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if layers:
        return f"it has layers that carry state along the row ({', '.join(sorted(layers))})"
    before = model.config._attn_implementation
    try:
        share(model)
        found = difference(model, _probe(vocabulary(model)).to(model.device))
        reason = "" if found <= TOLERANCE else f"its hidden states differ by {found:.1e} on a flat row"
    except NotShareable as error:
        reason = str(error)
    except Exception as error:
        reason = f"it fails on a flat row ({type(error).__name__}: {error})"
    if reason:
        model.set_attn_implementation(before)
    return reason
