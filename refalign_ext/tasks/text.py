"""Text to video and text to image: tasks of Wan's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from refalign_ext.request import IMAGE_SUFFIXES, GenerationRequest
from refalign_ext.tasks.task import Task

if TYPE_CHECKING:
    from easydict import EasyDict


@dataclass(frozen=True, kw_only=True)
class TextToVideo(Task):
    """A video from a prompt, with ordinary classifier-free guidance."""

    sample_guide_scale: float = 5.0
    example_prompt: str | None = (
        "A red fox trots through fresh snow at sunrise, its breath steaming, low golden light between the firs."
    )

    family: ClassVar[str] = "t2v"
    scales: ClassVar[tuple[str, ...]] = ("sample_guide_scale",)

    def guidance(self, request: GenerationRequest) -> tuple[float, float]:
        assert request.sample_guide_scale is not None
        return request.sample_guide_scale, request.sample_guide_scale

    def configuration(self, configs: Mapping[str, EasyDict]) -> EasyDict:
        """The base's entry of Wan's as it is."""
        return configs[self.base]


@dataclass(frozen=True, kw_only=True)
class TextToImage(TextToVideo):
    """An image from a prompt: a video of one frame."""

    frame_num: int = 1
    example_prompt: str | None = (
        "A quiet harbour at dawn, wooden boats on still water, soft mist, watercolour."
    )

    family: ClassVar[str] = "t2i"
    result_suffixes: ClassVar[tuple[str, ...]] = IMAGE_SUFFIXES

    def check(self, request: GenerationRequest) -> None:
        if request.frame_num != 1:
            raise ValueError(
                f"frame_num is {request.frame_num}: task {self.name} makes one image, leave it out or give 1"
            )
        super().check(request)
