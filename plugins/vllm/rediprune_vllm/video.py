"""Videos stay files until the processor of the variant decodes them: the frames are those that transformers would see."""

import numpy as np
from vllm.multimodal.video import VideoLoader


class UndecodedVideo(VideoLoader):
    """Hands on the bytes of a video."""

    @classmethod
    def load_bytes(cls, data: bytes, num_frames: int = 32, **kwargs) -> tuple:
        """
        Returns:
            the content of the file, uint8 (bytes,), and no metadata.

        Raises:
            ValueError: frames were chosen by `media_io_kwargs`.
        """
        if kwargs or num_frames != 32:  # vLLM's default
            given = {"num_frames": num_frames, **kwargs}
            raise ValueError(
                f"media_io_kwargs of the video are {given}, but the frames of a pruned model are chosen by its processor: pass "
                "num_frames or fps in mm_processor_kwargs."
            )
        return np.frombuffer(data, dtype=np.uint8), {}
