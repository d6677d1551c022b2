"""What a kind of training data gives to a run. A new kind is a `DataSource` in a file of its own and a row in a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from refalign_ext.config import TrainConfig
from refalign_ext.data.batch import Source
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.encoders import Encoders, EncodeText

if TYPE_CHECKING:
    from refalign_ext.training.run_log import RunLog
    from refalign_ext.training.trainer import Trainer

Preview = Callable[[int], dict[str, float]]
"""Shows what the model generates after a step and returns values to log; all ranks call it together."""


@dataclass(frozen=True)
class TrainingData:
    """The samples of a run."""

    training: Source
    validation: Source | None  # None: none is asked for
    encode_text: EncodeText  # out of a cache where there is one


class DataSource(Protocol):
    """One kind of training data."""

    def accepts(self, config: TrainConfig) -> bool:
        """Whether the configuration asks for this kind."""

    def complete(self, config: TrainConfig) -> TrainConfig:
        """The configuration with what the data decides; ValueError for data that cannot be opened."""

    def open(self, config: TrainConfig, encoders: Encoders, parallel: Parallel) -> TrainingData:
        """The samples of this rank; ValueError if they do not fit. Nothing is written before `Source.prepare`."""

    def make_preview(self, trainer: Trainer, encoders: Encoders, log: RunLog) -> Preview | None:
        """What shows the model of a run with `preview_every`; None: nothing can be shown."""


def choose_data_source(config: TrainConfig, sources: Sequence[DataSource]) -> DataSource:
    """The first source that accepts the configuration; ValueError if none does."""
    for source in sources:
        if source.accepts(config):
            return source
    raise ValueError(f"--task {config.task} needs --data MANIFEST.jsonl (docs/data.md)")
