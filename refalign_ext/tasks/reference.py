"""Reference to video: RefAlign on a text-to-video model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from refalign_ext.request import GenerationRequest, Reference
from refalign_ext.tasks.task import ConditionEncoders, Conditions, Task

if TYPE_CHECKING:
    from easydict import EasyDict


@dataclass(frozen=True, kw_only=True)
class ReferenceToVideo(Task):
    """A video of the subjects on reference pictures; without references it is ordinary text to video.

    The defaults are those of the paper's section on inference: eq. 5 with 5.0 and 7.5, 50 Euler steps, 81 frames of
    832x480 at 16 fps; shift 5.

    Attributes:
        teacher: the foundation model that training aligns the references with.
        ref_guide_scale, text_guide_scale: defaults of the scales in eq. 5.
    """

    size: tuple[int, int] = (832, 480)
    sample_solver: str = "euler"
    ref_guide_scale: float = 5.0
    text_guide_scale: float = 7.5
    teacher: str = "dinov3-l"

    family: ClassVar[str] = "r2v"
    needs: ClassVar[tuple[str, ...]] = ("references",)
    scales: ClassVar[tuple[str, ...]] = ("ref_guide_scale", "text_guide_scale")
    any_size: ClassVar[bool] = True
    title: ClassVar[str] = "RefAlign"

    def open(self, request: GenerationRequest) -> GenerationRequest:
        """The request with its references as the VAE sees them: upright, on white, at the video's size."""
        from refalign_ext.references import prepare_reference

        prepared = tuple(
            Reference(
                prepare_reference(item.image, request.size, role=item.role, matte=request.matte), item.role
            )
            for item in request.references
        )
        return replace(request, references=prepared)

    def prepare(self, request: GenerationRequest, encoders: ConditionEncoders) -> Conditions:
        """Texts, and each reference alone as a video of a single frame."""
        from refalign_ext.references import reference_to_tensor

        conditions = super().prepare(request, encoders)
        if not request.references:
            return conditions
        import torch

        frames = [reference_to_tensor(item.image).unsqueeze(1) for item in request.references]  # [3, 1, H, W]
        latents = torch.cat(encoders.encode_videos(frames), dim=1)  # [C, M, h, w]
        return replace(conditions, references=latents.float())

    def guidance(self, request: GenerationRequest) -> tuple[float, float]:
        # Without references "image" says nothing beyond "null", and eq. 5 becomes ordinary guidance.
        assert request.ref_guide_scale is not None and request.text_guide_scale is not None
        scale = request.ref_guide_scale if request.references else request.text_guide_scale
        return scale, request.text_guide_scale

    def configuration(self, configs: Mapping[str, EasyDict]) -> EasyDict:
        config = super().configuration(configs)
        config.__name__ = f"Config: RefAlign R2V {self.name.removeprefix('r2v-')}"
        config.teacher = self.teacher
        return config
