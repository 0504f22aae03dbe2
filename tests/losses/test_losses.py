"""Preference losses: values from the papers, closed-form gradients, and what must hold for any log-probabilities."""

import math
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dpo.losses
from dpo.__main__ import main
from dpo.losses import (
    AOT,
    BCO,
    CPO,
    DPO,
    EXO,
    IPO,
    LD,
    NCA,
    NLL,
    ODPO,
    ORPO,
    SPPO,
    WPO,
    Alpha,
    AOTUnpaired,
    APODown,
    APOZero,
    DiscoPOP,
    Divergence,
    ForwardKL,
    Hinge,
    JensenShannon,
    LengthNormalizedDPO,
    PairLogps,
    PreferenceLoss,
    ReverseKL,
    RobustDPO,
    SimPO,
    Sum,
    UnknownInitialLoss,
)
from dpo.losses.table import EXAMPLE_DIVERGENCES, EXAMPLE_LOSSES, docstring_paragraphs

ROOT = Path(__file__).resolve().parents[2]
# Three pairs whose log-ratios differ by h = 0, 10, 20 nats.
POLICY = [[-0.5, -0.1], [-10.0, -30.0], [-1.0, -21.0]]
REFERENCE = [[-0.5, -0.1], [-10.1, -20.1], [-0.1, -0.1]]
CHOSEN, REJECTED = (0.0, 0.1, -0.9), (0.0, -9.9, -20.9)  # their log-ratios
BETA, E = 0.1, 0.1
LOG2 = math.log(2)

of_difference = [loss for loss in EXAMPLE_LOSSES if "divergence" in {each.name for each in fields(loss)}]
EVERY = (
    *EXAMPLE_LOSSES,
    *(replace(loss, divergence=score) for loss in of_difference for score in EXAMPLE_DIVERGENCES[1:]),
    *(LD(loss, 0.3) for loss in EXAMPLE_LOSSES),
    *(WPO(loss) for loss in EXAMPLE_LOSSES if not loss.needs_whole_batch),
    *(CPO(label_smoothing=0.2), AOT(label_smoothing=0.2), IPO(divergence=Alpha(3.0))),
)


def loss_id(value: object) -> str | None:
    """Return a test id that is the same in every process, which the repr of a function is not."""
    return repr(value) if isinstance(value, PreferenceLoss | Divergence) else None


every_loss = pytest.mark.parametrize("loss", EVERY, ids=repr)

nats = st.floats(-1e4, 0, width=32)
rows_of_nats = st.lists(st.tuples(nats, nats, nats, nats), min_size=1, max_size=6)
betas = st.sampled_from([0.01, 0.1, 0.5, 2.0])
shares = st.sampled_from([0.0, 0.1, 0.3, 0.5])


def logps(policy: object, reference: object, dtype: torch.dtype = torch.float32) -> PairLogps:
    """Return log-probabilities of pairs of one-token answers that are as likely as what the policy samples."""
    policy, reference = (torch.as_tensor(values, dtype=dtype).flatten() for values in (policy, reference))
    return PairLogps(policy, reference, torch.zeros_like(policy), (1,) * len(policy))


def of_rows(rows: list[tuple[float, float, float, float]], dtype: torch.dtype = torch.float32) -> PairLogps:
    return logps([row[:2] for row in rows], [row[2:] for row in rows], dtype)


def random_pairs(counts: tuple[int, ...], seed: int = 0) -> PairLogps:
    """Return answers with these numbers of tokens and random log-probabilities, in float64."""
    generator = torch.Generator().manual_seed(seed)
    policy, reference, on_policy = torch.randn(3, sum(counts), generator=generator, dtype=torch.float64)
    return PairLogps(-policy.abs() - 0.1, -reference.abs() - 0.1, on_policy, counts)


THREE = logps(POLICY, REFERENCE)


def assert_close(actual: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=1e-5, atol=1e-6)


