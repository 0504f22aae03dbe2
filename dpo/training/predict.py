"""Rows that ``predict`` writes: for every prompt, the answers of policy and reference with their log-probabilities.

A scorer can mark the best answer as chosen and the worst as rejected. The rows have the format that `PreferencePairs`
reads; `chosen` and `rejected` are null as long as nothing is marked.
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
"""Rates answers, higher is better. Arguments: the dialogue as hh-rlhf text up to the answer, and the answers."""
ScoreAnswers = Callable[[Batch], tuple[Tensor, Tensor, Tensor]]
"""Returns per answer its log-probabilities under policy and reference in nats, and its reward; NaN: no reference."""
PredictionRows = Callable[[Batch], list[PredictionRow]]
"""Returns a row per example."""


def predict_rows(
    step: Step | PromptBatch,
    module: L.LightningModule,
    models: Mapping[str, PreTrainedModel],
    score_answers: ScoreAnswers,
    prediction_rows: PredictionRows,
) -> list[PredictionRow]:
    """Return the rows that ``predict`` writes: answers to prompts, or values of the examples of a step.

    Args:
        step: Prompts, or a step of examples.
        module: The stage, whose trainer has the data.
        models: Models that answer prompts, by role.
        score_answers: Scores the answers to prompts.
        prediction_rows: Makes the rows of examples.
    """
    if isinstance(step, PromptBatch):
        return answer_prompts(step, module.trainer.datamodule.encoder, models, score_answers)  # type: ignore[attr-defined]
    return [row for batch in step.micro_batches for row in prediction_rows(batch)]


def answer_prompts(
    batch: PromptBatch, encoder: PairEncoder, models: Mapping[str, PreTrainedModel], score_answers: ScoreAnswers
) -> list[PredictionRow]:
    """Return one row per prompt, with the answers of every model.

    Every model samples with a seed of its own: otherwise policy and reference would give the same answers as long as
    they are equal.
    """
    prompts = [prompt.tokens for prompt in batch.prompts]
    generated = {
        role: generate_answers(model, encoder, prompts, batch.sampling, batch.seed + (number << 40))
        for number, (role, model) in enumerate(models.items())
    }
    device = models["policy"].device
    rows = []
    for number, prompt in enumerate(batch.prompts):
        answers = [(role, answer) for role, by_prompt in generated.items() for answer in by_prompt[number]]
        example = Example(prompt.id, prompt.tokens, tuple(answer.tokens for _, answer in answers))
        scores = zip(*map(_json_numbers, score_answers(collate([example]).to(device))), strict=True)
        scored = [
            {
                "from": role,
                "text": answer.text,
                "complete": answer.is_complete,
                "tokens": len(answer.tokens),
                "logps": {"policy": policy, "reference": reference},
                "reward": reward,
                "score": None,
            }
            for (role, answer), (policy, reference, reward) in zip(answers, scores, strict=True)
        ]
        rows.append({"id": prompt.id, "prompt": prompt.prompt, "chosen": None, "rejected": None, "answers": scored})
    return rows


def _json_numbers(values: Tensor) -> list[float | None]:
    """Return the values as a list, with None for NaN, which JSON does not have."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def load_scorer(name: str) -> Scorer:
    """Import the scorer ``module:function``.

    Raises:
        ValueError: The module or the function does not exist.
    """
    module, _, function = name.partition(":")
    try:
        scorer = import_module(module).__dict__[function]
    except (ImportError, KeyError, ValueError) as error:
        raise ValueError(
            f"--scorer: expected module:function, with the module beside train.py or on PYTHONPATH, got {name!r}: "
            f"{error!r}."
        ) from error
    if not callable(scorer):
        raise ValueError(f"--scorer: expected a function, got {name!r}, which is {scorer!r}.")
    return scorer  # type: ignore[no-any-return]


def label_best_and_worst(row: PredictionRow, scorer: Scorer) -> PredictionRow:
    """Return a row with its best complete answer as the chosen one and its worst as the rejected one.

    Answers that were cut off at the maximum length are never marked: training on them teaches the policy to stop
    midway. Nothing is marked if all scores are equal; `PreferencePairs` counts such a row as ``unmarked``.

    Args:
        row: A row of `answer_prompts`.
        scorer: Rates the complete answers.

    Raises:
        ValueError: The row has no answers, or the scorer does not return one finite number per answer.
    """
    if "answers" not in row:
        raise ValueError("--scorer rates answers to prompts: expected --data Prompts, got pairs.")
    candidates = [answer for answer in row["answers"] if answer["complete"] and answer["text"]]
    if not candidates:
        return row
    history = Columns().parse_history(row)
    assert not isinstance(history, Refusal)
    scores = [float(score) for score in scorer(hh_prompt_text(history), [answer["text"] for answer in candidates])]
    if len(scores) != len(candidates) or not all(map(math.isfinite, scores)):
        raise ValueError(f"--scorer: expected {len(candidates)} finite numbers, one per answer, got {scores}.")
    score_by_answer = {id(answer): score for answer, score in zip(candidates, scores, strict=True)}
    labelled = row | {"answers": [{**answer, "score": score_by_answer.get(id(answer))} for answer in row["answers"]]}
    if min(scores) < max(scores):
        labelled["chosen"] = candidates[scores.index(max(scores))]["text"]
        labelled["rejected"] = candidates[scores.index(min(scores))]["text"]
    return labelled
