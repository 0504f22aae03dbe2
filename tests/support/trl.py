"""TRL and this project on the same pairs: both are trained, and their numbers compared."""

import csv
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from types import MappingProxyType

import pytest
from transformers import AutoTokenizer

from dpo import quickstart
from dpo.cli.main import main
from dpo.data.dialogue import DialoguePair, parse_pair
from dpo.data.preferences import HHRLHF
from tests.support.models import make_tiny_model

pytest.importorskip("trl", reason="TRL is not installed (extra peers)")
from tests.support import trl_side

STEPS, BATCH, MAX_LENGTH, BETA, CLIP = 20, 4, 192, 0.1, 1.0
SIDES = [f"{what}/{side}" for what in ("rewards", "logps", "logits") for side in ("chosen", "rejected")]
METRICS = {name: name for name in ("loss", *SIDES, "rewards/margins", "rewards/accuracies", "entropy")}
METRICS["mean_token_accuracy"] = "token_accuracy"  # TRL's name: ours
RATES = {"grad_norm": "grad_norm", "learning_rate": "learning_rate"}  # of training only
SIGMOID = {"model.loss": "DPO", "model.loss.beta": BETA}
OPTIMIZERS = {"AdamW": "adamw_torch", "SGD": "sgd"}  # our name: TRL's


def random_model(folder: Path, family: str, seed: int = 0) -> Path:
    """A folder with a tiny model and the quickstart's tokenizer."""
    words = AutoTokenizer.from_pretrained(quickstart.POLICY_FOLDER)
    words.save_pretrained(folder)
    model = make_tiny_model(family, vocab_size=len(words), seed=seed, max_position_embeddings=MAX_LENGTH)
    model.save_pretrained(folder)
    return folder


def real_rows(folder: Path) -> Iterator[trl_side.Row]:
    with gzip.open(folder / "harmless-base" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            yield row["chosen"], row["rejected"]


def fitting(rows: Iterable[trl_side.Row], policy: Path, wanted: int) -> list[trl_side.Row]:
    """The first rows that are pairs and leave room for an end of sequence on both sides."""
    words = AutoTokenizer.from_pretrained(policy)
    pairs = (row for row in rows if isinstance(parse_pair(*row), DialoguePair))
    found = list(islice((row for row in pairs if max(map(len, words(list(row)).input_ids)) < MAX_LENGTH), wanted))
    assert len(found) == wanted
    return found


def compare(
    folder: Path,
    policy: Path,
    rows: list[trl_side.Row],
    optimizer: str,
    rate: float,
    *,
    val_fraction: float = 0.0,
    reference: Path | None = None,
    loss: Mapping[str, object] = SIGMOID,
    trls: Mapping[str, object] = MappingProxyType({}),
    names: Mapping[str, str] = METRICS | RATES,
) -> list[dict[str, float]]:
    """Train on both sides and ask for equal numbers; TRL's steps.

    `loss` and `trls` are options of our and of TRL's side; `names` is what is compared of training steps.
    """
    data = folder / "data"
    (data / "pairs").mkdir(parents=True)
    text = "".join(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n" for chosen, rejected in rows)
    (data / "pairs" / "train.jsonl").write_text(text)
    options = {
        "name": "ours",
        "model.policy": policy,
        **({"model.reference": reference} if reference else {}),
        **loss,
        "data.path": data,
        "data.shuffle": "false",
        "data.batch_size": BATCH,
        "data.max_length": MAX_LENGTH,
        "data.val_fraction": val_fraction,
        "optimizer": optimizer,
        "optimizer.lr": rate,
        "optimizer.weight_decay": 0,
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": folder,
        "trainer.gradient_clip_val": CLIP,
        "trainer.log_every_n_steps": 1,
        "trainer.max_steps": STEPS,
        "trainer.precision": "32-true",
        "trainer.val_check_interval": STEPS,
    }
    assert main(["fit", *(f"--{name}={value}" for name, value in options.items())]) == 0
    with (folder / "ours" / "metrics.csv").open(newline="") as file:
        ours = list(csv.DictReader(file))

    train_rows, held_out = parts(
        HHRLHF(str(data), tokenizer=str(policy), max_length=MAX_LENGTH, val_fraction=val_fraction), rows
    )
    steps, evaluations = trl_side.train(
        folder / "trl",
        policy,
        reference,
        train_rows,
        held_out,
        optim=OPTIMIZERS[optimizer],
        learning_rate=rate,
        weight_decay=0.0,
        max_grad_norm=CLIP,
        max_length=MAX_LENGTH,
        max_steps=STEPS,
        eval_steps=STEPS,
        **{"beta": BETA, "per_device_train_batch_size": BATCH, **trls},
    )
    assert len(ours) == len(steps) == STEPS
    assert max(abs(step["rewards/rejected"]) for step in steps) > 0.1  # so much has moved that agreement says something
    check(ours, "train/", steps, "", names)
    if held_out:
        assert len(evaluations) == 1
        check([row for row in ours if row["val/loss"]], "val/", evaluations, "eval_", METRICS)
    return steps


def parts(data: HHRLHF, rows: list[trl_side.Row]) -> tuple[list[trl_side.Row], list[trl_side.Row]]:
    """The rows that our side trains on, and those it validates on."""
    data.prepare_data()
    data.setup("fit")
    ids = [example.id for example in data.pairs_by_split.get("val", ())]
    held_out = {int(name.rpartition(":")[2]) - 1 for name in ids}
    assert len(rows) - len(held_out) >= STEPS * BATCH
    return [row for i, row in enumerate(rows) if i not in held_out], [rows[i] for i in sorted(held_out)]


def check(ours: list[dict], stage: str, trls: trl_side.Log, prefix: str, names: Mapping[str, str]) -> None:
    for i, (row, entry) in enumerate(zip(ours, trls, strict=True), 1):
        got = {f"{name}, row {i}": float(row[stage + own]) for name, own in names.items()}
        expected = {f"{name}, row {i}": entry[prefix + name] for name in names}
        assert got == pytest.approx(expected, rel=1e-4, abs=5e-5)


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `main` leaves in the process goes again."""
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.delenv("DPO_RUN_NAME", raising=False)
