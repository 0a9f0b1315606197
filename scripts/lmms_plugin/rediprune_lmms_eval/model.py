"""The model `rediprune` of lmms-eval: its `huggingface` model with what that one cannot be told.

    lmms-eval eval --model rediprune --model_args pretrained=REPO,keep_ratio=0.1,positions=original,times=runs/times.json ...

Prompts, generation and answers are those of `huggingface`; without further arguments the two give the same answers.
"""

import json
import os
import statistics
import time
from pathlib import Path
from typing import Optional

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models.chat.huggingface import Huggingface
from transformers import AutoModelForImageTextToText, AutoProcessor


class ReDiPrune(Huggingface):
    """
    Args:
        pretrained: folder or Hub id of a repository with this project's code.
        revision: of a Hub id.
        num_frames: frames sampled from a video, where it takes any; as the repository's video processor says where not given.
        dtype: `bfloat16` (that of `huggingface`), `float16`, `float32` or `auto`.
        attn_implementation: `sdpa`, `eager` or `flash_attention_2`.
        times: file for seconds and numbers of tokens of every request; with several processes, one file each.
        device, batch_size, device_map: as in `huggingface`.
        pruning: everything else: keys of the repository's pruning block, such as `keep_ratio`, `method`, `positions`.
    """

    def __init__(
        self,
        pretrained: str,
        revision: str = "main",
        num_frames: Optional[int] = None,
        dtype: str = "bfloat16",
        attn_implementation: Optional[str] = None,
        times: Optional[str] = None,
        device: Optional[str] = None,
        device_map: Optional[str] = None,
        batch_size: int = 1,
        max_batch_size=None,
        system_prompt: Optional[str] = None,
        **pruning,
    ):
        lmms.__init__(self)
        self.accelerator = Accelerator()
        # As lmms-eval itself counts them; accelerate counts processes without GPUs only if told so.
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        several = self._world_size > 1
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = self.accelerator.device if several else torch.device(device or default)
        self.device_map = str(self._device) if several or not device_map else device_map

        options = {"revision": revision, "trust_remote_code": True, "pruning": pruning}
        self._model = AutoModelForImageTextToText.from_pretrained(
            pretrained,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            device_map=self.device_map,
            attn_implementation=attn_implementation,
            **options,
        ).eval()
        self.processor = AutoProcessor.from_pretrained(pretrained, **options)
        if num_frames is not None:
            if not self._model.config.takes_videos:
                raise ValueError(
                    f"num_frames={num_frames} is for videos, but {pretrained} takes images alone; leave it out"
                )
            self.processor.video_processor.num_frames = num_frames
        self._tokenizer = self.processor.tokenizer
        self._config = self._model.config
        self._max_length = self._config.text_config.max_position_embeddings
        self.batch_size_per_gpu = int(batch_size)
        self.use_cache = True
        self.system_prompt = self._resolve_system_prompt(system_prompt.replace("\\n", "\n")) if system_prompt else None
        self._times = _times_file(times, self._rank, several)
        self._requests = []
        self._generate, self._model.generate = self._model.generate, self._timed_generate

    def _timed_generate(self, **inputs):
        """Generates, and notes what it took: from pixels to the answer, the vision tower included, reading the media not."""
        self._synchronize()
        start = time.perf_counter()
        output = self._generate(**inputs)
        self._synchronize()
        ids = inputs["input_ids"]
        placeholders = [
            self._config.image_token_id,
            getattr(self._config, "video_token_id", None),
        ]  # not all take videos
        visual = torch.tensor([token for token in placeholders if token is not None], device=ids.device)
        self._requests.append(
            {
                "seconds": time.perf_counter() - start,
                "requests": len(ids),
                "visual_tokens": int(torch.isin(ids, visual).sum()),
                "prompt_tokens": ids.numel(),
                "new_tokens": output[:, ids.shape[1] :].numel(),
            }
        )
        return output

    def _synchronize(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def generate_until(self, requests):
        results = super().generate_until(requests)
        if self._times is not None:
            self._write_times()
        return results

    def _write_times(self) -> None:
        batches, total = self._requests, sum(batch["requests"] for batch in self._requests)
        summary = {
            "requests": total,
            "seconds_per_request": statistics.median(batch["seconds"] / batch["requests"] for batch in batches),
            "visual_tokens_per_request": sum(batch["visual_tokens"] for batch in batches) / total,
            "pruning": self._config.pruning.to_dict(),
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else str(self._device),
            "batches": batches,
        }
        temporary = self._times.with_name(self._times.name + ".part")
        temporary.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self._times)


def _times_file(path: Optional[str], rank: int, several: bool) -> Optional[Path]:
    """The file for times, checked before hours of work rather than after."""
    if not path:
        return None
    path = Path(path)
    path = path.with_name(f"{path.stem}.{rank}{path.suffix}") if several else path
    if path.is_dir():
        raise IsADirectoryError(f"times={path} is a folder, but must be a file, such as times={path / 'times.json'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
