"""Videos to frames, with PyAV: its wheels carry their own FFmpeg, so a path works wherever `pip install av` does."""

import io
import math
import numbers
import operator
import os
from contextlib import contextmanager
from typing import Callable, Optional

import numpy as np
from transformers.utils import logging
from transformers.video_utils import VideoMetadata

from .inputs_download import shown

try:
    import av
except ImportError:
    av = None

logger = logging.get_logger(__name__)

# Formats that name other files or hosts. FFmpeg would open those, and wait as long as the playlist of a stream asks.
REFERRING_FORMATS = {"avisynth", "concat", "dash", "hls", "imf", "rtp", "rtsp", "sap", "sdp", "vapoursynth", "vobsub"}


def frame_indices(
    total: int, num_frames: Optional[int], fps: Optional[float], source_fps: Optional[float]
) -> np.ndarray:
    """
    Evenly spaced frames of a video of `total` frames: `fps` of them a second where `fps` is given, else `num_frames`, else
    all; never more than there are.

    Raises:
        ValueError: both were given, `num_frames` is not a whole number of at least 1, `fps` is not a positive number,
            or it was given for a video of unknown frame rate.
    """
    if num_frames is not None and fps is not None:
        raise ValueError(f"num_frames={num_frames} and fps={fps} exclude each other; pass one of them.")
    if fps is not None:
        if not isinstance(fps, numbers.Real):
            raise ValueError(f"fps is {fps!r}, but must be a number.")
        if not 0 < fps < math.inf:
            raise ValueError(f"fps is {fps}, but must be positive and finite.")
        if not source_fps:
            raise ValueError("fps was given, but the frame rate of the video is unknown; pass num_frames instead.")
        num_frames = max(1, int(total / source_fps * fps))
    if num_frames is None:
        return np.arange(total)
    try:
        num_frames = min(operator.index(num_frames), total)
    except TypeError as error:
        raise ValueError(f"num_frames is {num_frames!r}, but must be a whole number.") from error
    if num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}, but must be at least 1.")
    return np.arange(num_frames) * total // num_frames


def read_video(video, choose: Callable[[int, Optional[float]], np.ndarray], name: Optional[str] = None) -> tuple:
    """
    Decodes the chosen frames of a video.

    Where a chosen frame is not there, since the container announces more frames than can be decoded, `choose` is asked
    again with the real number. FFmpeg reads nothing but the video itself: a playlist or a list of files is refused.

    Args:
        video: the path of a file, or its content as `bytes`.
        choose: `(total frames, frames per second) -> indices`.
        name: what errors call the video; its path by default.

    Returns:
        frames (F, height, width, 3), uint8 RGB, and their [`VideoMetadata`].

    Raises:
        ImportError: PyAV is not installed.
        FileNotFoundError: no such file.
        ValueError: there is no video that can be decoded.
    """
    if av is None:
        raise ImportError("reading video files needs PyAV; install it with `pip install av`, or pass frames as arrays.")
    if not isinstance(video, bytes) and not os.path.isfile(video):
        raise FileNotFoundError(f"no video file at {shown(os.fspath(video))}")
    name = name or (f"a video of {len(video)} bytes" if isinstance(video, bytes) else shown(os.fspath(video)))
    try:
        total, fps = _announced(video, name)
        while True:
            if total == 0:
                raise ValueError(f"{name} has no frames that can be decoded")
            indices = choose(total, fps)
            decoded, found = _decoded(video, {int(index) for index in indices})
            if all(int(index) in decoded for index in indices):
                break
            logger.warning(f"{name} announces {total} frames, but {found} can be decoded; it is sampled from these.")
            total = found
    except av.error.FFmpegError as error:
        raise ValueError(f"{name} cannot be decoded as a video: {_explained(error)}") from error
    frames = stack_frames([decoded[int(index)] for index in indices], name)
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


def announced_size(video: bytes) -> tuple:
    """
    Width, height and length in seconds that a video announces, the length `None` where it does not say. No frame is decoded, so
    that a service can refuse before that, but a broken or a hostile file may hold something else.

    Raises:
        ImportError: PyAV is not installed.
        ValueError: there is no video.
    """
    if av is None:
        raise ImportError("reading video files needs PyAV; install it with `pip install av`, or pass frames as arrays.")
    try:
        with _opened(video) as container:
            stream = _video_stream(container, f"a video of {len(video)} bytes")
            length = container.duration / av.time_base if container.duration else None
            return stream.width, stream.height, length
    except av.error.FFmpegError as error:
        raise ValueError(f"a video of {len(video)} bytes cannot be decoded as a video: {_explained(error)}") from error


def stack_frames(frames: list, name: str) -> np.ndarray:
    """
    Frames of one size as one array.

    Raises:
        ValueError: they differ in size.
    """
    shapes = list(dict.fromkeys(frame.shape for frame in frames))
    if len(shapes) > 1:
        raise ValueError(f"{name} has frames of the shapes {shapes[0]} and {shapes[1]}; bring all to one size.")
    return np.stack(frames)


def _announced(video, name: str) -> tuple:
    """How many frames a video says it has, or has where it does not say, and how many a second."""
    with _opened(video) as container:
        stream = _video_stream(container, name)
        fps = float(stream.average_rate) if stream.average_rate else None
        return stream.frames or sum(1 for _ in _frames(container)), fps


def _video_stream(container, name: str):
    if not container.streams.video:
        raise ValueError(f"{name} cannot be decoded as a video: it has no video stream")
    return container.streams.video[0]


def _decoded(video, wanted: set) -> tuple:
    """The wanted frames by their index, as far as they are there, and how many frames were read to find them."""
    decoded, found = {}, 0
    with _opened(video) as container:
        container.streams.video[0].thread_type = "AUTO"
        for frame in _frames(container):
            if found in wanted:
                decoded[found] = frame.to_ndarray(format="rgb24")
            found += 1
            if len(decoded) == len(wanted):
                break
    return decoded, found


@contextmanager
def _opened(video):
    """A video as FFmpeg reads it: from an open file, with no way to another one."""
    formats = set(",".join(av.formats_available).split(",")) - REFERRING_FORMATS
    options = {"protocol_whitelist": "none", "format_whitelist": ",".join(sorted(formats))}
    with io.BytesIO(video) if isinstance(video, bytes) else open(video, "rb") as file:
        with av.open(_Source(file), options=options) as container:
            yield container


class _Source:
    """A file as FFmpeg expects it: broken videos lead to places outside it, which is no error of Python's."""

    def __init__(self, file):
        self.file, self.read, self.tell = file, file.read, file.tell
        self.name = getattr(file, "name", "")  # its ending tells FFmpeg apart what the content does not

    def seek(self, offset, whence=os.SEEK_SET):
        try:
            return self.file.seek(offset, whence)
        except (OSError, ValueError):  # of files and of BytesIO
            return -1


def _frames(container):
    """The frames of the first video stream; as in a player, a broken packet costs its own frames alone."""
    for packet in container.demux(container.streams.video[0]):
        try:
            yield from packet.decode()
        except av.error.FFmpegError:
            continue


def _explained(error) -> str:
    if isinstance(error, av.error.ArgumentError):  # what FFmpeg raises for a format that is not on the list
        return f"{error}. A playlist or a list of other files is not followed; pass the video itself."
    return str(error)
