"""May this model attend over flat rows? Tried, not believed.

Takes a model, leaves it sharing prompts between answers where that is exact, and says why where it is not. Recurrent
layers, attention outside the interface of `transformers`, biases by row index: whatever the cause, a model whose hidden
states differ from those of each sequence alone keeps to separate sequences.
"""

import random

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo.attention import NotShareable, plain, share
from dpo.batch import Batch, Example, collate
from dpo.logps import hidden_states

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
