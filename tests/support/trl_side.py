"""TRL's trainer as its users run it: from dialogues to what it logs. No line of ours takes part."""

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

MARK = "\n\nAssistant:"

Row = tuple[str, str]  # the chosen and the rejected dialogue
Log = list[dict[str, float]]


def columns(rows: Sequence[Row]) -> Dataset:
    """The format with an explicit prompt, which ends with the last mark; answers keep their leading space."""
    ends = [chosen.rindex(MARK) + len(MARK) for chosen, _ in rows]
    return Dataset.from_list(
        [
            {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}
            for end, (chosen, rejected) in zip(ends, rows, strict=True)
        ]
    )


def train(
    folder: Path, policy: Path, reference: Path | None, rows: Sequence[Row], held_out: Sequence[Row], **options: object
) -> tuple[Log, Log]:
    """Train on `rows` in their order; what is logged of every step, and of every evaluation on `held_out`.

    An evaluation is one batch: TRL's means are means over batches, however many pairs or tokens each of them has.
    """
    evaluation = {"eval_strategy": "steps", "per_device_eval_batch_size": len(held_out)} if held_out else {}
    config = DPOConfig(
        output_dir=str(folder),
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        **evaluation,
        **options,
    )
    trainer = DPOTrainer(
        model=str(policy),
        ref_model=AutoModelForCausalLM.from_pretrained(reference) if reference else None,
        args=config,
        train_dataset=columns(rows),
        eval_dataset=columns(held_out) if held_out else None,
        processing_class=AutoTokenizer.from_pretrained(policy),
    )
    trainer.train()
    log = trainer.state.log_history
    return [entry for entry in log if "loss" in entry], [entry for entry in log if "eval_loss" in entry]
