"""Where the tokens of a reference-to-video batch lie: video, then references, then padding.

One `TokenLayout` is the single truth for the text-skip mask, the feature taps, the crop of the output and, on several
devices, for which rank holds what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleLayout:
    """One sample: `frames` latent frames of video and `references` reference frames of `height` x `width` tokens."""

    frames: int
    references: int
    height: int
    width: int

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one latent frame, and so of one reference."""
        return self.height * self.width

    @property
    def video_tokens(self) -> int:
        """Tokens of the video, which come first."""
        return self.frames * self.tokens_per_frame

    @property
    def reference_tokens(self) -> int:
        """Tokens of all references, which come after the video."""
        return self.references * self.tokens_per_frame

    @property
    def tokens(self) -> int:
        """Tokens of the sample without padding."""
        return self.video_tokens + self.reference_tokens


@dataclass(frozen=True)
class TokenLayout:
    """All samples of a batch, padded to `seq_len` tokens."""

    samples: tuple[SampleLayout, ...]
    seq_len: int

    @classmethod
    def of(
        cls,
        latents: Sequence[Tensor],
        references: Sequence[Tensor],
        patch_size: tuple[int, int, int],
        multiple: int = 1,
    ) -> TokenLayout:
        """Layout of latents [C, F, H, W] with references [C, M, H, W] under a patch of (1, height, width).

        Args:
            multiple: `seq_len` is rounded up to a multiple of it (the sequence-parallel size).

        Raises:
            ValueError: if there are no samples or no frames, or counts or sizes do not fit together or do not divide
                by the patch.
        """
        assert multiple > 0
        if not latents or len(latents) != len(references):
            raise ValueError(
                f"the batch is empty or uneven: {len(latents)} latents, references for {len(references)} samples"
            )
        if patch_size[0] != 1:
            raise ValueError(
                f"patch size {tuple(patch_size)} merges frames: references need a temporal patch of 1"
            )
        samples = []
        for index, (video, refs) in enumerate(zip(latents, references)):
            shapes = f"sample {index}: latents {tuple(video.shape)} and references {tuple(refs.shape)}"
            fits = video.ndim == refs.ndim == 4 and video.shape[0] == refs.shape[0]
            if not fits or video.shape[2:] != refs.shape[2:]:
                raise ValueError(f"{shapes} must be [C, F, H, W] and [C, M, H, W] of the same C, H and W")
            if not all(video.shape[1:]):
                raise ValueError(f"{shapes} hold no video: give at least one frame")
            height, width = video.shape[2:]
            if height % patch_size[1] or width % patch_size[2]:
                raise ValueError(f"{shapes} do not divide by the patch {tuple(patch_size)}")
            samples.append(
                SampleLayout(video.shape[1], refs.shape[1], height // patch_size[1], width // patch_size[2])
            )
        longest = max(sample.tokens for sample in samples)
        return cls(tuple(samples), -(-longest // multiple) * multiple)

    @property
    def most_video_tokens(self) -> int:
        """Token at which the longest video of the batch ends."""
        return max(sample.video_tokens for sample in self.samples)

    @property
    def is_uniform(self) -> bool:
        """True if the video ends at the same token in every sample."""
        return len({sample.video_tokens for sample in self.samples}) == 1

    def video_token_mask(self, device: torch.device | str = "cpu") -> Tensor:
        """[B, seq_len] boolean: True on video tokens; False on references and padding."""
        ends = torch.tensor([sample.video_tokens for sample in self.samples], device=device)
        return torch.arange(self.seq_len, device=device) < ends[:, None]

    def tokens_of_rank(self, rank: int, ranks: int) -> range:
        """Positions that rank `rank` of `ranks` holds when every sample is cut into equal parts."""
        assert self.seq_len % ranks == 0
        share = self.seq_len // ranks
        return range(rank * share, (rank + 1) * share)

    def reference_spans(self, held: range) -> tuple[tuple[int, int], ...]:
        """Per sample (first, count): which of its reference tokens, flat over references, lie in `held`; else (0, 0)."""
        spans = []
        for sample in self.samples:
            start, stop = max(held.start, sample.video_tokens), min(held.stop, sample.tokens)
            spans.append((start - sample.video_tokens, stop - start) if stop > start else (0, 0))
        return tuple(spans)

    def cut_references(self, tokens: Tensor, held: range) -> Tensor:
        """The reference tokens of a rank's tokens [B, len(held), d], sample after sample: [S, d]; S may be 0."""
        rows = []
        for row, sample, (first, count) in zip(tokens, self.samples, self.reference_spans(held), strict=True):
            begin = sample.video_tokens + first - held.start if count else 0
            rows.append(row[begin : begin + count])
        return torch.cat(rows)

    def require_one_grid(self) -> None:
        """Raises ValueError unless all samples have the same token grid, as `gather_references` needs."""
        grids = {(sample.height, sample.width) for sample in self.samples}
        if len(grids) > 1:
            raise ValueError(
                f"reference features of different grids {sorted(grids)} cannot share a batch: bucket by size"
            )

    def gather_references(self, tokens: Tensor) -> Tensor:
        """The reference tokens [B, M, N, d] out of tokens [B, seq_len, d]; missing references are zeros."""
        self.require_one_grid()
        first, most = self.samples[0], max(sample.references for sample in self.samples)
        per_frame = first.tokens_per_frame
        if all(sample == first for sample in self.samples):
            span = tokens[:, first.video_tokens : first.tokens]  # [B, M*N, d]
            return span.unflatten(1, (most, per_frame))
        rows = []
        for row, sample in zip(tokens, self.samples, strict=True):
            span = row[sample.video_tokens : sample.tokens].unflatten(0, (sample.references, per_frame))
            rows.append(torch.cat([span, span.new_zeros(most - sample.references, *span.shape[1:])]))
        return torch.stack(rows)  # [B, M, N, d]
