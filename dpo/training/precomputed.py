"""A reference whose log-probabilities are computed once, and read from a file by every run after.

Takes a fixed reference and the rows of a stage; gives a `Comparison` that keeps no model. A file is named by all that
decides its numbers, so it serves any loss, beta, learning rate and resumed run, but no other reference and no other
rows. Knows nothing of losses.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from huggingface_hub.utils import WeakFileLock
from jaxtyping import Float
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from rich.progress import Progress, track
from torch import Tensor
from torch.utils.data import ConcatDataset
from transformers import PreTrainedModel

from dpo.data.datamodule import PairData, cache_folder
from dpo.data.logps_cache import (
    CacheKey,
    ColumnArrays,
    allocate_cache_file,
    hash_row_id,
    load_cache_file,
    map_cache_file,
    write_checksum,
)
from dpo.data.sampler import ExampleDataset, pack_rows_by_tokens
from dpo.files import write_atomically
from dpo.models.batch import Batch, Example, collate
from dpo.models.loading import ModelLoader
from dpo.models.reference import DISTANCE_ROUNDING, Copy, FrozenReference, Reference, ReferenceModel, logp_tolerance
from dpo.models.scoring import score

SPLITS_BY_STAGE = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
}  # of each stage that reads the cache
RECHECKED_ROWS = 8  # rows that are scored again whenever a file is read
DEFAULT_MAX_TOKENS = 16384  # of a forward pass, where the data sets no bound


@dataclass(frozen=True)
class StageRows:
    """The rows of a stage.

    Attributes:
        examples: Them, in the order of the data.
        costs: Tokens of each.
        ids: Hash of the id of each.
        lengths: Tokens of its answers.
        tokens: SHA-256 over all ids and tokens, whatever their order.
    """

    examples: ConcatDataset[Example]
    token_counts: NDArray[np.int64]
    id_hashes: NDArray[np.int64]
    answer_lengths: NDArray[np.int32]
    tokens_sha256: str


def index_stage_rows(parts: Sequence[ExampleDataset]) -> StageRows:
    """Look at every row once.

    Raises:
        ValueError: Two of them have the same id.
    """
    examples: ConcatDataset[Example] = ConcatDataset(parts)  # type: ignore[arg-type]  # map-style without the base
    ids = np.empty(len(examples), np.int64)
    lengths = np.empty((len(examples), len(examples[0].answers)), np.int32)
    total = 0
    for row in track(range(len(examples)), "Hashing rows", transient=True):
        example = examples[row]
        ids[row] = hash_row_id(example.id)
        lengths[row] = [len(answer) for answer in example.answers]
        text = json.dumps([example.id, list(example.prompt), *map(list, example.answers)])
        total += int.from_bytes(hashlib.sha256(text.encode()).digest())
    if len(np.unique(ids)) < len(ids):
        raise ValueError("--model.reference Cached finds rows by their ids: expected different ones, got one twice.")
    costs = np.concatenate([np.asarray(part.token_counts) for part in parts])
    return StageRows(examples, costs, ids, lengths, f"{total % 2**256:064x}")


@torch.no_grad()
def score_rows_into_file(
    model: PreTrainedModel, rows: StageRows, file: Path, key: CacheKey, max_tokens: int, trainer: L.Trainer
) -> None:
    """Score every row and write the file; every process scores its part of the rows into it.

    Raises:
        ValueError: A log-probability is not finite.
    """
    order = np.argsort(rows.id_hashes)
    totals = rows.answer_lengths.sum(-1, dtype=np.int64)
    if trainer.is_global_zero:
        allocate_cache_file(file, key, rows.id_hashes[order], rows.answer_lengths[order])
    trainer.strategy.barrier("allocated")
    columns = map_cache_file(file, "r+")
    starts = np.empty_like(totals)
    starts[order] = columns["starts"]
    with Progress(transient=True, disable=not trainer.is_global_zero) as bar:
        task = bar.add_task("Reference log-probabilities", total=int(rows.token_counts.sum()))
        for pack in islice(
            pack_rows_by_tokens(rows.token_counts, max_tokens), trainer.global_rank, None, trainer.world_size
        ):
            batch = collate([rows.examples[row] for row in pack]).to(model.device)
            logps = score(model, batch).logps.float().cpu()
            if not logps.isfinite().all():
                raise ValueError(f"log-probabilities of the reference are not finite: look at {', '.join(batch.ids)}.")
            for row, part in zip(pack, logps.split(totals[pack].tolist()), strict=True):
                columns["values"][starts[row] : starts[row] + totals[row]] = part.numpy()
            bar.advance(task, float(rows.token_counts[pack].sum()) * trainer.world_size)
    trainer.strategy.barrier("computed")
    if trainer.is_global_zero:
        write_checksum(file)


class CachedReference(ReferenceModel):
    """A reference of which only its log-probabilities are left."""

    columns: ColumnArrays

    def __init__(self, source: FrozenReference, folder: str | None) -> None:
        """Take a reference, whose model leaves memory in `prepare`."""
        super().__init__()
        self.source: FrozenReference | None = source
        self.folder = Path(folder).expanduser() if folder else None
        self.description, self.sha256 = f"{source.description}, cached", source.sha256
        self.initial_distance = max(source.initial_distance, DISTANCE_ROUNDING)  # its values come out of other batches

    @property
    def owned_models(self) -> dict[str, PreTrainedModel]:
        """None from `prepare` on."""
        return self.source.owned_models if self.source else {}

    @torch.no_grad()
    def prepare_for_stage(self, module: L.LightningModule) -> None:
        """Find or compute the values of all rows of the stage, compare some with the model, and let the model go.

        Raises:
            ValueError: A file is not what it must be; the message says why.
        """
        trainer, data = module.trainer, module.trainer.datamodule  # type: ignore[attr-defined]
        stage = trainer.state.fn.value  # type: ignore[union-attr]  # a stage is running
        if self.source is None or stage not in SPLITS_BY_STAGE:
            return
        assert isinstance(data, PairData)
        made: Any = trainer.precision_plugin.convert_module(self.source.to(trainer.strategy.root_device))
        rows = index_stage_rows(
            [data.pairs_by_split[split] for split in SPLITS_BY_STAGE[stage] if split in data.pairs_by_split]
        )
        key = CacheKey(made.sha256, rows.tokens_sha256, f"{trainer.precision} {made.model.dtype}")
        name = f"{stage}.safetensors" if self.folder else f"reference-{key.short_hash}.safetensors"
        file = (self.folder or cache_folder()) / name
        with trainer.precision_plugin.forward_context():
            ensure_cache_file(made.model, rows, file, key, data.max_tokens or DEFAULT_MAX_TOKENS, trainer)
            columns = load_cache_file(file, key)
            verify_cached_logps(columns, made.model, rows, file)
        self.columns, self.source = columns, None

    def forward(self, batch: Batch) -> Float[Tensor, " scored"]:
        """log p of every scored token, nats: from the file, or by the model where no rows are known in advance."""
        return self.source(batch) if self.source else lookup_logps(self.columns, batch)


def lookup_logps(columns: ColumnArrays, batch: Batch) -> Float[Tensor, " scored"]:
    """The values of every scored token of a batch.

    Raises:
        ValueError: A row is not in the file, or its answers have other lengths there.
    """
    wanted = np.array([hash_row_id(name) for name in batch.ids])
    rows = np.minimum(np.searchsorted(columns["ids"], wanted), len(columns["ids"]) - 1)
    lengths = np.reshape(batch.lengths, (len(rows), -1))
    there = (columns["ids"][rows] == wanted) & (columns["lengths"][rows] == lengths).all(-1)
    if not there.all():
        missing = [name for name, good in zip(batch.ids, there, strict=True) if not good]
        raise ValueError(
            f"the cache holds nothing for {', '.join(missing[:5])} with answers of these lengths: expected the rows of "
            "the stage that it was opened for. Run this stage as a command of its own."
        )
    parts = [columns["values"][a : a + n] for a, n in zip(columns["starts"][rows], lengths.sum(-1), strict=True)]
    return torch.from_numpy(np.concatenate(parts)).to(batch.targets.device, non_blocking=True)


def verify_cached_logps(columns: ColumnArrays, model: PreTrainedModel, rows: StageRows, file: Path) -> None:
    """Score some rows again.

    Raises:
        ValueError: The model computes other values than those in the file.
    """
    sample = dict.fromkeys(np.linspace(0, len(rows.id_hashes) - 1, RECHECKED_ROWS).astype(int).tolist())
    batch = collate([rows.examples[row] for row in sample]).to(model.device)
    found, limit = (score(model, batch).logps - lookup_logps(columns, batch)).abs().max().item(), logp_tolerance(model)
    if not found <= limit:
        raise ValueError(
            f"the cached log-probabilities in {file} are not used, the reference computes others here: expected a "
            f"difference of at most {limit:g} nats a token in {len(batch)} rows, got {found:g}. Remove the file to "
            "compute them anew."
        )


def ensure_cache_file(
    model: PreTrainedModel, rows: StageRows, file: Path, key: CacheKey, max_tokens: int, trainer: L.Trainer
) -> None:
    """Make the file if it is not there; of several runs at a time one makes it and the others wait."""
    file.parent.mkdir(parents=True, exist_ok=True)
    first = trainer.is_global_zero
    with WeakFileLock(f"{file}.lock") if first else nullcontext():
        if trainer.strategy.broadcast(file.exists()):
            return
        rank_zero_info(f"Reference: log-probabilities of {len(rows.id_hashes):,} rows go into {file}.")
        with write_atomically(file) if first else nullcontext(file) as aside:
            score_rows_into_file(model, rows, trainer.strategy.broadcast(aside), key, max_tokens, trainer)
    trainer.strategy.barrier("cached")


@dataclass(frozen=True)
class Cached(Reference):
    """Log-probabilities out of a file, computed once in one pass; no reference model is in memory while training.

    Attributes:
        of: The reference they are of; it must be a fixed one.
        folder: Where `fit.safetensors`, `validate.safetensors`, ... are or will be; by default files in ``$DPO_CACHE``
            with names that say what they are of, so that every change of reference or rows has a file of its own.
    """

    of: Reference = field(default_factory=Copy)
    folder: str | None = None

    def build_reference(self, policy: PreTrainedModel, loader: ModelLoader) -> CachedReference:
        """Make the reference.

        Raises:
            ValueError: It is none that stays as it is.
        """
        made = self.of.build_reference(policy, loader)
        if not isinstance(made, FrozenReference):
            raise ValueError(f"--model.reference Cached: expected a reference that stays as it is, got {self.of}.")
        return CachedReference(made, self.folder)