def S(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def lS(x: float) -> float:
    return math.log(S(x))


def of_h(function: Callable[[float], float]) -> list[float]:
    """Evaluate a function of x = beta h at h = 0, 10, 20."""
    return [function(x) for x in (0.0, 1.0, 2.0)]


def of_ratios(function: Callable[[float, float], float]) -> list[float]:
    """Evaluate a function of the two log-ratios of each pair."""
    return [function(w, r) for w, r in zip(CHOSEN, REJECTED, strict=True)]


def cdpo(x: float) -> float:
    return -(1 - E) * lS(x) - E * lS(-x)


def exo(x: float) -> float:
    q, e = S(x), 1e-3
    return q * (math.log(q) - math.log(1 - e)) + (1 - q) * (math.log(1 - q) - math.log(e))


def discopop(x: float) -> float:
    m = S(x / 0.05)
    return (1 - m) * -lS(x) + m * math.exp(-x)


def js(d: float) -> float:
    return LOG2 + lS(d)


GOLDEN = [  # loss, its formula written out, and the same as numbers
    (DPO(), of_h(lambda x: -lS(x)), [0.693147, 0.313262, 0.126928]),
    (DPO(label_smoothing=E), of_h(cdpo), [0.693147, 0.413262, 0.326928]),
    (ODPO(), of_h(lambda x: -lS(x)), [0.693147, 0.313262, 0.126928]),  # without margins
    (
        RobustDPO(label_smoothing=E),
        of_h(lambda x: (-0.9 * lS(x) + 0.1 * lS(-x)) / 0.8),
        [0.693147, 0.188262, -0.123072],
    ),
    (IPO(), of_h(lambda x: (x / BETA - 1 / (2 * BETA)) ** 2), [25.0, 25.0, 225.0]),
    (Hinge(), of_h(lambda x: max(0, 1 - x)), [1.0, 0.0, 0.0]),
    (EXO(), of_h(exo), [2.761231, 1.27631, 0.458972]),
    (DiscoPOP(), of_h(discopop), [0.846574, 0.367879, 0.135335]),
    (LengthNormalizedDPO(BETA), of_h(lambda x: -lS(x)), [0.693147, 0.313262, 0.126928]),
    (
        NCA(),
        of_ratios(lambda w, r: -lS(BETA * w) - lS(-BETA * w) / 2 - lS(-BETA * r) / 2),
        [1.386294, 1.19522, 1.122047],
    ),
    (BCO(), of_ratios(lambda w, r: -lS(BETA * w) - lS(-BETA * r)), [1.386294, 1.004121, 0.855775]),
    (SPPO(), of_ratios(lambda w, r: (w - 5) ** 2 + (r + 5) ** 2), [50.0, 48.02, 287.62]),
    (APOZero(), of_ratios(lambda w, r: 1 - S(BETA * w) + S(BETA * r)), [1.0, 0.768412, 0.632557]),
    (APODown(), of_ratios(lambda w, r: S(BETA * w) + 1 - S(BETA * (w - r))), [1.0, 0.771441, 0.596718]),
    # lp_w - lp_l of the policy is -0.4, 20, 20, of the reference -0.4, 10, 0: sorted they differ by 0, 20, 10
    (AOT(), [-lS(0), -lS(2), -lS(1)], [0.693147, 0.126928, 0.313262]),
    # sorted: D_w -0.9, 0, 0.1, D_l -20.9, -9.9, 0
    (AOTUnpaired(), [-lS(2), -lS(0.99), -lS(0.01)], [0.126928, 0.315961, 0.68816]),
    (
        DPO(divergence=JensenShannon()),
        of_ratios(lambda w, r: -lS(BETA * (js(w) - js(r)))),
        [0.693147, 0.333831, 0.131056],
    ),
    (
        DPO(divergence=ForwardKL()),
        of_ratios(lambda w, r: math.log1p(math.exp(-BETA * (math.exp(-r) - math.exp(-w))))),
        [0.693147, 0.0, 0.0],
    ),
    # without a reference: lp_w - lp_l is -0.4, 20, 20
    (SimPO(0.5, 0.3), [-lS(0.5 * d - 0.3) for d in (-0.4, 20, 20)], [0.974077, 0.000061, 0.000061]),
    (CPO(), [-lS(BETA * d) + n for d, n in ((-0.4, 0.5), (20, 10), (20, 1))], [1.213347, 10.126928, 1.126928]),
    (NLL(), [0.5, 10.0, 1.0], [0.5, 10.0, 1.0]),
    (
        ORPO(),
        [
            n + BETA * -lS(math.log(math.expm1(r) / math.expm1(n)))  # odds of exp(-n): 1 / (exp(n) - 1)
            for n, r in ((0.5, 0.1), (10.0, 30.0), (1.0, 21.0))
        ],
        [0.696966, 10.0, 1.0],
    ),
    (Sum((DPO(), NLL()), (0.5, 2.0)), [0.5 * -lS(x) + 2 * n for x, n in ((0, 0.5), (1, 10), (2, 1))], None),
    (LD(DPO(), 0.5), of_h(lambda x: -lS(x)), None),  # both answers are equally long
    (WPO(DPO()), of_h(lambda x: -lS(x)), None),  # both answers are as likely as a draw
]


@pytest.mark.parametrize(("loss", "formula", "numbers"), GOLDEN, ids=lambda value: repr(value)[:40])
def test_golden_numbers(loss: PreferenceLoss, formula: list[float], numbers: list[float] | None) -> None:
    assert_close(loss(THREE), formula)
    assert numbers is None or formula == pytest.approx(numbers, abs=2e-6)


def test_every_loss_has_golden_numbers() -> None:
    assert {type(loss) for loss, *_ in GOLDEN} == {type(loss) for loss in EXAMPLE_LOSSES}


def test_a_margin_moves_the_logit() -> None:
    margins = [1.0, 2.0, -0.5]
    expected = [-lS(x - m) for x, m in zip((0.0, 1.0, 2.0), margins, strict=True)]
    assert expected == pytest.approx([1.313262, 1.313262, 0.078889], abs=2e-6)
    given = replace(THREE, margins=torch.tensor(margins))
    assert_close(ODPO()(given), expected)
    assert_close(
        Sum((ODPO(), NLL()), (1.0, 2.0))(given), [x + 2 * n for x, n in zip(expected, (0.5, 10.0, 1.0), strict=True)]
    )
    users = {loss for loss in EVERY if loss.uses_margins}
    assert {type(loss.loss) if isinstance(loss, LD | WPO) else type(loss) for loss in users} == {ODPO}
    for loss in EVERY:
        assert torch.equal(loss(given), loss(THREE)) != loss.uses_margins


INITIAL_LOSSES = [
    (LOG2, [DPO(), DPO(label_smoothing=0.3), RobustDPO(), LengthNormalizedDPO(), AOT(), AOTUnpaired()]),
    (LOG2, [DPO(divergence=score) for score in EXAMPLE_DIVERGENCES] + [LD(DPO(), alpha) for alpha in (0.0, 0.4)]),
    (25, [IPO()]),  # 1/(4 b^2)
    (50, [SPPO()]),  # 1/(2 b^2)
    (1, [Hinge(), APOZero(), APODown()]),
    (2 * LOG2, [NCA(), BCO()]),
    (2.761230709, [EXO(label_smoothing=1e-3)]),  # -log 2 - log(e (1-e)) / 2
    ((LOG2 + 1) / 2, [DiscoPOP()]),
    (0.3 * LOG2 + 2 * 25, [Sum((DPO(), IPO()), (0.3, 2.0))]),
]


@pytest.mark.parametrize(
    ("expected", "loss"), [(value, loss) for value, losses in INITIAL_LOSSES for loss in losses], ids=repr
)
def test_initial_loss(expected: float, loss: PreferenceLoss) -> None:
    assert loss.initial_loss == pytest.approx(expected, rel=1e-9)


@every_loss
def test_at_start_a_loss_is_its_constant_and_rewards_are_0(loss: PreferenceLoss) -> None:
    pairs = random_pairs((3, 5, 2, 2, 4, 1))
    same = replace(pairs, reference_token_logps=pairs.policy_token_logps)
    if loss.uses_reference:
        assert torch.equal(loss.rewards(same), torch.zeros(3, 2))
    if isinstance(loss.initial_loss, UnknownInitialLoss):
        assert loss.initial_loss.reason
    else:
        torch.testing.assert_close(loss(same), torch.full((3,), loss.initial_loss, dtype=torch.float64))


@every_loss
def test_only_losses_with_a_reference_look_at_it(loss: PreferenceLoss) -> None:
    pairs = random_pairs((3, 5, 2, 2, 4, 1))
    without = replace(pairs, reference_token_logps=torch.full_like(pairs.reference_token_logps, math.nan))
    assert bool(loss(without).isfinite().all()) == (not loss.uses_reference)
    assert bool(loss.rewards(without).isfinite().all()) == (not loss.uses_reference)


REWARDS = [  # of an answer of two tokens with lp -3 and reference -1
    (DPO(0.5), 0.5 * (-3 + 1)),
    (IPO(0.5), 0.5 * (-3 + 1)),
    (NCA(0.5), 0.5 * (-3 + 1)),
    (SimPO(2.0), 2 * -3 / 2),
    (CPO(0.5), 0.5 * -3),
    (ORPO(0.5), 0.5 * -3 / 2),
    (NLL(), -3 / 2),
    (Sum((NLL(), DPO(0.5)), (1.0, 1.0)), 0.5 * (-3 + 1)),  # of the one that uses a reference
    (Sum((NLL(), CPO(0.5)), (1.0, 1.0)), -3 / 2),
    (WPO(DPO(0.5)), 0.5 * (-3 + 1)),
    (LD(DPO(0.5), 0.25), 0.5 * ((-2 + 0.7) + 0.25 * (-1 + 0.3))),  # its second token lies beyond the other answer
]


@pytest.mark.parametrize(("loss", "expected"), REWARDS, ids=repr)
def test_rewards(loss: PreferenceLoss, expected: float) -> None:
    policy = torch.tensor([-2.0, -1.0, -5.0], requires_grad=True)
    reference = torch.tensor([-0.7, -0.3, -4.0])
    rewards = loss.rewards(PairLogps(policy, reference, torch.zeros(3), (2, 1)))
    assert rewards[0, 0].item() == pytest.approx(expected)
    assert not rewards.requires_grad


def gradient(loss: PreferenceLoss, given: PairLogps) -> Tensor:
    """Return the gradient with respect to the log-probability of every token."""
    policy = given.policy_token_logps.clone().requires_grad_()
    loss(replace(given, policy_token_logps=policy)).sum().backward()
    assert policy.grad is not None
    return policy.grad


def test_gradient_is_the_closed_form() -> None:
    # d/d lp(y_w) = -beta sigmoid(-beta h), and the opposite for y_l
    expected = [-BETA * S(-x) for x in (0, 1, 2)]
    assert expected == pytest.approx([-0.05, -0.0268941, -0.0119203], abs=1e-6)
    actual = gradient(DPO(BETA), THREE).view(-1, 2)
    assert_close(actual[:, 0], expected)
    assert_close(actual[:, 1], [-x for x in expected])


x_of = {  # derivative by x = beta h, as a function of x
    DPO(): lambda x: -S(-x),
    RobustDPO(): lambda x: (-(1 - E) * S(-x) - E * S(x)) / (1 - 2 * E),
    Hinge(): lambda x: -1.0 if x < 1 else 0.0,
    IPO(): lambda x: 2 * (x / BETA - 1 / (2 * BETA)) / BETA,
    LengthNormalizedDPO(BETA): lambda x: -S(-x),
    EXO(): lambda x: S(x) * S(-x) * (lS(x) - lS(-x) - math.log(1 - 1e-3) + math.log(1e-3)),
    DPO(divergence=Alpha(0.999999)): lambda x: -S(-x),  # reverse KL in the limit
}


@pytest.mark.parametrize(("loss", "slope"), x_of.items(), ids=loss_id)
def test_gradient_of_losses_of_the_difference(loss: PreferenceLoss, slope: Callable[[float], float]) -> None:
    h = torch.tensor([-12.0, -1.0, 0.0, 3.0, 25.0], dtype=torch.float64)
    given = logps(torch.stack([h - 7, torch.full_like(h, -7)], 1), torch.full((5, 2), -7.0), torch.float64)
    expected = torch.tensor([BETA * slope(BETA * value) for value in h.tolist()], dtype=torch.float64)
    torch.testing.assert_close(
        gradient(loss, given).view(-1, 2), torch.stack([expected, -expected], 1), rtol=1e-4, atol=1e-9
    )


slopes_of_answers = {  # derivatives by D_w and by D_l
    NCA(): lambda w, r: (BETA * (-S(-BETA * w) + S(BETA * w) / 2), BETA * S(BETA * r) / 2),
    BCO(): lambda w, r: (-BETA * S(-BETA * w), BETA * S(BETA * r)),
    SPPO(): lambda w, r: (2 * (w - 5), 2 * (r + 5)),
    APOZero(): lambda w, r: (-BETA * S(BETA * w) * S(-BETA * w), BETA * S(BETA * r) * S(-BETA * r)),
}


@pytest.mark.parametrize(("loss", "slopes"), slopes_of_answers.items(), ids=loss_id)
def test_gradient_of_losses_of_answers(loss: PreferenceLoss, slopes: Callable) -> None:
    expected = [slope for w, r in zip(CHOSEN, REJECTED, strict=True) for slope in slopes(w, r)]
    assert_close(gradient(loss, THREE), expected)


@given(rows_of_nats, betas, shares)
def test_gradient_of_dpo_is_the_closed_form_everywhere(rows, beta: float, smoothing: float) -> None:
    given_logps = of_rows(rows, torch.float64)
    margin = beta * (given_logps.logratios[:, 0] - given_logps.logratios[:, 1])
    # of -(1-e) log sigmoid(x) - e log sigmoid(-x): -(1-e) sigmoid(-x) + e sigmoid(x)
    expected = beta * (smoothing * margin.sigmoid() - (1 - smoothing) * (-margin).sigmoid())
    actual = gradient(DPO(beta, smoothing), given_logps).view(-1, 2)
    torch.testing.assert_close(actual, torch.stack([expected, -expected], 1))


@every_loss
def test_gradcheck(loss: PreferenceLoss) -> None:
    pairs = random_pairs((3, 1, 2, 4), seed=1)
    policy = pairs.policy_token_logps.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda policy: loss(replace(pairs, policy_token_logps=policy)), policy)


