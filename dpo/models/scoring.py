"""The one scorer: a model and a batch -> the log-probability of every answer token.

Takes a causal language model and a `Batch`; gives `TokenScores`, one value per scored token. The policy and the
reference, training, evaluation and serving all go through `score`. Only the hidden states that predict an answer token
reach the head, a chunk at a time with recomputation in the backward pass, so no (tokens, vocabulary) tensor exists.
Log-softmax and sums are float32, always. Knows nothing of pairs, losses or references.
"""

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from dpo.models.attention import PREFIX_SHARED_NAME
from dpo.models.batch import Batch

MAX_CHUNK_LOGITS = 2**25  # logits alive at a time: 128 MiB in float32; a batch that needs more is cut and recomputed
CPU_CACHE_LOGITS = 2**18  # of them worked on at a time: 1 MiB stays in a processor's cache


@dataclass(frozen=True)
class TokenScores:
    """One value per scored token, in the order of `Batch.targets`.

    Attributes:
        logps: log p(token | everything before it), nats; the only one with a gradient.
        entropy: Of the predicted distribution, nats.
        logits: Mean raw logit over the vocabulary.
        hits: The token was the most probable one.
        collision: Collision entropy of the predicted distribution, -log sum_v p_v^2, nats.
    """

    logps: Float[Tensor, " scored"]
    entropy: Float[Tensor, " scored"]
    mean_logits: Float[Tensor, " scored"]
    top1_hits: Float[Tensor, " scored"]
    collision_entropy: Float[Tensor, " scored"]


def nested_backbones(model: PreTrainedModel) -> list[PreTrainedModel]:
    """What stands before the head and turns token ids into hidden states: the decoder and what is around it."""
    inside = [part for part in model.modules() if isinstance(part, PreTrainedModel) and part is not model]
    decoder = model.get_decoder()
    return [part for part in inside if decoder in part.modules()] or inside[:1]


def outermost_backbone(model: PreTrainedModel) -> PreTrainedModel:
    """What the model itself asks for hidden states: of several around each other the outermost."""
    return nested_backbones(model)[0]


def hidden_states(model: PreTrainedModel, batch: Batch) -> tuple[ModelOutput, Float[Tensor, "scored width"]]:
    """The backbone's output and, out of it, the hidden states that predict the scored tokens.

    One pass over the flat row where the model attends over branches (`dpo.models.prompt_sharing.share`), otherwise one
    per answer.
    """
    body = outermost_backbone(model)
    if model.config._attn_implementation == PREFIX_SHARED_NAME:
        row = {"input_ids": batch.tokens[None], "position_ids": batch.layout.position_ids[None]}
        output = body(**row, attention_mask=torch.ones_like(batch.tokens)[None], layout=batch.layout, use_cache=False)
        return output, output.last_hidden_state[0, batch.predictor_indices]
    parts = []
    for tokens, scored in zip(batch.answer_sequences(), batch.lengths, strict=True):
        _forget_lengths(body)
        output = body(input_ids=tokens[None], use_cache=False)
        parts.append(output.last_hidden_state[0, -scored:])
    return output, torch.cat(parts)


def _forget_lengths(body: PreTrainedModel) -> None:
    """Let dynamic rotary frequencies be those of the next sequence, not of the longest so far."""
    for part in body.modules():
        for name in [name for name in vars(part) if name.endswith("max_seq_len_cached")]:
            setattr(part, name, 0)


def make_logits_function(model: PreTrainedModel, output: ModelOutput) -> Callable[[Tensor], Tensor]:
    """The model's own way from hidden states to logits: its scaling, soft-capping and adapters included.

    It is the model's `forward` over a backbone that returns the hidden states it is given.
    """
    shadows = [
        part.__dict__ for part in nested_backbones(model)
    ]  # what stands here is found before the method of the class

    def logits(hidden: Float[Tensor, "chunk width"]) -> Float[Tensor, "chunk vocab"]:
        given = copy(output)
        given["last_hidden_state"] = hidden[None]
        before = [shadow.get("forward") for shadow in shadows]
        for shadow in shadows:
            shadow["forward"] = lambda *args, **kwargs: given
        try:
            ids = torch.zeros_like(hidden[None, :, 0], dtype=torch.long)  # some models look at their shape
            return model(input_ids=ids, use_cache=False, return_dict=True).logits[0]  # type: ignore[no-any-return]
        finally:
            for shadow, forward in zip(shadows, before, strict=True):
                del shadow["forward"]
                if forward is not None:
                    shadow["forward"] = forward

    return logits


class _TokenLogps(torch.autograd.Function):
    """Logits -> log p(target) and what else a pass over them gives; only probabilities are kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        probabilities = torch.empty_like(logits, dtype=torch.float32)
        parts = (_scores(*rows) for rows in _some_rows(logits, targets[:, None], probabilities))
        logps, *others = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(probabilities, targets)
        ctx.mark_non_differentiable(*others)
        ctx.dtype = logits.dtype
        return logps, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        """Gradient of log p(target) by the logits: 1 at the target, minus the probabilities."""
        probabilities, targets = ctx.saved_tensors
        logits = torch.empty_like(probabilities, dtype=ctx.dtype)
        for p, target, up, out in _some_rows(probabilities, targets[:, None], gradient[:, None], logits):
            out.copy_((p * -up).scatter_add_(-1, target, up))
        return logits, None


def _some_rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of all at a time: on a CPU few enough that what is read again is still in the cache."""
    rows = max(1, len(tensors[0]) if tensors[0].is_cuda else CPU_CACHE_LOGITS // tensors[0].shape[-1])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _scores(logits: Tensor, targets: Tensor, probabilities: Tensor) -> tuple[Tensor, ...]:
    """What `TokenScores` holds, for some rows; fills in their probabilities."""
    logits = logits.float()
    peak, best = logits.max(-1, keepdim=True)
    torch.softmax(logits, -1, out=probabilities)
    log_normaliser = peak - probabilities.gather(-1, best).log()
    logps = logits.gather(-1, targets) - log_normaliser
    entropy = log_normaliser - (probabilities * logits).sum(-1, keepdim=True)
    collision = -probabilities.square().sum(-1, keepdim=True).log()
    scores = logps, entropy, logits.mean(-1, keepdim=True), (best == targets).float(), collision
    return tuple(score.squeeze(-1) for score in scores)


def score(model: PreTrainedModel, batch: Batch) -> TokenScores:
    """Score every answer token of a batch."""
    output, hidden = hidden_states(model, batch)
    to_logits = make_logits_function(model, output)

    def chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        scores: tuple[Tensor, ...] = _TokenLogps.apply(to_logits(hidden), targets)  # type: ignore[no-untyped-call]
        return scores

    rows = max(1, MAX_CHUNK_LOGITS // model.get_output_embeddings().weight.shape[0])
    chunks = list(zip(hidden.split(rows), batch.targets.split(rows), strict=True))
    if len(chunks) == 1:
        return TokenScores(*chunk(*chunks[0]))
    parts = [checkpoint(chunk, *inputs, use_reentrant=False, preserve_rng_state=False) for inputs in chunks]
    return TokenScores(*(torch.cat(column) for column in zip(*parts, strict=True)))
