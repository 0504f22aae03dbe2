"""What must hold before the first step, checked on real rows of the run.

Takes the module, its optimizer and some training pairs; passes in silence or says what is wrong, expected, got and
what to do. Most broken set-ups train without complaint; none of them passes here.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from dpo.data.datamodule import PairData
from dpo.losses import UnknownInitialLoss
from dpo.models.attention import PREFIX_SHARED_NAME
from dpo.models.batch import Batch, Example, collate
from dpo.models.prompt_sharing import (
    disable_prefix_sharing,
    score_or_raise,
    scoring_error,
    sharing_error,
    standard_attention,
    vocabulary_size,
)
from dpo.models.reference import compute_dtype, logp_tolerance
from dpo.models.scoring import outermost_backbone
from dpo.training.base import Stage
from dpo.training.dpo import DPO, WHOLE_BATCH_HINT

CHECKED_PAIRS, CHECKED_STEPS = 4, 100  # that are looked at
# What rounding does to hidden states, in parts of the largest.
HIDDEN_STATE_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


class PreflightError(RuntimeError):
    """Something that must hold before training does not."""


class Preflight(L.Callback):
    """Checks a run before its first step, unless --model.preflight is false."""

    def __init__(self, data: PairData) -> None:
        """Check on pairs of this data."""
        self.data = data

    @torch.no_grad()
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Run every check.

        Raises:
            PreflightError: The first that failed.
        """
        assert isinstance(pl_module, Stage)
        if not pl_module.preflight:
            return
        pairs = self.data.require_pairs("train")
        examples = [pairs[row] for row in range(min(CHECKED_PAIRS, len(pairs)))]
        batch = collate(examples).to(pl_module.device)
        passed = [*_answers(examples, self.data.encoder.end_ids), *_context(pl_module, self.data.max_length)]
        passed += [*_vocabulary(pl_module, self.data), *_finite(pl_module), *_frozen(pl_module, trainer.optimizers[0])]
        with trainer.precision_plugin.forward_context():
            passed += [*_repeatable(pl_module, batch), *_scored(pl_module, batch), *_causal(pl_module, batch)]
            passed += _shared(pl_module, self._largest_row().to(pl_module.device))
            if isinstance(pl_module, DPO):
                passed += _preferences(pl_module, batch, trainer, self.data.max_tokens)
        rank_zero_info("Preflight: " + "; ".join(passed) + ".")

    def _largest_row(self) -> Batch:
        """The micro-batch of most tokens in the first steps: some errors begin far along a row."""
        loader, pairs = self.data.train_dataloader(), self.data.pairs_by_split["train"]
        rows = chain.from_iterable(micro_batches for micro_batches, _ in islice(loader.sampler, CHECKED_STEPS))
        return collate([pairs[row] for row in max(rows, key=lambda rows: sum(pairs.token_counts[row] for row in rows))])


def _require(holds: bool, *, what: str, expected: object, got: object, do: str) -> None:
    if not holds:
        raise PreflightError(
            f"preflight: {what}: expected {expected}, got {got}. {do} (--model.preflight false skips all checks.)"
        )


def _answers(examples: list[Example], ends: tuple[int, ...]) -> Iterator[str]:
    for example in examples:
        what = f"the answers of {example.id}"
        early = [token for answer in example.answers for token in answer[:-1] if token in ends]
        _require(
            not early, what=what, expected="no end of sequence before the last token", got=early, do="Look at this row."
        )
        distinct = len({tuple(answer) for answer in example.answers}) == len(example.answers)
        _require(distinct, what=what, expected="different token ids", got="the same", do="Raise --data.max_length.")
    yield "every answer ends once"


def _context(module: Stage, max_length: int) -> Iterator[str]:
    text = module.policy.config.get_text_config()  # GPT-2 and others have it under a name of their own
    longest = getattr(text, "max_position_embeddings", None) or max_length
    _require(
        max_length <= longest,
        what="--data.max_length",
        expected=f"at most the {longest} positions that the policy was made for",
        got=max_length,
        do="Lower it.",
    )
    yield f"{max_length} tokens fit the policy"


def _vocabulary(module: Stage, data: PairData) -> Iterator[str]:
    rows, tokens = vocabulary_size(module.policy), len(data.tokenizer)
    # Read all pairs only where they may not fit: some tokenizers have tokens that no text becomes.
    largest = max(pairs.max_token_id for pairs in data.pairs_by_split.values()) if tokens > rows else 0
    _require(
        largest < rows,
        what="the vocabulary",
        expected=f"token ids below the {rows:,} rows of the policy's embedding",
        got=f"{largest:,} out of a tokenizer of {tokens:,} tokens",
        do="Give the policy the tokenizer that it was made with, or a row for every token.",
    )
    yield f"a row of {rows:,} for every token"


def _finite(module: Stage) -> Iterator[str]:
    models = module.models_by_role().items()
    broken = [f"{role} {name}" for role, m in models for name, p in m.named_parameters() if not p.isfinite().all()]
    _require(
        not broken,
        what="the weights",
        expected="finite numbers",
        got=f"nan or inf in {broken[:3]}",
        do="Take another checkpoint.",
    )
    yield "all weights are finite"


