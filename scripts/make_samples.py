"""Writes the sample videos and images that the README asks about, from held-out scenes, with their questions and answers.

Example:
    python scripts/make_samples.py --output samples
"""

import argparse
import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image
from repository import fail
from toy_world import FRAMES_PER_SECOND, HELD_OUT_START, sample_image, sample_video
from writing import output_folder, replacing, write_whole

SCALE = 4  # the world is 96 pixels wide: enlarged, so that a person sees something
HOLD = 6  # video frames for each frame of the world
FPS = HOLD * FRAMES_PER_SECOND


def write_video(path: Path, frames: np.ndarray) -> None:
    """Encodes frames (F, height, width, 3), uint8, as H.264."""
    frames = frames.repeat(HOLD, 0).repeat(SCALE, 1).repeat(SCALE, 2)
    with replacing(path) as temporary, av.open(str(temporary), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "16", "preset": "slow"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent.parent / "samples")
    parser.add_argument("--videos", type=int, default=3)
    parser.add_argument("--images", type=int, default=2)
    args = parser.parse_args(argv)
    output_folder(args.output)
    try:
        number = write_samples(args)
    except OSError as error:
        fail(f"--output {args.output}: {error}")
    print(f"wrote {number} files and questions.json to {args.output}")


def write_samples(args) -> int:
    """Writes all files; returns how many videos and images there are."""
    index = {}
    for number in range(args.videos):
        scene = sample_video(HELD_OUT_START + number)
        name = f"video-{number + 1}.mp4"
        write_video(args.output / name, scene.frames)
        index[name] = [vars(question) for question in scene.questions]
    for number in range(args.images):
        scene = sample_image(HELD_OUT_START + number)
        name = f"image-{number + 1}.png"
        Image.fromarray(scene.frames[0].repeat(SCALE, 0).repeat(SCALE, 1)).save(args.output / name)
        index[name] = [vars(question) for question in scene.questions]
    write_whole(args.output / "questions.json", json.dumps(index, indent=2) + "\n")
    return len(index)


if __name__ == "__main__":
    main()
