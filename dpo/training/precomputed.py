"""A reference whose log-probabilities are computed once and then read from a file, without its model in memory.

A file belongs to what decides its values: reference, rows and precision. So one file serves every loss, beta, learning
rate and resumed run, but never another reference or other rows.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

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
from dpo.files import hold_folder, write_atomically
from dpo.models.batch import Batch, Example, collate
from dpo.models.loading import ModelLoader
from dpo.models.reference import DISTANCE_ROUNDING, Copy, FrozenReference, Reference, ReferenceModel, logp_tolerance
from dpo.models.scoring import score

SPLITS_BY_STAGE = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
"""The splits whose values a stage reads; stages that are not named use the model."""
RECHECKED_ROWS = 8  # rows that are scored again whenever a file is read
DEFAULT_MAX_TOKENS = 16384  # of a forward pass, if the data set no limit


@dataclass(frozen=True)
class StageRows:
    """All rows of the splits of a stage.

    Attributes:
        examples: The rows, split after split.
        token_counts: Tokens of every row, prompt and answers.
        id_hashes: Hash of the id of every row.
        answer_lengths: Tokens of every answer, rows x answers.
        tokens_sha256: SHA-256 of all ids and tokens; it does not depend on the order of the rows.
    """

    examples: ConcatDataset[Example]
    token_counts: NDArray[np.int64]
    id_hashes: NDArray[np.int64]
    answer_lengths: NDArray[np.int32]
    tokens_sha256: str


def index_stage_rows(parts: Sequence[ExampleDataset]) -> StageRows:
    """Read every row of some splits once, to hash it and to measure its answers.

    Raises:
        ValueError: Two rows have the same id.
    """
    examples: ConcatDataset[Example] = ConcatDataset(parts)  # type: ignore[arg-type]  # map-style without the base
    id_hashes = np.empty(len(examples), np.int64)
    lengths = np.empty((len(examples), len(examples[0].answers)), np.int32)
    hash_sum = 0  # a sum, so that the order of the rows does not matter
    for row in track(range(len(examples)), "Hashing rows", transient=True):
        example = examples[row]
        id_hashes[row] = hash_row_id(example.id)
        lengths[row] = [len(answer) for answer in example.answers]
        text = json.dumps([example.id, list(example.prompt), *map(list, example.answers)])
        hash_sum += int.from_bytes(hashlib.sha256(text.encode()).digest())
    if len(np.unique(id_hashes)) < len(id_hashes):
        raise ValueError("--model.reference Cached finds rows by their ids: expected unique ids, got one id twice.")
    token_counts = np.concatenate([np.asarray(part.token_counts) for part in parts])
    return StageRows(examples, token_counts, id_hashes, lengths, f"{hash_sum % 2**256:064x}")


@torch.no_grad()
def score_rows_into_file(
    model: PreTrainedModel, rows: StageRows, file: Path, key: CacheKey, max_tokens: int, trainer: L.Trainer
) -> None:
    """Score every row and write the file. Every process scores a share of the rows and writes into the same file.

    Args:
        model: The reference.
        rows: The rows of the stage.
        file: The file to create.
        key: What decides the values.
        max_tokens: Maximum tokens of a forward pass, which only a single row may exceed.
        trainer: Its processes share the work.

    Raises:
        ValueError: A log-probability is not finite.
    """
    order = np.argsort(rows.id_hashes)
    value_counts = rows.answer_lengths.sum(-1, dtype=np.int64)
    if trainer.is_global_zero:
        allocate_cache_file(file, key, rows.id_hashes[order], rows.answer_lengths[order])
    trainer.strategy.barrier("allocated")
    columns = map_cache_file(file, "r+")
    starts = np.empty_like(value_counts)
    starts[order] = columns["starts"]
    packs = pack_rows_by_tokens(rows.token_counts, max_tokens)
    with Progress(transient=True, disable=not trainer.is_global_zero) as bar:
        task = bar.add_task("Reference log-probabilities", total=int(rows.token_counts.sum()))
        for pack in islice(packs, trainer.global_rank, None, trainer.world_size):
            batch = collate([rows.examples[row] for row in pack]).to(model.device)
            logps = score(model, batch).logps.float().cpu()
            if not logps.isfinite().all():
                raise ValueError(
                    f"log-probabilities of the reference are not finite: check the rows {', '.join(batch.ids)}."
                )
            for row, values in zip(pack, logps.split(value_counts[pack].tolist()), strict=True):
                columns["values"][starts[row] : starts[row] + value_counts[row]] = values.numpy()
            bar.advance(task, float(rows.token_counts[pack].sum()) * trainer.world_size)
    trainer.strategy.barrier("computed")
    if trainer.is_global_zero:
        write_checksum(file)


class CachedReference(ReferenceModel):
    """A reference whose log-probabilities are in a file.

    Attributes:
        source: The reference with its model; None once the values of a stage are known.
        columns: The values, once they are known.
    """

    columns: ColumnArrays | None = None

    def __init__(self, source: FrozenReference, choice: "Cached") -> None:
        """Take a reference, whose model stays in memory until `prepare_for_stage`.

        Args:
            source: The reference.
            choice: What it was built by.
        """
        super().__init__()
        self.source: FrozenReference | None = source
        self.choice = choice
        self.folder = Path(choice.folder).expanduser() if choice.folder else None
        self.description = f"{source.description}, cached"
        self.sha256 = source.sha256
        # Values of a file come from other batches than those they are compared in.
        self.initial_distance = max(source.initial_distance, DISTANCE_ROUNDING)

    @property
    def owned_models(self) -> dict[str, PreTrainedModel]:
        """The model of the reference by its role; nothing once it has left memory."""
        return self.source.owned_models if self.source else {}

    @torch.no_grad()
    def prepare_for_stage(self, module: L.LightningModule) -> None:
        """Read or compute the values of all rows of the stage, check some with the model, and drop the model.

        Raises:
            ValueError: The file cannot be used; the message says why.
        """
        trainer = module.trainer
        data = trainer.datamodule  # type: ignore[attr-defined]
        stage = trainer.state.fn.value  # type: ignore[union-attr]  # a stage is running
        if stage not in SPLITS_BY_STAGE:
            self._restore_source(module).to(trainer.strategy.root_device)
            return
        if not isinstance(data, PairData):
            raise ValueError(
                "reference Cached: expected a data module of dpo (HHRLHF, PreferencePairs), whose rows are known in "
                "advance, got data loaders. Leave the reference out for a frozen copy."
            )
        rows = index_stage_rows(
            [data.pairs_by_split[split] for split in SPLITS_BY_STAGE[stage] if split in data.pairs_by_split]
        )
        if self.columns is not None and covers_rows(self.columns, rows):
            self.source = None
            return
        source: Any = trainer.precision_plugin.convert_module(
            self._restore_source(module).to(trainer.strategy.root_device)
        )
        key = CacheKey(source.sha256, rows.tokens_sha256, f"{trainer.precision} {source.model.dtype}")
        name = f"{stage}.safetensors" if self.folder else f"reference-{key.short_hash}.safetensors"
        file = (self.folder or cache_folder()) / name
        with trainer.precision_plugin.forward_context():
            ensure_cache_file(source.model, rows, file, key, data.max_tokens or DEFAULT_MAX_TOKENS, trainer)
            self.columns = load_cache_file(file, key)
            verify_cached_logps(self.columns, source.model, rows, file)
        self.source = None

    def _restore_source(self, module: Any) -> FrozenReference:
        """Return the reference with its model, made again if an earlier stage of the process has dropped it.

        Raises:
            ValueError: The files that it is made from have become another model.
        """
        if self.source is None:
            rank_zero_info("Reference: reading its model again, for rows without cached log-probabilities.")
            source = self.choice.build_source(module.loader.load_model(module.policy_path), module.loader)
            if source.sha256 == self.sha256:
                module.prepare_scoring("reference", source.model)
                self.source = source
            else:
                raise ValueError(
                    "reference Cached: its model has left memory, and cannot be made again from the files that it came "
                    "from. Run this stage with a new module (load_from_checkpoint)."
                )
        return self.source

    def forward(self, batch: Batch) -> Float[Tensor, " scored"]:
        """Return log p of every scored token in nats: from the file, or by the model if no rows are known yet."""
        if self.source:
            return cast(Tensor, self.source(batch))
        assert self.columns is not None
        return lookup_logps(self.columns, batch)


def covers_rows(columns: ColumnArrays, rows: StageRows) -> bool:
    """Return whether a file has values of every row, by ids and lengths of answers."""
    found = np.minimum(np.searchsorted(columns["ids"], rows.id_hashes), len(columns["ids"]) - 1)
    return bool(
        (columns["ids"][found] == rows.id_hashes).all() and (columns["lengths"][found] == rows.answer_lengths).all()
    )


def lookup_logps(columns: ColumnArrays, batch: Batch) -> Float[Tensor, " scored"]:
    """Return the values of every scored token of a batch.

    Raises:
        ValueError: A row is not in the file, or has answers of other lengths there.
    """
    wanted = np.array([hash_row_id(row_id) for row_id in batch.ids])
    rows = np.minimum(np.searchsorted(columns["ids"], wanted), len(columns["ids"]) - 1)
    lengths = np.reshape(batch.lengths, (len(rows), columns["lengths"].shape[1]))
    matches = (columns["ids"][rows] == wanted) & (columns["lengths"][rows] == lengths).all(-1)
    if not matches.all():
        missing = [row_id for row_id, is_match in zip(batch.ids, matches, strict=True) if not is_match]
        raise ValueError(
            f"the cache has no values for {', '.join(missing[:5])} with answers of these lengths: expected only rows "
            "of the stage that it was opened for. Run this stage as a command of its own."
        )
    starts = columns["starts"][rows]
    values = [columns["values"][start : start + n] for start, n in zip(starts, lengths.sum(-1), strict=True)]
    return torch.from_numpy(np.concatenate([columns["values"][:0], *values])).to(
        batch.targets.device, non_blocking=True
    )


def verify_cached_logps(columns: ColumnArrays, model: PreTrainedModel, rows: StageRows, file: Path) -> None:
    """Score some rows again and compare them with the file.

    Raises:
        ValueError: The model computes other values than those in the file.
    """
    sample = dict.fromkeys(np.linspace(0, len(rows.id_hashes) - 1, RECHECKED_ROWS).astype(int).tolist())
    batch = collate([rows.examples[row] for row in sample]).to(model.device)
    error = (score(model, batch).logps - lookup_logps(columns, batch)).abs().max().item()
    limit = logp_tolerance(model)
    if not error <= limit:  # also true for NaN
        raise ValueError(
            f"the cached log-probabilities in {file} cannot be used: the reference computes other values here. "
            f"Expected a difference of at most {limit:g} nats per token in {len(batch)} rows, got {error:g}. Remove "
            "the file to compute them again."
        )


def ensure_cache_file(
    model: PreTrainedModel, rows: StageRows, file: Path, key: CacheKey, max_tokens: int, trainer: L.Trainer
) -> None:
    """Create the file if it does not exist. If several runs need it at once, one creates it and the others wait.

    Args:
        model: The reference.
        rows: The rows of the stage.
        file: The file.
        key: What decides the values.
        max_tokens: Maximum tokens of a forward pass, which only a single row may exceed.
        trainer: Its processes share the work.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    is_writer = trainer.is_global_zero
    with ExitStack() as held:
        if is_writer:
            held.enter_context(WeakFileLock(f"{file}.lock"))
            held.enter_context(hold_folder(file.parent))
        if trainer.strategy.broadcast(file.exists()):
            return
        rank_zero_info(f"Reference: writing log-probabilities of {len(rows.id_hashes):,} rows to {file}.")
        with write_atomically(file) if is_writer else nullcontext(file) as temporary:
            score_rows_into_file(model, rows, trainer.strategy.broadcast(temporary), key, max_tokens, trainer)
    trainer.strategy.barrier("cached")


