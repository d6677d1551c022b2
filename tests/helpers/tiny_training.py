"""A trainer of a tiny real model on random samples, alone or as one of many ranks."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from refalign_ext.backbone import ReferenceBackbone, WanModel
from refalign_ext.config import AlignmentConfig, TrainConfig
from refalign_ext.data.batch import EncodedSample
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.distributed.parallelize import parallelize
from refalign_ext.projectors import ReferenceProjectors
from refalign_ext.training.trainer import Trainer, TrainerHooks

DEPTH, TEACHER_DIM, TEXT_DIM = 2, 12, 8
CPU = torch.device("cpu")
BASE = TrainConfig(
    recipe="test",
    task="r2v-tiny",
    from_scratch=True,
    alignment=AlignmentConfig(depth=DEPTH, teacher="dinov3-tiny", weight=0.5),
    batch_size=2,
    steps=6,
    learning_rate=1e-3,
    warmup_steps=2,
    schedule="linear",
    ema_decay=0.9,
    precision="fp32",
    save_every=3,
    validation_clips=4,
    drop_text=0.2,
    drop_references=0.2,
    drop_both=0.1,
)


def change(config: TrainConfig = BASE, **changes: object) -> TrainConfig:
    alignment = {key: changes.pop(key) for key in tuple(changes) if key in vars(config.alignment)}
    return dataclasses.replace(
        config, alignment=dataclasses.replace(config.alignment, **alignment), **changes
    )


class Source:
    """Samples of one size with some number of references in turn, from their position alone."""

    def __init__(
        self,
        with_features: bool = True,
        references: tuple[int, ...] = (1, 3, 0, 2),
        size: tuple[int, int, int] = (2, 4, 4),
    ) -> None:
        self.with_features, self.references, self.size = with_features, references, size
        self.asked: list[tuple[int, range]] = []

    def prepare(self) -> None:
        pass

    def samples(self, step: int, indices: range) -> list[EncodedSample]:
        self.asked.append((step, indices))
        return [self.sample(index) for index in indices]

    def sample(self, index: int) -> EncodedSample:
        generator = torch.Generator().manual_seed(index)
        references = self.references[index % len(self.references)]
        frames, height, width = self.size

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        tokens = height * width // 4
        features = normal(references, tokens, TEACHER_DIM) if self.with_features else None
        return EncodedSample(
            f"sample-{index}",
            f"prompt {index}",
            normal(4, frames, height, width),
            normal(4, references, height, width),
            features,
        )


def encode_text(prompts: list[str]) -> list[Tensor]:
    """Features that differ between prompts, of differing lengths."""
    return [
        torch.randn(1 + len(prompt), TEXT_DIM, generator=torch.Generator().manual_seed(sum(prompt.encode())))
        for prompt in prompts
    ]


def build(
    config: TrainConfig,
    source: object | None = None,
    parallel: Parallel | None = None,
    *,
    heads: int = 2,
    dim: int = 24,
    hooks: TrainerHooks | None = None,
) -> Trainer:
    """The same weights on every rank and for any number of ranks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = WanModel(
            patch_size=(1, 2, 2),
            text_len=16,
            in_dim=4,
            dim=dim,
            ffn_dim=32,
            freq_dim=16,
            text_dim=TEXT_DIM,
            out_dim=4,
            num_heads=heads,
            num_layers=3,
        )
        nn.init.normal_(model.head.head.weight, std=0.1)
        projectors = ReferenceProjectors(dim, TEACHER_DIM, DEPTH) if config.alignment.weight else None
    source = Source(bool(config.alignment.weight)) if source is None else source
    parallel = Parallel.single(CPU) if parallel is None else parallel
    backbone = ReferenceBackbone(model.train())
    trained = parallelize(backbone, projectors, parallel, config)
    return Trainer(config, backbone, trained, source, encode_text, parallel, validation=source, hooks=hooks)
