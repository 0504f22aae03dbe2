"""Numbers that are not finite must not reach the weights.

Takes the losses of the pairs of an optimizer step and its gradient norm; raises with the ids of the pairs that are to
blame. Knows nothing of models.
"""

from torch import Tensor


class NonFinite(RuntimeError):
    """A loss or a gradient is not a finite number."""


class Watch:
    """What has gone into the gradient since the last step. Nothing waits for the device before `check`."""

    def __init__(self) -> None:
        self.pairs: list[tuple[tuple[str, ...], Tensor]] = []

    def add(self, ids: tuple[str, ...], losses: Tensor) -> None:
        """Remember the losses of these pairs."""
        self.pairs.append((ids, losses.detach()))

    def check(self, step: int, grad_norm: Tensor) -> None:
        """Forget what was added, if all of it is finite.

        Raises:
            NonFinite: It is not, or the norm of its gradient is not; with the ids.
        """
        finite = grad_norm.isfinite()
        for _, losses in self.pairs:
            finite = finite & losses.isfinite().all()
        if not finite:
            raise NonFinite(self._message(step))
        self.pairs.clear()

    def _message(self, step: int) -> str:
        every = [
            (row, bool(good)) for ids, losses in self.pairs for row, good in zip(ids, losses.isfinite(), strict=True)
        ]
        bad = [row for row, good in every if not good]
        return (
            f"step {step}: the {'loss' if bad else 'gradient'} is not finite for the pairs "
            f"{', '.join(bad or [row for row, _ in every])}. The weights are those before this step and the last "
            "checkpoint is intact. Try a smaller --optimizer.lr, --trainer.precision 32-true or bf16-mixed, or look at "
            "these rows."
        )
