"""What a stage measures: means of metrics over training, validation and test, and where they are logged."""

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from dpo.data.sampler import Step
from dpo.models.batch import Batch
from dpo.training.inference import PolicyModule
from dpo.training.metrics import DerivedMetric, MetricMeans
from dpo.training.scored_pairs import PairListener


class MeasuredModule(PolicyModule):
    """A policy whose losses and metrics are measured.

    Attributes:
        metric_names: Metrics that `losses` adds to the means.
        derived_metrics: Metrics computed from a mean.
        pair_listeners: Called with the values of every micro-batch of pairs, in training and in evaluation.
    """

    metric_names: tuple[str, ...]
    derived_metrics: ClassVar[Mapping[str, DerivedMetric]] = {}

    def __init__(self) -> None:
        """Start with empty means."""
        super().__init__()
        self.train_means, self.val_means, self.test_means = (
            MetricMeans(self.metric_names, self.derived_metrics) for _ in range(3)
        )
        self.pair_listeners: list[PairListener] = []

    @abstractmethod
    def losses(self, batch: Batch, means: MetricMeans) -> Float[Tensor, " examples"]:
        """Return the loss of every example of a micro-batch, and add its metrics to the means."""

    def log_means(self, stage: str, means: MetricMeans, extra: Mapping[str, float] = MappingProxyType({})) -> None:
        """Log means under the name of a stage, at the number of optimizer steps taken, and reset them."""
        measured = {name: value.item() for name, value in means.compute().items()}
        means.reset()
        self.log_values({f"{stage}/{name}": value for name, value in {**measured, **extra}.items()})

    def log_values(self, values: dict[str, float]) -> None:
        """Log values, which are the same in all processes, at the number of optimizer steps taken."""
        fits = self.trainer.state.fn == "fit"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*you have no logger configured|You called `self.log", UserWarning)
            # In a fit, Lightning would count batches where we count optimizer steps.
            self.log_dict(values, logger=not fits, sync_dist=True)
        for logger in self.loggers if fits and not self.trainer.sanity_checking else ():
            logger.log_metrics(values, step=self.trainer.global_step)

    def validation_step(self, step: Step, batch_idx: int) -> None:
        """Measure examples without a gradient."""
        for batch in step.micro_batches:
            self.losses(batch, self.val_means)

    def on_validation_epoch_end(self) -> None:
        """Log the means over the whole validation split."""
        self.log_means("val", self.val_means)

    def test_step(self, step: Step, batch_idx: int) -> None:
        """Measure examples without a gradient."""
        for batch in step.micro_batches:
            self.losses(batch, self.test_means)

    def on_test_epoch_end(self) -> None:
        """Log the means over the whole test split."""
        self.log_means("test", self.test_means)
