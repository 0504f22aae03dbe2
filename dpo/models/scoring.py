"""The scorer: log-probabilities of all answer tokens of a batch under a model.

Policy and reference, training, evaluation and serving all use `score`. Only hidden states that predict an answer token
reach the output head, a chunk at a time and recomputed in the backward pass, so that no (tokens, vocabulary) tensor
exists. Log-softmax and sums are always float32.
"""

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from dpo.models.attention import PREFIX_SHARED_NAME, flat_row
from dpo.models.batch import Batch

_T = TypeVar("_T")
# Logits in memory at a time (128 MiB and 1 GiB in float32); larger batches are scored in recomputed chunks.
CHUNK_LOGITS = 2**25
CUDA_CHUNK_LOGITS = 2**28  # few chunks: each is a pass over the head's weights, and adds to their gradient by itself
CPU_CACHE_LOGITS = 2**18  # processed at a time on a CPU: 1 MiB stays in its cache


@dataclass(frozen=True)
class TokenScores:
    """One value per scored token, in the order of `Batch.targets`.

    Attributes:
        logps: log p(token | all tokens before it), in nats; the only value with a gradient.
        entropy: Entropy of the predicted distribution, in nats.
        mean_logits: Mean of the logits over the vocabulary.
        top1_hits: 1 if the token was the most probable one, otherwise 0.
        collision_entropy: Collision entropy of the predicted distribution, -log sum_v p_v^2, in nats.
    """

    logps: Float[Tensor, " scored"]
    entropy: Float[Tensor, " scored"]
    mean_logits: Float[Tensor, " scored"]
    top1_hits: Float[Tensor, " scored"]
    collision_entropy: Float[Tensor, " scored"]


def nested_backbones(model: PreTrainedModel) -> list[PreTrainedModel]:
    """Return the models inside a model that compute hidden states, the outermost first: decoder and wrappers."""
    inside = [part for part in model.modules() if isinstance(part, PreTrainedModel) and part is not model]
    decoder = model.get_decoder()
    return [part for part in inside if decoder in part.modules()] or inside[:1]


def outermost_backbone(model: PreTrainedModel) -> PreTrainedModel:
    """Return the inner model that the model itself calls for hidden states."""
    return nested_backbones(model)[0]


def hidden_states(model: PreTrainedModel, batch: Batch) -> tuple[ModelOutput, Float[Tensor, "scored width"]]:
    """Run the backbone: over the flat row if the model shares prompts, otherwise over one answer at a time.

    Returns:
        The backbone's (last) output, and the hidden states that predict the scored tokens.
    """
    backbone = outermost_backbone(model)
    if model.config._attn_implementation == PREFIX_SHARED_NAME:
        row = {"input_ids": batch.tokens[None], "position_ids": batch.layout.position_ids[None]}
        ones = torch.ones_like(batch.tokens)[None]
        with flat_row():
            output = backbone(**row, attention_mask=ones, layout=batch.layout, use_cache=False)
        return output, output.last_hidden_state[0, batch.predictor_indices]
    parts = []
    sequences = batch.answer_sequences()
    for tokens, scored in zip(sequences, [*batch.lengths, *[0] * (len(sequences) - len(batch.lengths))], strict=True):
        _reset_rotary_lengths(backbone)
        output = backbone(input_ids=tokens[None], use_cache=False)
        parts.append(output.last_hidden_state[0, len(tokens) - scored :])
    return output, torch.cat(parts)


def _reset_rotary_lengths(backbone: PreTrainedModel) -> None:
    """Make dynamic rotary frequencies depend on the next sequence only, not on the longest one so far."""
    for part in backbone.modules():
        for name in [name for name in vars(part) if name.endswith("max_seq_len_cached")]:
            setattr(part, name, 0)


def run_as_forward(model: PreTrainedModel, compute: Callable[[], _T]) -> _T:
    """Return `compute()`, run as the forward pass of a model, so that the hooks of that pass surround it.

    Such hooks gather the weights of a sharded model. Parts of the model are called inside, where the hooks of the whole
    model would otherwise not run.
    """
    instance = vars(model)
    own = {name: instance.pop(name) for name in ("forward",) if name in instance}

    def forward() -> _T:
        del instance["forward"]
        instance.update(own)
        return compute()

    instance["forward"] = forward
    try:
        result: _T = model()
    finally:
        instance.pop("forward", None)
        instance.update(own)
    return result


def make_logits_function(model: PreTrainedModel, output: ModelOutput) -> Callable[[Tensor], Tensor]:
    """Return the function by which the model turns hidden states into logits (scaling, soft-capping, adapters).

    It calls the model's own `forward`, in which the backbones return the given hidden states instead of running.

    Args:
        model: The model.
        output: An output of its backbone, which the given hidden states are put into.
    """
    # a `forward` among the attributes of an instance takes precedence over the method of its class
    attributes = [part.__dict__ for part in nested_backbones(model)]

    def logits(hidden: Float[Tensor, "chunk width"]) -> Float[Tensor, "chunk vocab"]:
        fake_output = copy(output)
        fake_output["last_hidden_state"] = hidden[None]
        forwards = [instance.get("forward") for instance in attributes]
        for instance in attributes:
            instance["forward"] = lambda *args, **kwargs: fake_output
        try:
            ids = torch.zeros_like(hidden[None, :, 0], dtype=torch.long)  # some models use their shape
            return model.forward(input_ids=ids, use_cache=False, return_dict=True).logits[0]  # type: ignore[no-any-return]
        finally:
            for instance, forward in zip(attributes, forwards, strict=True):
                del instance["forward"]
                if forward is not None:
                    instance["forward"] = forward

    return logits


