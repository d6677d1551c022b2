"""What a training run can choose from: kinds of data, and modules that train beside the DiT. A new one is a row here."""

from __future__ import annotations

from refalign_ext.sprites.ablations.teacher_input import TEACHER_INPUT
from refalign_ext.sprites.training_data import SPRITE_DATA
from refalign_ext.training.clip_data import CLIP_DATA
from refalign_ext.training.data_source import DataSource
from refalign_ext.training.extra_module import ExtraModule

DATA_SOURCES: tuple[DataSource, ...] = (CLIP_DATA, SPRITE_DATA)
"""The first that accepts a configuration is used."""
EXTRA_MODULES: tuple[ExtraModule, ...] = (TEACHER_INPUT,)