EXTREME = [0.0, -1.0, -80.0, -100.0, -1000.0, -1e4]


@every_loss
def test_loss_and_gradient_are_finite(loss: PreferenceLoss) -> None:
    rows = [(a, b, c, d) for a in EXTREME for b in EXTREME for c in EXTREME for d in EXTREME]
    everything = of_rows(rows)
    assert loss(everything).isfinite().all()
    assert gradient(loss, everything).isfinite().all()
    if hasattr(loss, "beta"):
        large = replace(loss, beta=2.0)
        assert large(everything).isfinite().all() and gradient(large, everything).isfinite().all()


@given(
    rows_of_nats, betas, st.integers(-500, 500), st.sampled_from([x for x in of_difference if not hasattr(x, "tau")])
)
def test_only_the_difference_of_log_ratios_counts(rows, beta: float, shift: int, loss: PreferenceLoss) -> None:
    loss, before = replace(loss, beta=beta), of_rows(rows, torch.float64)
    after = replace(before, policy_token_logps=before.policy_token_logps + shift)
    torch.testing.assert_close(loss(after), loss(before), rtol=1e-7, atol=1e-7)


@given(rows_of_nats, betas)
def test_half_of_the_labels_flipped_is_symmetric(rows, beta: float) -> None:
    pair = of_rows(rows)
    swapped = replace(
        pair,
        policy_token_logps=pair.policy.flip(1).flatten(),
        reference_token_logps=pair.reference.flip(1).flatten(),
    )
    for loss in (DPO(beta, 0.5), EXO(beta, 0.5), CPO(beta, 0.0, 0.5)):
        torch.testing.assert_close(loss(pair), loss(swapped))