def _frozen(module: Stage, optimizer: torch.optim.Optimizer) -> Iterator[str]:
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    others = [model for role, model in module.models_by_role().items() if role != "policy"]
    inside = [name for model in others for name, p in model.named_parameters() if p.requires_grad or id(p) in trained]
    _require(
        not inside,
        what="the reference",
        expected="frozen and not in the optimizer",
        got=inside[:3],
        do="Copy it instead of passing the policy itself.",
    )
    moving = [p for p in module.policy.parameters() if p.requires_grad and id(p) in trained]
    _require(
        bool(moving), what="the policy", expected="parameters that the optimizer trains", got="none", do="Unfreeze it."
    )
    rate = optimizer.param_groups[0]["lr"]
    yield f"{sum(p.numel() for p in moving):,} parameters train at learning rate {rate:g}, all others are frozen"


def _repeatable(module: Stage, batch: Batch) -> Iterator[str]:
    first, second = (score_or_raise(module.policy, batch).logps for _ in range(2))
    same = torch.equal(first, second)
    _require(
        same,
        what="two passes over one batch",
        expected="equal bits",
        got=_largest(first, second),
        do="Some dropout or noise is on: turn it off in the model.",
    )
    yield "two passes agree to the bit"


def _scored(module: Stage, batch: Batch) -> Iterator[str]:
    found, limit = scoring_error(module.policy, batch.answer_sequences()[0]), logp_tolerance(module.policy)
    _require(
        found <= limit,
        what="log-probabilities by the scorer and by the model's own forward pass",
        expected=f"a difference of at most {limit:g} nats a token",
        got=found,
        do="Its way from hidden states to logits is one that is not known here: take another model.",
    )
    yield f"the scorer gives the model's own log-probabilities (to {found:.0e})"


def _causal(module: Stage, batch: Batch) -> Iterator[str]:
    row, limit = batch.answer_sequences()[0][None], HIDDEN_STATE_TOLERANCES[compute_dtype(module.policy)]
    with standard_attention(module.policy):
        states, before = (
            outermost_backbone(module.policy)(input_ids=tokens, use_cache=False).last_hidden_state
            for tokens in (row, row[:, :-1])
        )
    found = _largest(states[:, :-1], before) / states.abs().max().item()
    _require(
        found <= limit,
        what="hidden states with the next token and without it",
        expected=f"the same, to {limit:g}",
        got=f"{found:.1e}",
        do="The model sees what it is to predict: it is no causal language model.",
    )
    yield "no token sees the next"


def _shared(module: Stage, batch: Batch) -> Iterator[str]:
    if module.policy.config._attn_implementation != PREFIX_SHARED_NAME:
        return
    found = sharing_error(module.policy, batch)
    if found <= HIDDEN_STATE_TOLERANCES[compute_dtype(module.policy)]:
        yield f"shared prompts equal separate sequences (to {found:.0e})"
        return
    for model in module.models_by_role().values():
        disable_prefix_sharing(model)
    yield f"prompts are NOT shared, as hidden states would differ by {found:.1e}: every answer is a sequence of its own"


def _preferences(module: DPO, batch: Batch, trainer: L.Trainer, max_tokens: int | None) -> Iterator[str]:
    if module.loss.needs_whole_batch:
        parts = trainer.world_size * trainer.accumulate_grad_batches
        _require(
            max_tokens is None and parts == 1,
            what=f"{module.loss}, which sorts all pairs of an optimizer step together",
            expected="every step in one piece",
            got=f"--data.max_tokens {max_tokens}, {parts} devices times accumulated batches",
            do=WHOLE_BATCH_HINT,
        )
        yield "every step is one piece"
    if not trainer.ckpt_path:
        yield from _start(module, batch)


def _start(module: DPO, batch: Batch) -> Iterator[str]:
    _, logps = module.score_pairs(batch)
    expected = module.loss.initial_loss
    if module.loss.uses_reference:
        apart, limit = (
            _largest(logps.policy_token_logps, logps.reference_token_logps),
            module.reference.initial_distance,
        )
        _require(
            apart <= limit * logp_tolerance(module.policy),
            what="log-probabilities under the policy and under the reference that it equals",
            expected=f"a difference of at most {limit * logp_tolerance(module.policy):g} nats a token",
            got=apart,
            do="The reference is not the policy.",
        )
        yield f"policy and reference are {apart:.1g} nats a token apart"
        logps = replace(logps, reference_token_logps=logps.policy_token_logps)
    if isinstance(expected, UnknownInitialLoss):
        yield f"the loss at step 0 is not checked ({expected.reason})"
        return
    losses = module.loss(logps)
    wrong = (losses - expected).abs().max().item()
    _require(
        wrong <= 1e-6 * max(1, expected),
        what="the loss at step 0",
        expected=f"{expected:.6f}",
        got=losses.tolist(),
        do="The loss is not what it says.",
    )
    yield f"the loss is {expected:.6f}" + (" where they are equal" if module.loss.uses_reference else "")


def _largest(first: Tensor, second: Tensor) -> float:
    return (first - second).abs().max().item()
