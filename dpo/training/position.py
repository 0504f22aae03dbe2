"""Where a run stands: what a checkpoint says of Lightning's loops, as a function of the optimizer steps taken.

Lightning saves its counters as they are at the moment of saving. Restored, they repeat data once a run has been stopped
at the end of an epoch and then again, and lose the gradients of an accumulation window that was half done. Saved as
they are right after the last optimizer step, they name one place among the data.
"""

from typing import Any

EPOCH_LOOP_PREFIX = "epoch_loop."
OPTIMIZER_PROGRESS_KEY = f"{EPOCH_LOOP_PREFIX}automatic_optimization.optim_progress"


def loop_state_after_step(loop_state: dict[str, Any], accumulate: int) -> dict[str, Any]:
    """The state of a fit loop right after its last optimizer step.

    Args:
        loop: State of Lightning's fit loop at any moment of training, or what this function made of one.
        accumulate: Batches per optimizer step.

    Returns:
        The state with other counters. Batches of an unfinished accumulation window count as not read; an epoch counts
        as ended with its last step.
    """
    epochs, batches, steps = (
        loop_state["epoch_progress"]["total"],
        loop_state[f"{EPOCH_LOOP_PREFIX}batch_progress"],
        loop_state[OPTIMIZER_PROGRESS_KEY],
    )
    ended, taken = epochs["processed"], steps["optimizer"]["step"]["total"]["completed"]
    read = batches["total"]["ready"]
    position = 0
    if epochs["started"] > ended:  # inside an epoch
        position = steps["optimizer"]["step"]["current"]["completed"] * accumulate
        read += position - batches["current"]["ready"]
    if batches["is_last_batch"] and position == batches["current"]["ready"]:
        ended, position = ended + 1, 0
    in_epoch = position // accumulate
    begun = ended + (position > 0)
    # Inside an epoch the last batch is not completed: Lightning completes it on resuming, and validates no second time.
    pending = int(position > 0)
    epoch = {"ready": begun, "started": begun, "processed": ended, "completed": ended}
    batch = {
        name: {"ready": count, "started": count, "processed": count, "completed": count - pending}
        for name, count in (("total", read), ("current", position))
    }
    counted = {
        name: {"ready": count, "started": count, "completed": count}
        for name, count in (("total", taken), ("current", in_epoch))
    }
    plain = {name: {"ready": count["ready"], "completed": count["ready"]} for name, count in counted.items()}
    none = dict.fromkeys(("ready", "started", "processed", "completed"), 0)
    return {
        **loop_state,
        f"{EPOCH_LOOP_PREFIX}val_loop.batch_progress": {"total": none, "current": none, "is_last_batch": False},
        "epoch_progress": {"total": epoch, "current": epoch},
        f"{EPOCH_LOOP_PREFIX}batch_progress": {**batch, "is_last_batch": False},
        f"{EPOCH_LOOP_PREFIX}scheduler_progress": plain,
        f"{EPOCH_LOOP_PREFIX}state_dict": {"_batches_that_stepped": taken - pending},
        OPTIMIZER_PROGRESS_KEY: {"optimizer": {"step": plain, "zero_grad": counted}},
        "state_dict": {**loop_state["state_dict"], "combined_loader": [{"position": position}]},
    }
