"""Scores of all answers of a benchmark under a policy and its reference, and the record of what came of them."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel

from dpo import __version__
from dpo.data.sampler import pack_rows_by_tokens
from dpo.evaluation.grades import add_up, chance_grades, grade_answers, grade_subsets
from dpo.evaluation.suite import Suite
from dpo.models.batch import Example, collate
from dpo.models.loading import context_length, resolve_model_path, weights_sha256
from dpo.models.prompt_sharing import share_if_exact
from dpo.models.scoring import score
from dpo.runs.evaluations import SHARED_RULE, STRICT_RULE

TOKENS_PER_PASS = 4096  # prompt and answers of the rows that are scored together; a longer row is scored alone
SCORE_KINDS = {
    "log-ratio": "the summed log-ratio to the reference, the implicit reward of DPO without its beta",
    "logp": "the policy's summed log-probability, without a reference",
    "mean-logp": "the policy's mean log-probability of a token, without a reference: the implicit reward of SimPO",
}


@dataclass(frozen=True)
class JudgeModels:
    """The models whose probabilities are the scores.

    Attributes:
        models: Policy and, if it has one, reference by role, ready to score.
        sha256: Hashes of their weights, by role.
        names: What they are called, by role.
        kind: A name of `SCORE_KINDS`, what the policy's score of an answer is.
    """

    models: Mapping[str, PreTrainedModel]
    sha256: Mapping[str, str]
    names: Mapping[str, str]
    kind: str

    @classmethod
    def prepare(
        cls, models: Mapping[str, PreTrainedModel], names: Mapping[str, str], kind: str, device: str, dtype: str
    ) -> "JudgeModels":
        """Hash models, move them to a device and let them share prompts where that is exact.

        Raises:
            ValueError: There is no such device.
        """
        hashes = {role: weights_sha256(model) for role, model in models.items()}
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        for model in models.values():
            try:
                torch.nn.Module.to(model.requires_grad_(False), device=device)
            except (RuntimeError, AssertionError) as error:
                raise ValueError(f"--device {device}: {error}") from error
            share_if_exact(model)  # in float32, where a wrongly seen token is no rounding
            torch.nn.Module.to(model, dtype=getattr(torch, dtype))
        return cls(models, hashes, names, kind)

    @property
    def context_length(self) -> int | None:
        """Tokens that every model was made for; None if none names a limit."""
        limits = [limit for model in self.models.values() if (limit := context_length(model))]
        return min(limits, default=None)


@torch.no_grad()
def sum_logps(model: PreTrainedModel, examples: Sequence[Example], label: str = "") -> list[list[float]]:
    """Return the log-probability of every answer of every example, in nats.

    Args:
        model: The model.
        examples: Prompts with their answers; every prompt is computed once if the model shares prompts.
        label: Shown beside the progress on a terminal.
    """
    counts = np.array([len(each.prompt) + sum(map(len, each.answers)) for each in examples])
    console = Console(stderr=True)
    packs = list(pack_rows_by_tokens(counts, TOKENS_PER_PASS))
    sums: dict[int, list[float]] = {}
    for pack in track(packs, label, console=console, transient=True, disable=not console.is_terminal):
        batch = collate([examples[number] for number in pack]).to(model.device)
        answers = iter(score(model, batch).logps.double().split(batch.lengths))
        sums |= {number: [next(answers).sum().item() for _ in examples[number].answers] for number in pack}
    return [sums[number] for number in range(len(examples))]


def measure_suite(judge: JudgeModels, suite: Suite, command: Sequence[str]) -> tuple[dict[str, Any], list[Any]]:
    """Score all answers of a suite and count the right rows.

    Args:
        judge: The models.
        suite: The rows.
        command: The command line that is being carried out, for the record.

    Returns:
        The record, as values for JSON, and the scores of every row.
    """
    examples = [row.example for row in suite.rows]
    logps = {role: sum_logps(model, examples, role) for role, model in judge.models.items()}
    policy = _policy_scores(judge.kind, logps, examples)
    lengths = [[float(len(answer)) for answer in row.answers] for row in suite.rows]
    others = {f"{role} log-prob": values for role, values in logps.items() if (role, judge.kind) != ("policy", "logp")}
    others |= {"longer": lengths, "shorter": [[-length for length in row] for row in lengths]}
    grades = {name: grade_subsets(suite.rows, scores) for name, scores in others.items()}
    grades["chance"] = chance_grades(suite.rows)
    scores = add_up(grade_subsets(suite.rows, policy), grades)
    record = {
        "suite": suite.name,
        "file": suite.file_name,
        "sha256": suite.sha256,
        "rule": STRICT_RULE if all(row.is_pair for row in suite.rows) else SHARED_RULE,
        "score": judge.kind,
        "policy": {"name": judge.names["policy"], "sha256": judge.sha256["policy"]},
        "reference": {"name": judge.names["reference"], "sha256": judge.sha256["reference"]}
        if "reference" in judge.models
        else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "command": shlex.join(command),
        "rows_read": suite.rows_read,
        "rows_scored": len(suite.rows),
        "limit": suite.limit,
        "unscored": suite.unscored,
        "cut": suite.cut_ids,
        "rows_all_equal": sum(len(set(values)) == 1 for values in policy),
        "scores": [asdict(each) for each in scores],
    }
    return record, list(_row_scores(suite, logps, policy))


def _policy_scores(kind: str, logps: Mapping[str, list[list[float]]], examples: Sequence[Example]) -> list[list[float]]:
    if kind == "logp":
        return logps["policy"]
    if kind == "mean-logp":
        return [
            [value / len(answer) for value, answer in zip(values, example.answers, strict=True)]
            for values, example in zip(logps["policy"], examples, strict=True)
        ]
    both = zip(logps["policy"], logps["reference"], strict=True)
    return [[ours - theirs for ours, theirs in zip(*row, strict=True)] for row in both]


def _row_scores(
    suite: Suite, logps: Mapping[str, list[list[float]]], policy: Sequence[Sequence[float]]
) -> Iterator[dict[str, Any]]:
    """Yield what is stored of every row; whether it is right is left open in Ties, where rows count by prompt."""
    for number, row in enumerate(suite.rows):
        right = grade_answers(policy[number], len(row.chosen), row.is_pair)
        yield {
            "id": row.id,
            "subset": row.subset,
            "chosen": len(row.chosen),
            "score": policy[number],
            **{f"{role}_logp": values[number] for role, values in logps.items()},
            "tokens": [len(answer) for answer in row.example.answers],
            "right": right if row.ties_prompt is None else None,
            "cut": list(row.cuts),
        }


def policy_name(path: str) -> str:
    """Return what a record calls a model: a hub id as it is, a folder by its last parts, an export by its run."""
    folder = Path(path).expanduser()
    if path == resolve_model_path("quickstart"):
        return "quickstart"
    if not folder.is_dir():
        return path
    folder = folder.resolve()
    return folder.parent.name if folder.name == "export" else folder.name