class _TokenLogps(torch.autograd.Function):
    """The values of `TokenScores` from logits; only log p(target) has a gradient, for which probabilities are kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        probabilities = torch.empty_like(logits, dtype=torch.float32)
        parts = (_score_rows(*rows) for rows in _row_chunks(logits, targets[:, None], probabilities))
        logps, *others = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(probabilities, targets)
        ctx.mark_non_differentiable(*others)
        ctx.dtype = logits.dtype
        return logps, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        """Return the gradient with respect to the logits: 1 at the target minus the probabilities, times `gradient`."""
        probabilities, targets = ctx.saved_tensors
        logits_gradient = torch.empty_like(probabilities, dtype=ctx.dtype)
        for p, target, up, out in _row_chunks(probabilities, targets[:, None], gradient[:, None], logits_gradient):
            out.copy_((p * -up).scatter_add_(-1, target, up))
        return logits_gradient, None


def _row_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors into chunks of rows, on a CPU small enough that what is read again is still in the cache."""
    rows = max(1, len(tensors[0]) if tensors[0].is_cuda else CPU_CACHE_LOGITS // tensors[0].shape[-1])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _score_rows(logits: Tensor, targets: Tensor, probabilities: Tensor) -> tuple[Tensor, ...]:
    """Return the values of `TokenScores` for some rows and write their probabilities to the given tensor."""
    logits = logits.float()
    peak, best = logits.max(-1, keepdim=True)
    torch.softmax(logits, -1, out=probabilities)
    log_normaliser = peak - probabilities.gather(-1, best).log()
    logps = logits.gather(-1, targets) - log_normaliser
    entropy = log_normaliser - (probabilities * logits).sum(-1, keepdim=True)
    collision = -probabilities.square().sum(-1, keepdim=True).log()
    scores = logps, entropy, logits.mean(-1, keepdim=True), (best == targets).float(), collision
    return tuple(score.squeeze(-1) for score in scores)


def _rows_per_chunk(model: PreTrainedModel) -> int:
    head: Tensor = model.get_output_embeddings().weight
    limit = getattr(model, "chunk_logits", None) or (CUDA_CHUNK_LOGITS if head.is_cuda else CHUNK_LOGITS)
    return int(max(1, limit // head.shape[0]))


def score(model: PreTrainedModel, batch: Batch) -> TokenScores:
    """Return log-probability, entropy and other values of every answer token of a batch."""
    return TokenScores(*run_as_forward(model, lambda: _score_tokens(model, batch)))


def _score_tokens(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, ...]:
    """Return the values of `TokenScores` in a tuple, in which hooks find the tensors."""
    output, hidden = hidden_states(model, batch)
    to_logits = make_logits_function(model, output)

    def chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        scores: tuple[Tensor, ...] = _TokenLogps.apply(to_logits(hidden), targets)  # type: ignore[no-untyped-call]
        return scores

    rows = _rows_per_chunk(model)
    chunks = list(zip(hidden.split(rows), batch.targets.split(rows), strict=True))
    if len(chunks) == 1:
        return chunk(*chunks[0])
    parts = [checkpoint(chunk, *inputs, use_reentrant=False, preserve_rng_state=False) for inputs in chunks]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


@torch.no_grad()
def score_alternatives(
    model: PreTrainedModel, batch: Batch, count: int
) -> tuple[Float[Tensor, "scored candidates"], Int[Tensor, "scored candidates"]]:
    """Return the log-probability of every answer token, and of the most probable tokens in its place.

    Args:
        model: The model.
        batch: The answers.
        count: Number of most probable tokens.

    Returns:
        Log-probabilities in nats and token ids, ``(scored, 1 + count)``. The first column is that of the answer; it is
        equal to the bit to the column of the same token among the most probable ones, which come in descending order.
    """
    output, hidden = hidden_states(model, batch)
    to_logits = make_logits_function(model, output)
    rows = _rows_per_chunk(model)
    parts = []
    for some_hidden, targets in zip(hidden.split(rows), batch.targets.split(rows), strict=True):
        logits = to_logits(some_hidden).float()
        tokens = torch.cat([targets[:, None], logits.topk(count).indices], -1)
        logps = _score_rows(logits, tokens, torch.empty_like(logits))[0]
        parts.append((logps.view(tokens.shape), tokens))
    logps, tokens = (torch.cat(column) for column in zip(*parts, strict=True))
    return logps, tokens
