"""The same run on one process and on two (gloo, CPU): equal pairs, losses, metrics and weights."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from dpo.runs.folder import Run
from dpo.runs.ledger import VALUE_COLUMNS, read_ledger

KEYS = ("step", "split", "id", "trained")
ROOT = Path(__file__).resolve().parents[2]
# Metrics that measure time.
CLOCK = ("seconds", "train/tokens_per_second", "train/time/step", "train/time/data")


def fit(root: Path, devices: int, *words: str) -> tuple[list[dict[str, str]], dict[str, torch.Tensor]]:
    """Train on the command line; return the rows of metrics.csv and the weights at the end."""
    name = f"devices-{devices}"
    command = [
        sys.executable, "train.py", "fit", "--config", "configs/quickstart.yaml", "--name", name,
        "--trainer.default_root_dir", str(root), "--trainer.devices", str(devices),
        "--trainer.strategy", "ddp" if devices > 1 else "auto", "--trainer.max_steps", "3",
        "--trainer.log_every_n_steps", "1", "--trainer.val_check_interval", "3", "--trainer.limit_val_batches", "1.0",
        "--data.limit", "120", "--data.batch_size", "8", "--data.max_tokens", "200", *words,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    with (root / name / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    checkpoint = torch.load(root / name / "checkpoints" / "last.ckpt", weights_only=True)
    return rows, checkpoint["state_dict"]


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    # Batches of 8 in micro-batches of 200 tokens: each of two processes packs its share in a way of its own.
    (one, weights), (two, others) = (fit(tmp_path, devices) for devices in (1, 2))
    assert [row["step"] for row in one] == [row["step"] for row in two] == ["1", "2", "3"]
    for row, other in zip(one, two, strict=True):
        for name in row.keys() - set(CLOCK):
            assert (row[name] == "") == (other[name] == ""), name
            if row[name]:
                assert abs(float(row[name]) - float(other[name])) <= 1e-5 * max(1, abs(float(row[name]))), name
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=0, atol=1e-5, msg=name)
    assert_same_ledger(*(Run(tmp_path / f"devices-{devices}") for devices in (1, 2)))


def assert_same_ledger(one: Run, two: Run) -> None:
    """Each process has written its own pairs, and together every pair once; the groups are of all pairs."""
    ranks = {file.name.split("-")[2] for file in two.ledger_path.iterdir()}
    assert ranks == {"rank0", "rank1"}
    tables = [read_ledger(run).sort_by([(key, "ascending") for key in KEYS]) for run in (one, two)]
    values, others = (table.select(VALUE_COLUMNS).to_pandas().to_numpy() for table in tables)
    assert tables[0].drop_columns(VALUE_COLUMNS).equals(tables[1].drop_columns(VALUE_COLUMNS))
    assert abs(values - others).max() < 1e-3
    groups, found = (json.loads(run.results_path.read_text())["val_groups"] for run in (one, two))
    for group, other in zip(groups, found, strict=True):
        assert [group[name] for name in ("by", "name", "pairs")] == [other[name] for name in ("by", "name", "pairs")]
        assert abs(group["loss"]["low"] - other["loss"]["low"]) < 1e-4
