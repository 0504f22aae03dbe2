"""Folders of runs whose truth is known: made-up ledgers, metrics and samples, in the layout that a fit writes."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from numpy.typing import NDArray
from pyarrow import parquet

from dpo.runs.folder import Run

BETA = 0.1
STEPS = (50, 100, 150)


def ledger_rows(
    rng: np.random.Generator,
    step: int,
    split: str,
    margins: NDArray[Any],
    length_differences: NDArray[Any],
    *,
    displaced: float = 0.2,
    trained: bool = False,
    first: int = 0,
) -> pa.Table:
    """Return rows with these margins; a share `displaced` of chosen answers is less likely than under the reference."""
    count = len(margins)
    chosen_tokens = rng.integers(40, 80, count)
    chosen_ratio = np.where(rng.random(count) < displaced, -5.0, 5.0)
    rejected_ratio = chosen_ratio - margins / BETA
    reference = -1.5 * chosen_tokens + rng.normal(0, 5, (2, count))
    values = {
        "step": np.full(count, step),
        "split": np.full(count, split),
        "id": np.array([f"made/{split}:{first + i + 1}" for i in range(count)]),
        "subset": np.full(count, "made"),
        "turns": np.ones(count),
        "prompt_tokens": np.full(count, 20),
        "chosen_tokens": chosen_tokens,
        "rejected_tokens": np.maximum(chosen_tokens - length_differences, 1),
        "chosen_logp": reference[0] + chosen_ratio,
        "rejected_logp": reference[1] + rejected_ratio,
        "reference_chosen_logp": reference[0],
        "reference_rejected_logp": reference[1],
        "chosen_reward": BETA * chosen_ratio,
        "rejected_reward": BETA * rejected_ratio,
        "loss": np.logaddexp(0, -margins),
        "trained": np.full(count, trained),
    }
    types = {
        "step": "int32",
        "turns": "int16",
        "split": "string",
        "id": "string",
        "subset": "string",
        "trained": "bool",
    }
    integers = {"prompt_tokens", "chosen_tokens", "rejected_tokens"}
    columns = {
        name: pa.array(value).cast(types.get(name, "int32" if name in integers else "float32"))
        for name, value in values.items()
    }
    return pa.table(columns)


def calibrated_margins(rng: np.random.Generator, count: int, spread: float = 2.0) -> NDArray[Any]:
    """Return margins m whose sign agrees with the label with probability S(|m|)."""
    sizes = np.abs(rng.normal(0, spread, count))
    return np.where(rng.random(count) < 1 / (1 + np.exp(-sizes)), sizes, -sizes)


def flip_labels(rng: np.random.Generator, margins: NDArray[Any], share: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return margins after a share of labels is flipped, and which are."""
    flipped = rng.random(len(margins)) < share
    return np.where(flipped, -margins, margins), flipped


def write_run(
    folder: Path,
    ledger: list[pa.Table] | None = None,
    losses: tuple[float, ...] = (0.65, 0.6, 0.55),
    accuracy: float = 0.7,
    samples: list[tuple[str, str]] | None = None,
    ended: tuple[bool, bool] | None = None,
    displaced: float = 0.2,
) -> Run:
    """Write the folder of a run.

    Args:
        folder: Where it is written to.
        ledger: Tables of its ledger; None: it has none.
        losses: Validation losses at `STEPS`.
        accuracy: Accuracy of every validation.
        samples: Answers of policy and reference at the last step; None: none were sampled.
        ended: Whether those of the policy and of the reference ended; None: not recorded, as in runs of older versions.
        displaced: Share of displaced pairs of every validation.
    """
    folder.mkdir(parents=True)
    run = Run(folder)
    with run.metrics_path.open("w", newline="") as file:
        writer = csv.writer(file)
        names = ["loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected"]
        names += ["logps/chosen", "logps/rejected", "entropy", "token_accuracy", "displaced"]
        writer.writerow(["step", "train/tokens_per_second", *(f"{s}/{n}" for s in ("train", "val") for n in names)])
        for step, loss in zip(STEPS, losses, strict=False):
            row = [loss, accuracy, 1.0, 0.5, -0.5, -80, -85, 1.5, 0.5, displaced]
            writer.writerow([step, 1000, *row, *row])
    loss = {"class_path": "dpo.losses.DPO", "init_args": {"beta": BETA, "label_smoothing": 0.0}}
    config = {
        "model": {"class_path": "dpo.DPO", "init_args": {"policy": "quickstart", "loss": loss}},
        "data": {"class_path": "dpo.HHRLHF", "init_args": {"path": "quickstart", "val_fraction": 0.1, "limit": None}},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}},
        "trainer": {"limit_val_batches": None},
    }
    run.config_path.write_text(yaml.safe_dump(config))
    run.audit_path.write_text(json.dumps({"train": {"total": {"read": 20_000, "kept": 20_000}}}))
    run.results_path.write_text(json.dumps({"val/loss": losses[-1]}))
    if samples is not None:
        rows = [
            {
                "step": STEPS[-1],
                "id": f"made/train:{i}",
                "prompt": "\n\nHuman: Hello?\n\nAssistant:",
                "policy": a,
                "reference": b,
                **({"policy_ended": ended[0], "reference_ended": ended[1]} if ended else {}),
            }
            for i, (a, b) in enumerate(samples)
        ]
        run.samples_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, table in enumerate(ledger or []):
        (folder / "ledger.parquet").mkdir(exist_ok=True)
        parquet.write_table(table, folder / "ledger.parquet" / f"{number:03}.parquet")
    return run


def healthy_ledger(seed: int = 0, count: int = 3000, flips: float = 0.0, **options: Any) -> list[pa.Table]:
    """Return validations of a policy that is calibrated and learns, with a training pass in between."""
    rng = np.random.default_rng(seed)
    final = calibrated_margins(rng, count)
    final, _ = flip_labels(rng, final, flips)
    lengths = rng.integers(-30, 31, count)
    training = calibrated_margins(rng, count)
    parts = [
        ledger_rows(
            np.random.default_rng(seed), step, "val", final * share + rng.normal(0, spread, count), lengths, **options
        )
        for step, share, spread in zip(STEPS, (0.4, 0.7, 1.0), (0.3, 0.3, 0), strict=True)
    ]
    return [*parts, ledger_rows(rng, 70, "train", training, lengths, trained=True, **options)]
