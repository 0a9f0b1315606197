"""Video files to frames, with PyAV: its wheels carry their own FFmpeg, so a path works wherever `pip install av` does."""

import os
from typing import Callable, Optional

import numpy as np
from transformers.video_utils import VideoMetadata

try:
    import av
except ImportError:
    av = None


def frame_indices(total: int, num_frames: Optional[int], fps: Optional[float], source_fps: Optional[float]) -> np.ndarray:
    """
    Evenly spaced frames of a video of `total` frames: `fps` of them a second where `fps` is given, else `num_frames`, else
    all; never more than there are.

    Raises:
        ValueError: both were given, one is not positive, or `fps` was given for a video of unknown frame rate.
    """
    if num_frames is not None and fps is not None:
        raise ValueError(f"num_frames={num_frames} and fps={fps} exclude each other; pass one of them.")
    if fps is not None:
        if not fps > 0:
            raise ValueError(f"fps is {fps}, but must be positive.")
        if not source_fps:
            raise ValueError("fps was given, but the frame rate of the video is unknown; pass num_frames instead.")
        num_frames = max(1, int(total / source_fps * fps))
    if num_frames is None:
        return np.arange(total)
    if not num_frames >= 1:
        raise ValueError(f"num_frames is {num_frames}, but must be at least 1.")
    num_frames = min(num_frames, total)
    return np.arange(num_frames) * total // num_frames


def read_video(path: str, choose: Callable[[int, Optional[float]], np.ndarray]) -> tuple:
    """
    Decodes the chosen frames of a video file or URL.

    Args:
        path: file or URL.
        choose: `(total frames, frames per second) -> indices`.

    Returns:
        frames (F, height, width, 3), uint8 RGB, and their [`VideoMetadata`].

    Raises:
        ImportError: PyAV is not installed.
        FileNotFoundError: no such file.
        ValueError: the file holds no video that can be decoded.
    """
    if av is None:
        raise ImportError("reading video files needs PyAV; install it with `pip install av`, or pass frames as arrays.")
    if "://" not in path and not os.path.isfile(path):
        raise FileNotFoundError(f"no video file at {path!r}")
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise ValueError(f"{path!r} cannot be decoded as a video: it has no video stream")
            stream = container.streams.video[0]
            fps = float(stream.average_rate) if stream.average_rate else None
            total = stream.frames or sum(1 for _ in container.decode(stream))
        if total == 0:
            raise ValueError(f"{path!r} has no frames")
        indices = choose(total, fps)
        wanted = set(int(index) for index in indices)
        with av.open(path) as container:
            container.streams.video[0].thread_type = "AUTO"
            decoded = {}
            for index, frame in enumerate(container.decode(video=0)):
                if index in wanted:
                    decoded[index] = frame.to_ndarray(format="rgb24")
                if len(decoded) == len(wanted):
                    break
    except av.error.FFmpegError as error:
        raise ValueError(f"{path!r} cannot be decoded as a video: {error}") from error
    missing = sorted(wanted - set(decoded))
    if missing:
        raise ValueError(f"{path!r} ends early: it announces {total} frames, but frames {missing} cannot be decoded")
    frames = np.stack([decoded[int(index)] for index in indices])
    metadata = VideoMetadata(
        total_num_frames=total,
        fps=fps,
        duration=total / fps if fps else None,
        video_backend="pyav",
        height=frames.shape[1],
        width=frames.shape[2],
        frames_indices=[int(index) for index in indices],
    )
    return frames, metadata
