"""The ledger of a run: what was measured of every single pair, at which step.

It is a folder, ``ledger.parquet``, of Parquet files that are read together as one data set, by `read_ledger` or any
reader of Parquet. A file is complete or absent, and its name says its last step, its process and its kind: ``trained``
files hold training pairs as they were in the training step, ``measured`` files the pairs of one validation.
"""

import pyarrow as pa
from pyarrow import dataset

from dpo.runs.folder import Run

VALUE_COLUMNS = (
    "chosen_logp",
    "rejected_logp",
    "reference_chosen_logp",
    "reference_rejected_logp",
    "chosen_reward",
    "rejected_reward",
    "loss",
)
LEDGER_SCHEMA = pa.schema(
    [
        ("step", pa.int32()),  # optimizer steps taken at the validation; of a trained row, the step that trained it
        ("split", pa.string()),  # train or val
        ("id", pa.string()),  # subset/split of its file:line
        ("subset", pa.string()),
        ("turns", pa.int16()),  # human turns of the prompt; null if the data do not say
        ("prompt_tokens", pa.int32()),
        ("chosen_tokens", pa.int32()),
        ("rejected_tokens", pa.int32()),
        # Sums over answer tokens, nats; those of the reference are null where the loss has none.
        *((name, pa.float32()) for name in VALUE_COLUMNS[:4]),
        *((name, pa.float32()) for name in VALUE_COLUMNS[4:6]),  # implicit rewards, as the loss defines them
        ("loss", pa.float32()),  # times the weight of the pair
        ("trained", pa.bool_()),  # true: before the update of that step, in it; false: by the policy of that step
    ]
)
"""Columns of the ledger."""


def open_ledger(run: Run) -> dataset.Dataset:
    """Return a run's ledger as a data set, whose rows are not read yet."""
    return dataset.dataset(run.ledger_path, LEDGER_SCHEMA, format="parquet")


def read_ledger(run: Run) -> pa.Table:
    """Return all rows of a run's ledger, in no particular order, with the columns of `LEDGER_SCHEMA`.

    A row is a pair in the training step that used it (``trained``), or a pair measured at a validation, so that
    (step, split, id, trained) occurs once unless the data hold a pair several times.

    Raises:
        FileNotFoundError: The run has no ledger.
    """
    if not run.ledger_path.is_dir():
        raise FileNotFoundError(
            f"{run.ledger_path}: expected the ledger of a preference run, found none. Train with --ledger.enabled true."
        )
    return open_ledger(run).to_table()
