"""Questions -> rows with the answers of policy and reference, what both think of them, and which are best and worst.

Takes models and a function that scores; gives rows in the format of `PreferencePairs`, with `chosen` and `rejected`
null until somebody, or a scorer, has marked them. Knows nothing of the loss.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import lightning as L
from torch import Tensor
from transformers import PreTrainedModel

from dpo.data.columns import Columns, hh_prompt_text
from dpo.data.dialogue import Refusal
from dpo.data.prompts import PromptBatch
from dpo.data.sampler import Step
from dpo.data.tokenization import PairEncoder
from dpo.models.batch import Batch, Example, collate
from dpo.models.generation import generate_answers

PredictionRow = dict[str, Any]
Scorer = Callable[[str, list[str]], Sequence[float]]
"""A prompt (the dialogue as text of hh-rlhf, up to where the answer begins) and answers -> how good each is."""
ScoreAnswers = Callable[[Batch], tuple[Tensor, Tensor, Tensor]]
"""Answers -> log-probability under policy and reference, nats (NaN without a reference), and reward of each."""
PredictionRows = Callable[[Batch], list[PredictionRow]]
"""Examples -> a row for each."""


def predict_rows(
    step: Step | PromptBatch,
    module: L.LightningModule,
    models: Mapping[str, PreTrainedModel],
    score_answers: ScoreAnswers,
    prediction_rows: PredictionRows,
) -> list[PredictionRow]:
    """What `predict` writes. Of questions: answers. Of a step of examples: what is told of each."""
    if isinstance(step, PromptBatch):
        return answer_prompts(step, module.trainer.datamodule.encoder, models, score_answers)  # type: ignore[attr-defined]
    return [row for batch in step.micro_batches for row in prediction_rows(batch)]


def answer_prompts(
    batch: PromptBatch, encoder: PairEncoder, models: Mapping[str, PreTrainedModel], score_answers: ScoreAnswers
) -> list[PredictionRow]:
    """One row for every question; the models draw differently, or they would say the same while they are the same."""
    prompts = [question.tokens for question in batch.prompts]
    written = {
        role: generate_answers(model, encoder, prompts, batch.sampling, batch.seed + (number << 40))
        for number, (role, model) in enumerate(models.items())
    }
    device = models["policy"].device
    rows = []
    for number, question in enumerate(batch.prompts):
        answers = [(role, answer) for role, all_of_it in written.items() for answer in all_of_it[number]]
        example = Example(question.id, question.tokens, tuple(answer.tokens for _, answer in answers))
        values = zip(*(_plain(column) for column in score_answers(collate([example]).to(device))), strict=True)
        told = [
            {
                "from": role,
                "text": answer.text,
                "complete": answer.is_complete,
                "tokens": len(answer.tokens),
                "logps": {"policy": policy, "reference": reference},
                "reward": reward,
                "score": None,
            }
            for (role, answer), (policy, reference, reward) in zip(answers, values, strict=True)
        ]
        rows.append({"id": question.id, "prompt": question.prompt, "chosen": None, "rejected": None, "answers": told})
    return rows


def _plain(values: Tensor) -> list[float | None]:
    """Numbers for JSON, which has no NaN."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def load_scorer(name: str) -> Scorer:
    """The function behind ``module:function``.

    Raises:
        ValueError: There is none.
    """
    module, _, function = name.partition(":")
    try:
        found = import_module(module).__dict__[function]
    except (ImportError, KeyError, ValueError) as error:
        raise ValueError(
            f"--scorer: expected module:function, beside train.py or on PYTHONPATH, got {name!r}: {error!r}."
        ) from error
    if not callable(found):
        raise ValueError(f"--scorer: expected a function, {name!r} is {found!r}.")
    return found  # type: ignore[no-any-return]


def label_best_and_worst(row: PredictionRow, scorer: Scorer) -> PredictionRow:
    """The row with the best complete answer as the chosen one and the worst as the rejected one.

    An answer that was cut at the longest length is never marked: to learn from it is to learn to stop midway. Nothing
    is marked where all are equally good; `PreferencePairs` counts such a row under ``unmarked``.

    Raises:
        ValueError: The scorer does not give one number for each answer.
    """
    if "answers" not in row:
        raise ValueError("--scorer marks answers to prompts: expected --data Prompts, got pairs.")
    able = [answer for answer in row["answers"] if answer["complete"] and answer["text"]]
    if not able:
        return row
    history = Columns().parse_history(row)
    assert not isinstance(history, Refusal)
    scores = [float(score) for score in scorer(hh_prompt_text(history), [answer["text"] for answer in able])]
    if len(scores) != len(able) or not all(map(math.isfinite, scores)):
        raise ValueError(f"--scorer: expected {len(able)} finite numbers, one for each answer, got {scores}.")
    given = {id(answer): score for answer, score in zip(able, scores, strict=True)}
    answers = [{**answer, "score": given.get(id(answer))} for answer in row["answers"]]
    marked = {"answers": answers}
    if min(scores) < max(scores):
        marked |= {side: able[scores.index(f(scores))]["text"] for side, f in (("chosen", max), ("rejected", min))}
    return row | marked
