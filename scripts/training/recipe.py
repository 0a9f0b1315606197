"""How long and with what a family is trained: all that is chosen for it, in one place."""

from dataclasses import dataclass

from toy_world import HELD_OUT_START

TRAINING_SCENES = range(HELD_OUT_START)
FOLLOWED_SCENES = range(HELD_OUT_START, HELD_OUT_START + 192)  # the final evaluation uses those after them
SHARD = 2000  # scenes in one file of cached features


@dataclass(frozen=True)
class Recipe:
    """
    Attributes:
        vision_steps, vision_peak: steps of the vision stage, and the highest learning rate in it.
        vision_videos, vision_images: scenes of each kind in one of its steps.
        language_steps, language_peak: the same of the language stage.
        frame_steps: how many of its steps, the first ones, are about single frames.
        video_shards, image_shards: how many shards of training scenes there are of a kind.
        shard_steps: steps before the next shard is added.
        videos, images, frames: scenes in one step of the language stage. Small batches: how soon answers turn right depends on
            the number of steps more than on the number of questions in each.
        position_weight: weight of the loss that asks visual tokens where they are.
    """

    vision_steps: int = 800
    vision_peak: float = 2e-3
    vision_videos: int = 5
    vision_images: int = 2
    language_steps: int = 6000
    language_peak: float = 1.5e-3
    frame_steps: int = 1200
    video_shards: int = 4
    image_shards: int = 3
    shard_steps: int = 1200
    videos: int = 4
    images: int = 3
    frames: int = 8
    position_weight: float = 0.2