@pytest.mark.parametrize("loss", [loss for loss in EVERY if not loss.needs_whole_batch], ids=repr)
def test_the_loss_of_a_pair_does_not_depend_on_other_pairs(loss: PreferenceLoss) -> None:
    counts = ((3, 5), (2, 2), (4, 1), (6, 7))
    pairs = random_pairs(tuple(n for pair in counts for n in pair))
    sizes = [sum(pair) for pair in counts]
    columns = (
        x.split(sizes) for x in (pairs.policy_token_logps, pairs.reference_token_logps, pairs.on_policy_log_weights)
    )
    alone = [loss(PairLogps(*tokens, pair)) for *tokens, pair in zip(*columns, counts, strict=True)]
    assert torch.equal(loss(pairs), torch.cat(alone))


def test_sorted_losses_are_of_the_whole_batch() -> None:
    assert {type(loss) for loss in EXAMPLE_LOSSES if loss.needs_whole_batch} == {AOT, AOTUnpaired}
    assert Sum((DPO(), AOT()), (1.0, 1.0)).needs_whole_batch and LD(AOT()).needs_whole_batch
    rows = random_pairs((1,) * 8)
    policy, reference = rows.policy, rows.reference
    for loss in (AOT(), AOTUnpaired()):
        whole, order = loss(rows), [2, 0, 3, 1]
        torch.testing.assert_close(loss(logps(policy[order], reference[order], torch.float64)), whole)
        halves = [loss(logps(policy[part], reference[part], torch.float64)) for part in (slice(0, 2), slice(2, 4))]
        assert not torch.isclose(torch.cat(halves).sum(), whole.sum())


