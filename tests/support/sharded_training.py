"""Trains small models in several processes: run once per process, with the variables that torchrun sets.

    python -m tests.support.sharded_training cases.json folder

Every case is trained, validated and predicted with; the first process writes what came of it to folder/name.pt.
"""

import json
import sys
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.loggers.logger import Logger

from dpo import DPO, HHRLHF, SFT, losses
from dpo.models.checkpoint_io import AtomicCheckpointIO
from dpo.models.lora import LoRA, save_model_or_adapter
from dpo.models.reference import Moving
from dpo.models.sharding import gather_model, whole_tensor
from dpo.training.precomputed import Cached
from dpo.training.sharding import FSDP2

ADAPTERS = {"lora": LoRA(r=2)}
REFERENCES = {"cached": Cached(), "moving": Moving(alpha=0.5, tau=1)}
LOSSES = {"simpo": losses.SimPO()}


class Kept(Logger):
    """Keeps everything that is logged."""

    name = version = "kept"

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(dict(metrics))

    def log_hyperparams(self, *_: object, **__: object) -> None:
        pass


# By the names of newer and older torch.
COLLECTIVES = {
    "all_gather_single": "gather",
    "all_gather_into_tensor": "gather",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_reduce": "all_reduce",
}


class Gradients(L.Callback):
    """Keeps the gradient of every optimizer step before it is clipped, whole, and counts collectives up to there."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.micro_batches: list[int] = []
        self.counts: list[Counter[str]] = []
        self.seen: Counter[str] = Counter()
        for name in COLLECTIVES:
            if function := getattr(dist, name, None):
                setattr(dist, name, partial(self._count, name, function))

    def _count(self, name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen[COLLECTIVES[name]] += 1
        return function(*args, **kwargs)

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.clear()
        self.micro_batches.append(len(batch.micro_batches))

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        self.counts.append(self.seen.copy())
        named = module.policy.named_parameters()
        self.steps.append({name: whole_tensor(p.grad).clone() for name, p in named if p.grad is not None})


def train(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train one case and return what came of it."""
    L.seed_everything(0, verbose=False)
    options = dict(case.get("model", {}))
    for name, known in (("adapter", ADAPTERS), ("reference", REFERENCES), ("loss", LOSSES)):
        if name in options:
            options[name] = known[options[name]]
    options["optimizer"] = lambda parameters: torch.optim.AdamW(parameters, 1e-3, eps=1e-3, fused=case.get("fused"))
    module = (SFT if case.get("stage") == "sft" else DPO)(**options)
    data = HHRLHF(**case["data"])
    logger, gradients = Kept(), Gradients()
    strategy = case.get("strategy", "auto")
    trainer = L.Trainer(
        accelerator="cpu",
        devices=int(case.get("devices", 1)),
        strategy=FSDP2(**strategy) if isinstance(strategy, dict) else strategy,
        logger=logger,
        callbacks=[gradients],
        plugins=[AtomicCheckpointIO()],
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        gradient_clip_val=0.5,
        default_root_dir=folder,
        **{"max_steps": 3, "log_every_n_steps": 1, **case.get("trainer", {})},
    )
    trainer.fit(module, data, ckpt_path=case.get("resume"))
    trainer.save_checkpoint(folder / f"{case['name']}.ckpt")
    policy = gather_model(module.policy)
    if trainer.is_global_zero:
        save_model_or_adapter(module.adapter.model_to_export(policy), folder / case["name"])
    rows = [row for step in trainer.predict(module, data) or () for row in step] if case.get("predict") else []
    shares: list[Any] = [None] * trainer.world_size
    if trainer.world_size > 1:
        dist.all_gather_object(shares, rows)
    return {
        "logged": logger.rows,
        "gradients": gradients.steps,
        "collectives": gradients.counts,
        "micro_batches": gradients.micro_batches,
        "grad_norm": module.grad_norm,
        "weights": dict(policy.state_dict()),
        "predictions": {row["id"]: row for share in (shares if trainer.world_size > 1 else [rows]) for row in share},
    }


def main(cases: Path, folder: Path) -> None:
    """Train all cases."""
    warnings.filterwarnings("ignore")
    for case in json.loads(cases.read_text()):
        result = train(case, folder)
        if not dist.is_initialized() or dist.get_rank() == 0:
            torch.save(result, folder / f"{case['name']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
