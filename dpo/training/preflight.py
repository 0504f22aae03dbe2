"""Checks of models, optimizer and data before the first training step, on pairs of the run itself.

Most broken setups train without an error. Each of them fails a check here, with what was expected, what was found and
what to do.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel

from dpo.data.datamodule import PairData
from dpo.losses import UnknownInitialLoss
from dpo.models.attention import PREFIX_SHARED_NAME
from dpo.models.batch import Batch, Example, collate
from dpo.models.loading import context_length
from dpo.models.prompt_sharing import (
    disable_prefix_sharing,
    score_or_raise,
    scoring_error,
    sharing_error,
    standard_attention,
    vocabulary_size,
)
from dpo.models.reference import compute_dtype, logp_tolerance
from dpo.models.scoring import outermost_backbone, run_as_forward
from dpo.models.sharding import whole_tensor
from dpo.training.base import Stage
from dpo.training.dpo import DPO, WHOLE_BATCH_HINT
from dpo.training.metrics import MetricMeans

CHECKED_PAIRS = 4  # pairs that are scored
CHECKED_STEPS = 100  # optimizer steps among which the largest micro-batch is looked for
# Largest effect of rounding on hidden states, relative to the largest of them.
HIDDEN_STATE_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


class PreflightError(RuntimeError):
    """A condition for training does not hold."""


@torch.no_grad()
def run_preflight(module: Stage) -> None:
    """Run every check that the module's trainer and data allow, and log what holds.

    Raises:
        PreflightError: A check failed; the message is that of the first.
    """
    trainer = module.trainer
    data = getattr(trainer, "datamodule", None)
    passed = [*_check_weights(module), *_check_frozen(module, trainer.optimizers[0])]
    if isinstance(data, PairData):
        pairs = data.require_pairs("train")
        examples = [pairs[row] for row in range(min(CHECKED_PAIRS, len(pairs)))]
        batch = collate(examples).to(module.device)
        largest = _largest_batch(data, None if module.device.type == "cuda" else CHECKED_STEPS).to(module.device)
        passed += [*_check_answers(examples, data.encoder.end_ids), *_check_context(module, data.max_length)]
        passed += _check_vocabulary(module, data)
    else:
        step = module.on_before_batch_transfer(next(iter(trainer.fit_loop._data_source.dataloader())), 0)
        batch = largest = step.micro_batches[0].to(module.device)
    with trainer.precision_plugin.forward_context():
        passed += [*_check_repeatable(module, batch), *_check_scorer(module, batch), *_check_causal(module, batch)]
        passed += _check_sharing(module, largest)
        if largest.tokens.is_cuda:  # on a CPU it would take as long as training on it, and memory is not so scarce
            passed += _check_memory(module, largest)
        if isinstance(module, DPO):
            passed += _check_whole_steps(module, trainer, getattr(data, "max_tokens", None))
            if not (trainer.ckpt_path or module.has_trained):  # the policy no longer equals its reference
                passed += _check_start(module, batch)
    rank_zero_info("Preflight: " + "; ".join(passed) + ".")


def _largest_batch(data: PairData, steps: int | None) -> Batch:
    """Return the micro-batch with the most tokens of so many steps of all devices, or of the epoch."""
    loader = data.train_dataloader()
    pairs = data.pairs_by_split["train"]
    shares_by_step = islice(loader.sampler.shares_of_all_devices(), steps)
    micro_batches = chain.from_iterable(share for shares, _ in shares_by_step for share in shares)
    largest = max(micro_batches, key=lambda rows: sum(pairs.token_counts[row] for row in rows))
    return collate([pairs[row] for row in largest])


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise PreflightError(f"preflight: {otherwise} (--model.preflight false skips all checks.)")


def _check_answers(examples: list[Example], end_ids: tuple[int, ...]) -> Iterator[str]:
    for example in examples:
        early_ends = [token for answer in example.answers for token in answer[:-1] if token in end_ids]
        _require(
            not early_ends,
            f"the answers of {example.id}: expected no end-of-sequence token before the last token, got {early_ends}. "
            "Check this row of the data.",
        )
        _require(
            len({tuple(answer) for answer in example.answers}) == len(example.answers),
            f"the answers of {example.id}: expected different token ids, got the same ids. Raise --data.max_length: "
            "answers that are cut off may become equal.",
        )
    yield "every answer ends once"


def _check_context(module: Stage, max_length: int) -> Iterator[str]:
    limit = context_length(module.policy) or max_length
    _require(
        max_length <= limit,
        f"--data.max_length: expected at most the {limit} positions that the policy supports, got {max_length}. "
        "Lower it.",
    )
    yield f"{max_length} tokens fit the policy"


def _check_vocabulary(module: Stage, data: PairData) -> Iterator[str]:
    rows = vocabulary_size(module.policy)
    tokens = len(data.tokenizer)
    # Read all pairs only if some id may have no row: some tokenizers have tokens that no text is encoded to.
    largest = max(pairs.max_token_id for pairs in data.pairs_by_split.values()) if tokens > rows else 0
    _require(
        largest < rows,
        f"the vocabulary: expected token ids below the {rows:,} rows of the policy's embedding, got {largest:,} from a "
        f"tokenizer of {tokens:,} tokens. Use the policy's own tokenizer, or add rows to the embedding.",
    )
    yield f"every token id is below the {rows:,} rows of the embedding"


def _check_weights(module: Stage) -> Iterator[str]:
    models = module.models_by_role().items()
    parts = [(f"{role} {name}", p) for role, model in models for name, p in model.named_parameters()]
    broken = [name for name, p in parts if not whole_tensor(p.isfinite().all())]
    _require(
        not broken,
        f"the weights: expected finite numbers, got nan or inf in {broken[:3]}. Use another checkpoint.",
    )
    yield "all weights are finite"


def _check_frozen(module: Stage, optimizer: torch.optim.Optimizer) -> Iterator[str]:
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    others = [model for role, model in module.models_by_role().items() if role != "policy"]
    moving = [name for model in others for name, p in model.named_parameters() if p.requires_grad or id(p) in optimized]
    _require(
        not moving,
        f"the reference: expected frozen parameters that are not in the optimizer, got {moving[:3]}. "
        "Use a copy of the policy, not the policy itself.",
    )
    trained = [p for p in module.policy.parameters() if p.requires_grad and id(p) in optimized]
    _require(
        bool(trained),
        "the policy: expected parameters that the optimizer trains, got none. Unfreeze the policy.",
    )
    group = optimizer.param_groups[0]
    rate = group.get("initial_lr", group["lr"])  # a schedule may begin below it
    yield f"{sum(p.numel() for p in trained):,} parameters train at learning rate {rate:g}, all others are frozen"


def _check_repeatable(module: Stage, batch: Batch) -> Iterator[str]:
    first, second = (score_or_raise(module.policy, batch).logps for _ in range(2))
    _require(
        torch.equal(first, second),
        "two forward passes over one batch: expected equal log-probabilities, got a difference of "
        f"{_max_difference(first, second):g} nats. Turn off dropout and noise in the model.",
    )
    yield "two forward passes are bitwise identical"


def _check_scorer(module: Stage, batch: Batch) -> Iterator[str]:
    error = scoring_error(module.policy, batch.answer_sequences()[0])
    limit = logp_tolerance(module.policy)
    _require(
        error <= limit,
        "log-probabilities by the scorer and by the model's own forward pass: expected a difference of at most "
        f"{limit:g} nats per token, got {error}. This model computes logits in a way the scorer cannot reproduce: use "
        "another model.",
    )
    yield f"the scorer gives the model's own log-probabilities (to {error:.0e})"


def _check_causal(module: Stage, batch: Batch) -> Iterator[str]:
    row = batch.answer_sequences()[0][None]
    limit = HIDDEN_STATE_TOLERANCES[compute_dtype(module.policy)]
    with standard_attention(module.policy):
        states, states_before = (_hidden_states_of(module.policy, tokens) for tokens in (row, row[:, :-1]))
    error = _max_difference(states[:, :-1], states_before) / states.abs().max().item()
    _require(
        error <= limit,
        f"hidden states with and without the next token: expected a relative difference of at most {limit:g}, got "
        f"{error:.1e}. The model sees the tokens that it predicts, so it is not a causal language model.",
    )
    yield "no token sees the next"


def _hidden_states_of(model: PreTrainedModel, row: Tensor) -> Tensor:
    backbone = outermost_backbone(model)
    states: Tensor = run_as_forward(model, lambda: backbone(input_ids=row, use_cache=False).last_hidden_state)
    return states


def _check_sharing(module: Stage, batch: Batch) -> Iterator[str]:
    """Switch prompt sharing off in all models if it changes hidden states."""
    if module.policy.config._attn_implementation != PREFIX_SHARED_NAME:
        return
    error = sharing_error(module.policy, batch)
    if error <= HIDDEN_STATE_TOLERANCES[compute_dtype(module.policy)]:
        yield f"shared prompts give the hidden states of separate sequences (to {error:.0e})"
        return
    for model in module.models_by_role().values():
        disable_prefix_sharing(model)
    yield f"prompts are NOT shared between answers, as hidden states would differ by {error:.1e}"


def _check_memory(module: Stage, batch: Batch) -> Iterator[str]:
    """Run forward and backward pass of a batch: if memory is too small for the largest one, it ends here."""
    trained = [p for p in module.policy.parameters() if p.requires_grad]
    means = MetricMeans(module.metric_names).to(batch.tokens.device)
    with torch.enable_grad():
        # not backward(): gradients stay as they are, and processes exchange none
        torch.autograd.grad(module.losses(batch, means).sum(), trained, allow_unused=True)
    yield f"memory holds the largest micro-batch of an epoch, {len(batch.tokens):,} tokens"


def _check_whole_steps(module: DPO, trainer: L.Trainer, max_tokens: int | None) -> Iterator[str]:
    if module.loss.needs_whole_batch:
        parts = trainer.world_size * trainer.accumulate_grad_batches
        _require(
            max_tokens is None and parts == 1,
            f"{module.loss} sorts all pairs of an optimizer step together: expected every step in one piece, got "
            f"--data.max_tokens {max_tokens}, and {parts} devices times accumulated batches. {WHOLE_BATCH_HINT}",
        )
        yield "every optimizer step is one piece"


def _check_start(module: DPO, batch: Batch) -> Iterator[str]:
    """Compare policy and reference, and the loss where they are equal with its known initial value."""
    _, logps = module.score_pairs(batch)
    expected = module.loss.initial_loss
    if module.loss.uses_reference:
        distance = _max_difference(logps.policy_token_logps, logps.reference_token_logps)
        limit = module.reference.initial_distance * logp_tolerance(module.policy)
        _require(
            distance <= limit,
            "log-probabilities under the policy and under a reference that should equal it: expected a difference of "
            f"at most {limit:g} nats per token, got {distance}. The reference is not a copy of the policy.",
        )
        yield f"policy and reference are {distance:.1g} nats per token apart"
        logps = replace(logps, reference_token_logps=logps.policy_token_logps)
    if isinstance(expected, UnknownInitialLoss):
        yield f"the loss at step 0 is not checked ({expected.reason})"
        return
    losses = module.loss(logps)
    _require(
        (losses - expected).abs().max().item() <= 1e-6 * max(1, expected),
        f"the loss at step 0: expected {expected:.6f}, got {losses.tolist()}. The loss differs from its own "
        "`initial_loss`: correct one of them.",
    )
    yield f"the loss is {expected:.6f}" + (" where they are equal" if module.loss.uses_reference else "")


def _max_difference(first: Tensor, second: Tensor) -> float:
    return (first - second).abs().max().item()
