"""Video files as they are found: what decodes is taken, from the number of frames that is really there."""

import io

import av
import numpy as np
import pytest
import torch
from PIL import Image
from rediprune.inputs_video import announced_size, read_video
from tiny import grey_video, random_video, write_video


def evenly(number):
    return lambda total, fps: np.arange(number) * total // number


def stream_copied_cut(folder, start=14, length=30):
    """A clip cut without decoding, as by `ffmpeg -ss ... -c copy`: it starts between two key frames."""
    whole, cut = folder / "whole.mp4", folder / "stream-copied.mp4"
    with av.open(str(whole), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "12"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for level in range(60):
            frame = np.full((48, 64, 3), 4 * level, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(whole)) as source, av.open(str(cut), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.dts is not None]
        for packet in packets[start : start + length]:
            packet.stream = stream
            target.mux(packet)
    return cut


def half_a_file(folder):
    """Its index is at the start and announces all."""
    whole, cut = folder / "whole.mp4", folder / "half.mp4"
    write_video(whole, random_video(frames=30, size=(64, 64)), options={"movflags": "faststart"})
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    return cut


@pytest.mark.parametrize("make", [stream_copied_cut, half_a_file], ids=lambda make: make.__name__)
@pytest.mark.parametrize("form", ["path", "bytes"])
def test_a_clip_that_announces_more_frames_than_it_holds(processor, tmp_path, make, form):
    if make is stream_copied_cut and "libx264" not in av.codecs_available:
        pytest.skip("this PyAV encodes no H.264")
    path = make(tmp_path)
    with av.open(str(path)) as container:
        announced = container.streams.video[0].frames
    with av.open(str(path)) as container:
        every_frame = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    real = len(every_frame)
    assert 4 < real < announced
    video = str(path) if form == "path" else path.read_bytes()
    for number in (4, real):
        frames, metadata = read_video(video, evenly(number))
        expected = [int(index) for index in np.arange(number) * real // number]
        # Asked for a few, all may lie before the end: then nothing shows that the number is too high.
        if metadata.total_num_frames == real:
            assert metadata.frames_indices == expected and metadata.duration == real / metadata.fps
            assert np.array_equal(frames, np.stack(every_frame)[expected])
        else:
            assert number == 4 and metadata.total_num_frames == announced
    assert metadata.total_num_frames == real
    for asked, got in ((16, min(16, real)), (32, real)):
        inputs = processor(text="<video>", videos=video, num_frames=asked)
        assert inputs["pixel_values_videos"].shape[1] == got


@pytest.mark.parametrize("frames", [10, 40])
def test_an_animated_gif(processor, tmp_path, frames):
    path = tmp_path / "moving.gif"
    pictures = [Image.fromarray(np.full((32, 32, 3), 6 * level, np.uint8)) for level in range(frames)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=[30, 70] * (frames // 2), loop=0)
    for asked in (4, 16, 32):
        inputs = processor(text="<video>", videos=str(path), num_frames=asked, return_metadata=True)
        taken = min(asked, frames)
        assert inputs["pixel_values_videos"].shape[1] == taken
        assert inputs["video_metadata"][0].frames_indices == [index * frames // taken for index in range(taken)]


def test_a_broken_packet_costs_its_frames_alone(tmp_path):
    path = tmp_path / "moving.gif"
    pictures = [Image.fromarray(frame) for frame in random_video(frames=8, size=(32, 32))]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=40)
    whole, _ = read_video(str(path), evenly(8))
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        positions = [packet.pos for packet in container.demux(video=0) if packet.pos]
    image = content.index(b"\x2c", positions[3])  # the image of the fourth packet, and the colours before its data
    size = 3 << ((content[image + 9] & 7) + 1) if content[image + 9] & 0x80 else 0
    content[image + 10 + size] = 99  # no such code size
    frames, metadata = read_video(bytes(content), lambda total, fps: np.arange(total))
    assert metadata.total_num_frames == 7
    assert np.array_equal(frames[-1], whole[-1])


def test_a_clip_of_which_nothing_decodes(tmp_path):
    path = write_video(tmp_path / "video.gif.mp4", grey_video(4))
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat")
    end = content.index(b"moov") if content.index(b"moov") > start else len(content)
    content[start + 4 : end - 4] = bytes(end - 4 - start - 4)
    with pytest.raises(ValueError, match="a video of .* bytes (has no frames that can be decoded|cannot be decoded)"):
        read_video(bytes(content), evenly(2))


def test_frames_that_change_their_size(processor):
    with pytest.raises(
        ValueError, match=r"video 0 has frames of the shapes \(40, 48, 3\) and \(20, 48, 3\); bring all to one size"
    ):
        processor(text="<video>", videos=[[random_video(size=(40, 48))[0], random_video(size=(20, 48))[0]]])
    with pytest.raises(ValueError, match="video 0 has frames of the shapes"):
        processor(text="<video>", videos=[[Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))]])


def test_bytes_in_a_chat(processor, tmp_path):
    path = write_video(tmp_path / "grey.mp4", grey_video(12))
    expected = processor(text="<video>", videos=path)["pixel_values_videos"]
    for video in (path.read_bytes(), io.BytesIO(path.read_bytes())):
        chat = [{"role": "user", "content": [{"type": "video", "video": video}]}]
        inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        assert torch.equal(inputs["pixel_values_videos"], expected)


def test_bytes_that_are_no_video(processor, tmp_path):
    for content in (b"", b"no video" * 100):
        with pytest.raises(ValueError, match="video 1 cannot be decoded as a video"):
            processor(text="<video><video>", videos=[random_video(), content])
    text = tmp_path / "text.txt"
    text.write_text("no video")
    with (
        text.open() as file,
        pytest.raises(ValueError, match="gives str, but a video is bytes; open it in binary mode"),
    ):
        processor(text="<video>", videos=file)


def test_a_stream_without_positions(processor, tmp_path):
    content = write_video(tmp_path / "grey.mp4", grey_video(12)).read_bytes()

    class Pipe(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer, rest=io.BytesIO(content)):
            return rest.readinto(buffer)

    expected = processor(text="<video>", videos=content)["pixel_values_videos"]
    assert torch.equal(processor(text="<video>", videos=Pipe())["pixel_values_videos"], expected)


@pytest.mark.parametrize("video", [5, {"path": "a.mp4"}, object()], ids=lambda value: type(value).__name__)
def test_what_is_no_video(processor, video):
    with pytest.raises(
        ValueError, match=f"video 0 is of type {type(video).__name__}, but must be a path, an http or https URL"
    ):
        processor(text="<video>", videos=video)


def test_a_video_announces_its_size(tmp_path):
    content = write_video(tmp_path / "clip.mp4", random_video(frames=12)).read_bytes()
    assert announced_size(content) == (48, 40, pytest.approx(1.2))


@pytest.mark.parametrize(
    "content", [b"", b"no video", b"#EXTM3U\n#EXTINF:4,\nhttp://127.0.0.1:9/secret.ts\n#EXT-X-ENDLIST\n"]
)
def test_what_is_no_video_announces_nothing(content):
    with pytest.raises(ValueError, match="cannot be decoded as a video"):
        announced_size(content)