@dataclass(frozen=True)
class Cached(Reference):
    """Log-probabilities of a fixed reference, computed once and kept in a file; no model is in memory while training.

    Attributes:
        of: The reference; it must not change during training.
        folder: Folder of the files `fit.safetensors`, `validate.safetensors` and `test.safetensors`. By default the
            files are in ``$DPO_CACHE`` under names that depend on their content, so that every change of the reference
            or the rows leads to a file of its own.
    """

    of: Reference = field(default_factory=Copy)
    folder: str | None = None

    def build_reference(self, policy: PreTrainedModel, loader: ModelLoader) -> CachedReference:
        """Build the reference whose log-probabilities are cached.

        Raises:
            ValueError: That reference changes during training, or is none.
        """
        return CachedReference(self.build_source(policy, loader), self)

    def build_source(self, policy: PreTrainedModel, loader: ModelLoader) -> FrozenReference:
        """Build the reference with its model.

        Raises:
            ValueError: That reference changes during training, or is none.
        """
        source = self.of.build_reference(policy, loader)
        if not isinstance(source, FrozenReference):
            raise ValueError(f"--model.reference Cached: expected a reference that does not change, got {self.of}.")
        return source

    def compared_path(self, policy: str) -> str:
        """Return the path of the reference whose log-probabilities are cached."""
        return self.of.compared_path(policy)