@pytest.mark.parametrize("loss", [IPO(), LengthNormalizedDPO(), SimPO(), ORPO(), NLL()], ids=repr)
def test_losses_per_token_do_not_see_length(loss: PreferenceLoss) -> None:
    once = random_pairs((1, 1, 1, 1))
    twice = PairLogps(
        *(
            x.repeat_interleave(2)
            for x in (once.policy_token_logps, once.reference_token_logps, once.on_policy_log_weights)
        ),
        (2, 2, 2, 2),
    )
    torch.testing.assert_close(loss(twice), loss(once))


# Divergences


@pytest.mark.parametrize(
    ("score", "slope"),  # f''(t) t at t = exp(d)
    [
        (ReverseKL(), lambda d: 1.0),
        (ForwardKL(), lambda d: math.exp(-d)),
        (JensenShannon(), lambda d: S(-d)),
        (Alpha(0.5), lambda d: math.exp(-0.5 * d)),
        (Alpha(2.0), lambda d: math.exp(d)),
    ],
    ids=loss_id,
)
def test_scores_are_0_at_0_and_rise(score: Divergence, slope: Callable[[float], float]) -> None:
    d = torch.tensor([[-20.0, -1.0], [0.0, 0.0], [1.0, 10.0]], dtype=torch.float64, requires_grad=True)
    values = score(d)
    assert values[1].tolist() == [0, 0]
    (slopes,) = torch.autograd.grad(values.sum(), d)
    assert slopes.flatten().tolist() == pytest.approx([slope(x) for x in d.flatten().tolist()])


