"""Rows that ``predict`` writes: for every prompt, the answers of policy and reference with their log-probabilities.

A scorer can mark the best answer as chosen and the worst as rejected. The rows have the format that `PreferencePairs`
reads; `chosen` and `rejected` are null as long as nothing is marked.
"""

import math
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor
from transformers import PreTrainedModel

from dpo.data.columns import Columns, chat_messages, hh_prompt_text
from dpo.data.dialogue import Refusal
from dpo.data.prompts import PromptBatch
from dpo.data.sampler import Step
from dpo.data.tokenization import PairEncoder
from dpo.models.batch import Batch, Example, collate
from dpo.models.generation import derive_seed, generate_answers

PredictionRow = dict[str, Any]
Scorer = Callable[[Any, list[str]], Sequence[float]]
"""Rates answers: ``score(prompt, answers)`` returns one finite number per answer, higher is better.

The prompt is a list of messages with ``role`` and ``content`` if the data has messages. If the data has text, it is the
text of the dialogue up to where the answer begins, as the model is given it without a chat template.
"""
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
    they are equal. The seed comes from the role alone, so that the policy's answers do not depend on who else answers.
    """
    prompts = [prompt.tokens for prompt in batch.prompts]
    generated = {
        role: generate_answers(model, encoder, prompts, batch.sampling, derive_seed(batch.seed, role))
        for role, model in models.items()
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


def label_best_and_worst(row: PredictionRow, scorer: Scorer, given_as_messages: bool = False) -> PredictionRow:
    """Return a row with its best complete answer as the chosen one and its worst as the rejected one.

    Answers that were cut off at the maximum length are never marked: training on them teaches the policy to stop
    midway. Nothing is marked if all scores are equal; `PreferencePairs` counts such a row as ``unmarked``.

    Args:
        row: A row of `answer_prompts`.
        scorer: Rates the complete answers.
        given_as_messages: Whether the data has the prompt as messages; the scorer gets it as the data has it.

    Raises:
        ValueError: The row has no answers, or the scorer raises an error or does not return one finite number per
            answer.
    """
    if "answers" not in row:
        raise ValueError("--scorer rates answers to prompts: expected --data Prompts, got pairs.")
    candidates = [answer for answer in row["answers"] if answer["complete"] and answer["text"]]
    if not candidates:
        return row
    scores = _scores(row["id"], scorer, _scorer_prompt(row, given_as_messages), [each["text"] for each in candidates])
    score_by_answer = {id(answer): score for answer, score in zip(candidates, scores, strict=True)}
    labelled = row | {"answers": [{**answer, "score": score_by_answer.get(id(answer))} for answer in row["answers"]]}
    if min(scores) < max(scores):
        labelled["chosen"] = candidates[scores.index(max(scores))]["text"]
        labelled["rejected"] = candidates[scores.index(min(scores))]["text"]
    return labelled


def _scorer_prompt(row: PredictionRow, given_as_messages: bool) -> str | list[dict[str, str]]:
    """Return the prompt of a row as messages or as text, whichever of them the row has."""
    prompt: str | list[dict[str, str]] = row["prompt"]
    if isinstance(prompt, list) == given_as_messages:
        return prompt
    history = Columns().parse_history(row)
    assert not isinstance(history, Refusal)
    return chat_messages(history) if given_as_messages else hh_prompt_text(history)


def _scores(prompt_id: str, scorer: Scorer, prompt: str | list[dict[str, str]], answers: list[str]) -> list[float]:
    """Return the scores of the answers to a prompt.

    Raises:
        ValueError: The scorer raises an error or does not return one finite number per answer.
    """
    expected = f"--scorer, at the prompt {prompt_id}: expected {len(answers)} finite numbers, one per answer, got"
    try:
        given = scorer(prompt, answers)
    except Exception as error:  # whatever a user's code may raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{expected} an error ({Path(frame.filename).name}, line {frame.lineno}): {what}") from error
    try:
        values = [] if isinstance(given, str | Mapping) else list(given)
        scores = [math.nan if isinstance(value, str) else float(value) for value in values]
    except (TypeError, ValueError):
        scores = []
    if len(scores) != len(answers) or not all(map(math.isfinite, scores)):
        raise ValueError(f"{expected} {' '.join(repr(given).split()):.200}.")
    return scores


@dataclass(frozen=True)
class AnswerCounts:
    """What came of a round of answers.

    Attributes:
        prompts: Number of prompts that were answered; 0 if pairs were scored instead.
        labelled: Number of prompts with a chosen and a rejected answer.
        tied: Number of prompts whose scores name no best and no worst answer.
        answers: Number of answers.
        cut: Number of answers that the limit of their length ended.
        cut_tokens: That limit, in tokens; 0 if no answer was cut.
    """

    prompts: int
    labelled: int
    tied: int
    answers: int
    cut: int
    cut_tokens: int

    @classmethod
    def from_rows(cls, rows: Iterable[PredictionRow]) -> "AnswerCounts":
        """Count the rows of a prediction."""
        prompts = labelled = tied = answers = 0
        cut_lengths: list[int] = []
        for row in rows:
            drawn = row.get("answers", [])
            prompts += "answers" in row
            labelled += bool(drawn) and row["chosen"] is not None
            tied += any(answer["score"] is not None for answer in drawn) and row["chosen"] is None
            answers += len(drawn)
            cut_lengths += [answer["tokens"] for answer in drawn if not answer["complete"]]
        return cls(prompts, labelled, tied, answers, len(cut_lengths), max(cut_lengths, default=0))

    def __str__(self) -> str:
        """Say in words what came of the round, and what can be done about it."""
        ties = f"; {self.tied} prompts have no two answers with different scores" if self.tied else ""
        cut = f" at {self.cut_tokens} tokens: raise --data.sampling.max_new_tokens" if self.cut else ""
        labelled = f"{self.labelled} of {self.prompts} prompts labelled"
        return f"{labelled}{ties}; {self.cut} of {self.answers} answers were cut{cut}"
