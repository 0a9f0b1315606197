"""Videos, images and folders of frames as the command-line tools take them."""

import argparse
from pathlib import Path

from PIL import Image
from repository import code_module, fail


def add_media_arguments(parser: argparse.ArgumentParser) -> None:
    media = parser.add_mutually_exclusive_group(required=True)
    media.add_argument("--video", help="video file, or its http or https URL")
    media.add_argument("--image", nargs="+", help="one or more image files, or http or https URLs")
    media.add_argument("--frames", help="folder of images that are the frames of a video, in the order of their names")
    parser.add_argument("--num-frames", type=int, help="frames sampled from a video (default: as the repository says)")


def read_media(args) -> dict:
    """The media as the processor takes them."""
    if args.video:
        return {"videos": [args.video]}
    if args.image:
        return {"images": [open_image(path) for path in args.image]}
    folder = Path(args.frames)
    if not folder.is_dir():
        fail(f"--frames {args.frames}: no such folder")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in Image.registered_extensions())
    if not paths:
        fail(f"--frames {args.frames}: the folder holds no images")
    return {"videos": [[open_image(path) for path in paths]]}


def open_image(place):
    """An image as the processor reads it: RGB and upright."""
    download = code_module("inputs_download").download
    try:
        return code_module("inputs_media").read_image(str(place), "it", download)
    except (OSError, ValueError) as error:
        fail(f"{place} cannot be read as an image: {error}")


def chat_parts(media: dict) -> list:
    """The parts of a chat that stand for the media."""
    kind = "video" if "videos" in media else "image"
    return [{"type": kind}] * len(media[f"{kind}s"])


def chat_prompt(processor, media: dict, question: str) -> str:
    """The media and then the question as a chat, with one placeholder for each medium."""
    content = [*chat_parts(media), {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def process(args, processor, media: dict, question: str, keep_ratio=None, **more):
    """The model's inputs for a question about the media, which the processor gets `more` arguments for."""
    options = {} if args.num_frames is None or "images" in media else {"num_frames": args.num_frames}
    prompt = chat_prompt(processor, media, question)
    if "images" in media:
        media = {"images": [media["images"]]}  # those of one prompt, as a chat passes them: LLaVA-OneVision counts them
    return processor(text=prompt, keep_ratio=keep_ratio, return_tensors="pt", **media, **options, **more)