@pytest.mark.parametrize("score", [*EXAMPLE_DIVERGENCES, Alpha(0.0), Alpha(3.0)], ids=repr)
def test_scores_keep_the_order_of_log_ratios_that_overflow(score: Divergence) -> None:
    values = score(torch.tensor([[-1e4, -1000.0], [-100.0, -50.0], [-10.0, 0.0], [2.0, 1e4]])).flatten()
    assert values.isfinite().all()
    strict = (values.diff() > 0).tolist()
    assert all(strict[:6]) or (isinstance(score, Alpha) and score.alpha > 1)  # there the low end is flat
    assert (values.diff() >= 0).all()


def test_alpha_0_is_forward_kl() -> None:
    d = torch.linspace(-90, 90, 20).view(-1, 2)
    torch.testing.assert_close(Alpha(0.0)(d), ForwardKL()(d))


# Modifiers


def test_ld_weighs_tokens_beyond_the_shorter_answer_under_both_models() -> None:
    policy, reference = torch.tensor([[-1.0, -2.0, -3.0, -4.0, -5.0], [-0.1, -0.2, -0.3, -0.4, -0.5]])
    actual = LD(DPO(), 0.25)(PairLogps(policy, reference, torch.zeros(5), (1, 4)))
    chosen, rejected = -1 + 0.1, (-2 + 0.2) + 0.25 * (-12 + 1.2)
    assert_close(actual, [-lS(BETA * (chosen - rejected))])


@every_loss
def test_ld_with_weight_1_changes_nothing(loss: PreferenceLoss) -> None:
    pairs = random_pairs((3, 5, 2, 2, 4, 1))
    torch.testing.assert_close(LD(loss, 1.0)(pairs), loss(pairs))


def test_wpo_weighs_by_the_mean_over_tokens_of_both_answers() -> None:
    on_policy = torch.tensor([-0.5, -1.5, -0.3])
    pair = PairLogps(torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-1.0, -1.0, -1.0]), on_policy, (2, 1))
    # w_w = exp((-0.5 - 1.5) / 2), w_l = exp(-0.3); h = 0 - (-2)
    assert_close(WPO(DPO())(pair), [-lS(BETA * 2) * math.exp(-1) * math.exp(-0.3)])


def test_wpo_and_ld_can_be_nested_in_any_order() -> None:
    pairs = random_pairs((3, 5, 2, 2, 4, 1))
    torch.testing.assert_close(WPO(LD(IPO(), 0.2))(pairs), LD(WPO(IPO()), 0.2)(pairs))


def test_wpo_refuses_losses_without_values_of_pairs() -> None:
    for loss in (AOT(), Sum((DPO(), AOTUnpaired()), (1.0, 1.0)), LD(AOT())):
        with pytest.raises(ValueError, match=r"WPO weighs single pairs.* any loss but AOT and AOTUnpaired"):
            WPO(loss)


