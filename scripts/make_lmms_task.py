"""Writes a task of lmms-eval: held-out generated videos or images as lossless files, their questions, and the task's YAML. The
task of videos is `rediprune_world`, that of images, for models that take no videos, `rediprune_world_image`.

The frames that a file gives are those of evaluate.py, bit for bit, so both must find the same accuracy.

Examples:
    python scripts/make_lmms_task.py --output runs/lmms-task --scenes 20
    lmms-eval eval --model huggingface --model_args pretrained=.,trust_remote_code=True,device_map=cpu --device cpu \\
        --include_path runs/lmms-task --tasks rediprune_world --batch_size 1 --output_path runs/lmms
    python scripts/make_lmms_task.py --output runs/lmms-images --kind image
"""

import argparse
import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from evaluation.questions import add_scene_arguments, check_scenes
from PIL import Image
from repository import ROOT, fail
from toy_world import TABLES_START, sample_image, sample_video
from writing import output_folder, replacing, write_whole

TEMPLATE = ROOT / "scripts" / "lmms_task"
TASKS = {"video": "rediprune_world", "image": "rediprune_world_image"}
FPS = 2


def write_lossless(path: Path, frames: np.ndarray) -> None:
    """Encodes frames (F, height, width, 3), uint8, without loss, and makes sure that they come back as they were."""
    with replacing(path) as temporary:
        with av.open(str(temporary), "w") as container:
            stream = container.add_stream("ffv1", rate=Fraction(FPS))
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "bgr0"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        with av.open(str(temporary)) as container:
            decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        if not np.array_equal(decoded, frames):
            fail(
                f"{path}: the video does not come back as it was written; another PyAV may do: pip install --upgrade av"
            )


def write_task(folder: Path, num_scenes: int, first_scene: int = TABLES_START, kind: str = "video") -> int:
    """Writes the task of held-out scenes, by default those of the tables; returns the number of questions."""
    folder = folder.resolve()
    (folder / f"{kind}s").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(num_scenes):
        if kind == "video":
            scene, file = sample_video(first_scene + number), f"videos/{number:05}.mkv"
            write_lossless(folder / file, scene.frames)
        else:
            scene, file = sample_image(first_scene + number), f"images/{number:05}.png"
            Image.fromarray(scene.frames[0]).save(folder / file)
        lines += [json.dumps({"scene": number, "file": file, **vars(question)}) for question in scene.questions]
    questions = folder / "questions.jsonl"
    write_whole(questions, "\n".join(lines) + "\n")
    write_whole(folder / "utils.py", (TEMPLATE / "utils.py").read_text())
    yaml = (TEMPLATE / "rediprune_world.yaml").read_text().replace("TASK_NAME", TASKS[kind])
    write_whole(folder / f"{TASKS[kind]}.yaml", yaml.replace("QUESTIONS_FILE", json.dumps(str(questions))))
    return len(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the folder to write; it cannot be moved")
    parser.add_argument("--kind", choices=TASKS, default="video", help="what is asked about (default: %(default)s)")
    add_scene_arguments(parser, 20)
    args = parser.parse_args(argv)
    check_scenes(parser, args)
    output_folder(args.output)
    try:
        number = write_task(args.output, args.scenes, args.first_scene, args.kind)
    except OSError as error:
        fail(f"--output {args.output}: {error}")
    print(f"wrote {number} questions about {args.scenes} {args.kind}s to {args.output}")


if __name__ == "__main__":
    main()
