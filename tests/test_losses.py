"""Preference losses: numbers of the papers, closed-form gradients, and what must hold for any log-probabilities."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dpo.losses import DPO, PairLogps

# Three pairs whose log-ratios differ by h = 0, 10, 20 nats.
POLICY = [[-0.5, -0.1], [-10.0, -30.0], [-1.0, -21.0]]
REFERENCE = [[-0.5, -0.1], [-10.1, -20.1], [-0.1, -0.1]]
BETA = 0.1

nats = st.floats(-1e4, 0, width=32)
pairs = st.lists(st.tuples(nats, nats, nats, nats), min_size=1, max_size=6)
betas = st.sampled_from([0.01, 0.1, 0.5, 2.0])
shares = st.sampled_from([0.0, 0.1, 0.3, 0.5])


def logps(policy: object, reference: object, dtype: torch.dtype = torch.float32) -> PairLogps:
    """Log-probabilities of pairs whose answers have one token each."""
    sums = [torch.as_tensor(values, dtype=dtype).reshape(-1, 2) for values in (policy, reference)]
    return PairLogps(*sums, torch.ones_like(sums[0]))


def of_rows(rows: list[tuple[float, float, float, float]], dtype: torch.dtype = torch.float32) -> PairLogps:
    return logps([row[:2] for row in rows], [row[2:] for row in rows], dtype)


def close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=1e-5, atol=1e-6)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_golden_numbers() -> None:
    # -log sigmoid(beta h) with beta h = 0, 1, 2
    expected = [-math.log(sigmoid(x)) for x in (0, 1, 2)]
    assert expected == pytest.approx([0.693147, 0.313262, 0.126928], abs=1e-6)
    close(DPO(BETA)(logps(POLICY, REFERENCE)), expected)


def test_golden_numbers_with_label_smoothing() -> None:
    # -(1-e) log sigmoid(x) - e log sigmoid(-x) = -log sigmoid(x) + e x, since log sigmoid(-x) = log sigmoid(x) - x
    expected = [-math.log(sigmoid(x)) + 0.1 * x for x in (0, 1, 2)]
    assert expected == pytest.approx([0.693147, 0.413262, 0.326928], abs=1e-6)
    close(DPO(BETA, label_smoothing=0.1)(logps(POLICY, REFERENCE)), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_at_start_every_pair_costs_log_2_and_earns_nothing(smoothing: float) -> None:
    loss, same = DPO(BETA, smoothing), logps(POLICY, POLICY)
    assert loss.at_start == math.log(2)
    close(loss(same), [0.693147181] * 3)
    assert torch.equal(loss.rewards(same), torch.zeros(3, 2))


def test_rewards_are_beta_times_the_log_ratio() -> None:
    close(DPO(BETA).rewards(logps([[-1.0, -2.0]], [[-4.0, -1.0]])).flatten(), [BETA * 3, BETA * -1])


def gradient(loss: DPO, given: PairLogps) -> Tensor:
    policy = given.policy.clone().requires_grad_()
    loss(PairLogps(policy, given.reference, given.lengths)).sum().backward()
    assert policy.grad is not None
    return policy.grad


def test_gradient_is_the_closed_form() -> None:
    # d/d lp(y_w) = -beta sigmoid(-beta h), and the opposite for y_l
    expected = [-BETA * sigmoid(-x) for x in (0, 1, 2)]
    assert expected == pytest.approx([-0.05, -0.0268941, -0.0119203], abs=1e-6)
    found = gradient(DPO(BETA), logps(POLICY, REFERENCE))
    close(found[:, 0], expected)
    close(found[:, 1], [-x for x in expected])


@given(pairs, betas, shares)
def test_gradient_is_the_closed_form_everywhere(rows, beta: float, smoothing: float) -> None:
    given_logps = of_rows(rows, torch.float64)
    margin = beta * (given_logps.logratios[:, 0] - given_logps.logratios[:, 1])
    # of -(1-e) log sigmoid(x) - e log sigmoid(-x): -(1-e) sigmoid(-x) + e sigmoid(x)
    expected = beta * (smoothing * margin.sigmoid() - (1 - smoothing) * (-margin).sigmoid())
    found = gradient(DPO(beta, smoothing), given_logps)
    torch.testing.assert_close(found, torch.stack([expected, -expected], 1))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradcheck(smoothing: float) -> None:
    given_logps = logps(POLICY, REFERENCE, torch.float64)
    policy = given_logps.policy.clone().requires_grad_()
    loss = DPO(BETA, smoothing)
    assert torch.autograd.gradcheck(
        lambda policy: loss(PairLogps(policy, given_logps.reference, given_logps.lengths)), policy
    )


@given(pairs, betas, shares)
def test_loss_and_gradient_are_finite(rows, beta: float, smoothing: float) -> None:
    loss, given_logps = DPO(beta, smoothing), of_rows(rows)
    assert loss(given_logps).isfinite().all()
    assert gradient(loss, given_logps).isfinite().all()


@given(pairs, betas, shares, st.integers(-500, 500))
def test_only_the_difference_of_log_ratios_counts(rows, beta: float, smoothing: float, shift: int) -> None:
    loss, before = DPO(beta, smoothing), of_rows(rows, torch.float64)
    after = PairLogps(before.policy + shift, before.reference, before.lengths)
    torch.testing.assert_close(loss(after), loss(before), rtol=1e-9, atol=1e-7)


@given(pairs, betas)
def test_half_of_the_labels_flipped_is_symmetric(rows, beta: float) -> None:
    loss, pair = DPO(beta, label_smoothing=0.5), of_rows(rows)
    swapped = PairLogps(pair.policy.flip(1), pair.reference.flip(1), pair.lengths.flip(1))
    torch.testing.assert_close(loss(pair), loss(swapped))


@given(pairs, betas, shares)
def test_a_pair_costs_the_same_whatever_stands_beside_it(rows, beta: float, smoothing: float) -> None:
    loss = DPO(beta, smoothing)
    together, alone = loss(of_rows(rows)), torch.cat([loss(of_rows([row])) for row in rows])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta: expected a number above 0, got 0.0"),
        ({"beta": -1.0}, "beta: expected a number above 0, got -1.0"),
        ({"beta": math.nan}, "beta: expected a number above 0, got nan"),
        ({"label_smoothing": 0.9}, r"label_smoothing: expected a share of flipped labels in \[0, 0.5\], got 0.9"),
        ({"label_smoothing": -0.1}, r"label_smoothing: .* got -0.1"),
        ({"label_smoothing": math.nan}, r"label_smoothing: .* got nan"),
    ],
)
def test_wrong_parameters_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPO(**settings)