@pytest.mark.parametrize(
    ("losses", "weights"),
    [((), ()), ((DPO(),), ()), ((DPO(),), (1.0, 2.0)), ((DPO(),), (0.0,)), ((DPO(),), (math.nan,))],
)
def test_a_sum_needs_one_weight_for_each_loss(losses: tuple, weights: tuple) -> None:
    with pytest.raises(ValueError, match="Sum: expected at least one loss and one weight above 0 for each, got"):
        Sum(losses, weights)


# Parameters and the table


@pytest.mark.parametrize(
    ("loss", "settings", "message"),
    [
        (DPO, {"beta": 0.0}, r"beta: expected a number in \(0, inf\), got 0.0"),
        (IPO, {"beta": -1.0}, r"beta: .* got -1.0"),
        (ORPO, {"beta": math.nan}, r"beta: .* got nan"),
        (SimPO, {"beta": math.inf}, r"beta: .* got inf"),
        (SimPO, {"gamma": -0.1}, r"gamma: expected a number in \[0, inf\), got -0.1"),
        (DPO, {"label_smoothing": 0.9}, r"label_smoothing: expected a number in \[0, 0.5\], got 0.9"),
        (AOT, {"label_smoothing": -0.1}, r"label_smoothing: .* got -0.1"),
        (CPO, {"label_smoothing": math.nan}, r"label_smoothing: .* got nan"),
        (RobustDPO, {"label_smoothing": 0.5}, r"label_smoothing: expected a number in \[0, 0.5\), got 0.5"),
        (EXO, {"label_smoothing": 0.0}, r"label_smoothing: expected a number in \(0, 0.5\], got 0.0"),
        (DiscoPOP, {"tau": 1.5}, r"tau: expected a number in \(0, 1\], got 1.5"),
        (Alpha, {"alpha": -0.5}, r"alpha: expected a number in \[0, inf\), got -0.5"),
        (Alpha, {"alpha": 1.0}, "alpha: expected a number other than 1, got 1: that divergence is ReverseKL"),
        (LD, {"loss": DPO(), "alpha": 2.0}, r"alpha: expected a number in \[0, 1\], got 2.0"),
    ],
)
def test_wrong_parameters_are_refused(loss: type, settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(**settings)


def test_the_table_has_every_loss() -> None:
    classes = {dpo.losses.__dict__[name] for name in dpo.losses.__all__} - {PreferenceLoss, Divergence}
    assert {type(loss) for loss in EXAMPLE_LOSSES} == {cls for cls in classes if issubclass(cls, PreferenceLoss)}
    assert {type(score) for score in EXAMPLE_DIVERGENCES} == {cls for cls in classes if issubclass(cls, Divergence)}


@pytest.mark.parametrize("loss", dict.fromkeys(map(type, EXAMPLE_LOSSES)), ids=lambda loss: loss.__name__)
def test_every_docstring_has_description_formula_and_source(loss: type) -> None:
    description, formula, source = docstring_paragraphs(loss)
    assert description.endswith(".") and formula and "arXiv" in source


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["losses"]) == 0
    text = capsys.readouterr().out
    for part in (*(type(loss).__name__ for loss in EXAMPLE_LOSSES), "2.761231", "[log p - log sum_v p_v^2]"):
        assert part in text


TESTED = ("losses/test_losses", "models/test_scoring", "models/test_reference")
EQUATIONS = [
    [cell.strip(" `") for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "equations.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| 2") or "`dpo/" in line
]


@pytest.mark.parametrize(("equation", "symbol", "file", "test"), EQUATIONS, ids=lambda cell: cell)
def test_the_document_of_equations_matches_code_and_tests(equation: str, symbol: str, file: str, test: str) -> None:
    code = (ROOT / file).read_text(encoding="utf-8")
    assert f"class {symbol}(" in code or f"def {symbol}(" in code
    tests = "".join((ROOT / "tests" / f"{name}.py").read_text(encoding="utf-8") for name in TESTED)
    assert f"def {test}(" in tests
    number = re.match(r"(\d{4}\.\d{5}|ericmitchell\S+)", equation)
    assert not number or number[1] in code


def test_every_loss_is_in_the_document_of_equations() -> None:
    assert {type(loss).__name__ for loss in EXAMPLE_LOSSES} <= {symbol for _, symbol, *_ in EQUATIONS}
