"""The position of a run among its data, as a function of the optimizer steps taken.

Lightning saves its loop counters as they are at the moment of saving. Restored, they repeat data once a run has been
stopped at the end of an epoch and then again, and they lose the gradients of an accumulation window that was half
done. Checkpoints of ours hold the counters as they are right after the last optimizer step: exactly one position.
"""

from typing import Any

import lightning as L

EPOCH_LOOP_PREFIX = "epoch_loop."
OPTIMIZER_PROGRESS_KEY = f"{EPOCH_LOOP_PREFIX}automatic_optimization.optim_progress"


def loop_state_after_step(loop_state: dict[str, Any], accumulate: int) -> dict[str, Any]:
    """Return the state of Lightning's fit loop right after its last optimizer step.

    Args:
        loop_state: State of the fit loop at any moment of training, or what this function made of one.
        accumulate: Batches per optimizer step.

    Returns:
        The state with other counters: batches of an unfinished accumulation window count as not read, and an epoch
        has ended with its last step.
    """
    epochs = loop_state["epoch_progress"]["total"]
    batches = loop_state[f"{EPOCH_LOOP_PREFIX}batch_progress"]
    steps = loop_state[OPTIMIZER_PROGRESS_KEY]["optimizer"]["step"]
    epochs_ended = epochs["processed"]
    batches_read = batches["total"]["ready"]
    position = 0  # batches read of the epoch that has begun
    if batches["current"]["ready"]:
        # Not `processed`: Lightning counts an epoch that a stop has cut short as processed, too.
        epochs_ended = epochs["started"] - 1
        position = steps["current"]["completed"] * accumulate
        batches_read += position - batches["current"]["ready"]
        if batches["is_last_batch"] and position == batches["current"]["ready"]:
            epochs_ended += 1
            position = 0
    # The last batch is marked as not completed, so that Lightning completes it on resuming and does not validate twice.
    pending = int(position > 0)
    epoch = _counters(epochs_ended + pending, processed=epochs_ended, completed=epochs_ended)
    step = {"total": _counters(steps["total"]["completed"]), "current": _counters(position // accumulate)}
    batch = {
        "total": _counters(batches_read, completed=batches_read - pending),
        "current": _counters(position, completed=position - pending),
        "is_last_batch": False,
    }
    not_begun = {"total": _counters(0), "current": _counters(0), "is_last_batch": False}
    return {
        **loop_state,
        "epoch_progress": {"total": epoch, "current": epoch},
        f"{EPOCH_LOOP_PREFIX}batch_progress": batch,
        f"{EPOCH_LOOP_PREFIX}val_loop.batch_progress": not_begun,
        f"{EPOCH_LOOP_PREFIX}scheduler_progress": step,
        f"{EPOCH_LOOP_PREFIX}state_dict": {"_batches_that_stepped": steps["total"]["completed"] - pending},
        OPTIMIZER_PROGRESS_KEY: {"optimizer": {"step": step, "zero_grad": step}},
        "state_dict": {**loop_state["state_dict"], **_loader_states(loop_state["state_dict"], position)},
    }


def _loader_states(saved: dict[str, Any], position: int) -> dict[str, Any]:
    """Return the states of the loaders, with the position in those of `StepLoader`; a user's own stay as they are."""
    if "combined_loader" not in saved:
        return {}
    states = [{"position": position} if set(state) == {"position"} else state for state in saved["combined_loader"]]
    return {"combined_loader": states}


def _counters(ready: int, processed: int | None = None, completed: int | None = None) -> dict[str, int]:
    """Return Lightning's four counters of one kind of event."""
    return {
        "ready": ready,
        "started": ready,
        "processed": ready if processed is None else processed,
        "completed": ready if completed is None else completed,
    }


def is_logged_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Return whether an optimizer step that is to be logged has just ended with this batch."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and trainer.global_step % log_interval(trainer) == 0


def log_interval(trainer: L.Trainer) -> int:
    """Return the number of optimizer steps from one logged step to the next."""
    return trainer.log_every_n_steps  # type: ignore[attr-defined,no-any-return]  # Lightning does not declare it
