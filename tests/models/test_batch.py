"""The flat row: every prompt once, every answer behind it, every target predicted by the token before it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo.models.batch import Batch, Example, collate

IDS = st.lists(st.integers(0, 99), min_size=1, max_size=12)
EXAMPLES = st.lists(st.tuples(IDS, st.lists(IDS, min_size=1, max_size=3)), min_size=1, max_size=4)


def examples(drawn: list[tuple[list[int], list[list[int]]]]) -> list[Example]:
    return [Example(f"row:{i}", prompt, tuple(answers)) for i, (prompt, answers) in enumerate(drawn)]


def test_a_row_worked_out_by_hand() -> None:
    batch = collate([Example("a", [1, 2], ([3, 4], [5, 6, 7])), Example("b", [8], ([9], [10]))])
    assert batch.tokens.tolist() == [1, 2, 3, 5, 6, 8]  # no answer's last token: it predicts nothing
    assert batch.layout.position_ids.tolist() == [0, 1, 2, 2, 3, 0]  # positions restart where the prompt ended
    assert batch.targets.tolist() == [3, 4, 5, 6, 7, 9, 10]
    # the prompt's last token predicts the first tokens of both answers
    assert batch.predictor_indices.tolist() == [1, 2, 1, 3, 4, 5, 5]
    assert batch.lengths == (2, 3, 1, 1)


@given(EXAMPLES)
def test_every_target_is_predicted_by_the_token_before_it(drawn: list[tuple[list[int], list[list[int]]]]) -> None:
    batch = collate(examples(drawn))
    expected = [
        (prompt + answer)[i - 1] for prompt, answers in drawn for answer in answers for i in _scored(prompt, answer)
    ]
    assert batch.tokens[batch.predictor_indices].tolist() == expected
    assert batch.targets.tolist() == [token for _, answers in drawn for answer in answers for token in answer]


def _scored(prompt: list[int], answer: list[int]) -> range:
    return range(len(prompt), len(prompt) + len(answer))


@given(EXAMPLES)
def test_sequences_are_prompt_and_answer_without_its_last_token(drawn: list[tuple[list[int], list[list[int]]]]) -> None:
    batch = collate(examples(drawn))
    assert [row.tolist() for row in batch.answer_sequences()] == [p + a[:-1] for p, answers in drawn for a in answers]


@given(EXAMPLES)
def test_every_prompt_is_in_the_row_once(drawn: list[tuple[list[int], list[list[int]]]]) -> None:
    tokens = sum(len(prompt) + sum(len(answer) - 1 for answer in answers) for prompt, answers in drawn)
    assert len(collate(examples(drawn)).tokens) == tokens


@pytest.mark.parametrize("example", [Example("x", [], ([1],)), Example("x", [1], ()), Example("x", [1], ([1], []))])
def test_an_empty_prompt_or_answer_is_refused_by_id(example: Example) -> None:
    with pytest.raises(ValueError, match=r"x: expected .* at least one token each"):
        collate([example])


def test_moving_a_batch_keeps_it() -> None:
    batch = collate([Example("a", [1, 2], ([3], [4, 5]))])
    moved = batch.to("cpu")
    assert isinstance(moved, Batch)
    assert torch.equal(moved.tokens, batch.tokens) and moved.lengths == batch.lengths
