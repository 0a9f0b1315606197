"""The two sides that the tests compare."""

import gc
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SAMPLES = Path(__file__).resolve().parents[3] / "samples"
MEDIA = sorted(path.name for path in SAMPLES.iterdir() if path.suffix in (".png", ".mp4"))


def prompt_of(media, question: str) -> str:
    """The prompt of the repository's chat template; one that ends with its media where the question is empty."""
    tokens = "".join(f"<{kind_of(name)}>\n" for name in media)
    if not question:
        return f"USER: what colour is the star? ASSISTANT: {tokens.strip()}"
    return f"USER: {tokens}{question} ASSISTANT:"


def kind_of(name: str) -> str:
    return "video" if str(name).endswith(".mp4") else "image"


class Served:
    """
    vLLM in this process.

    Attributes:
        pruned: (question, kind, kept indices) of every medium that was pruned since the last `answers`.
        encoded: how many media went through the vision tower since then.
    """

    def __init__(self, folder, pruning=None, **engine):
        from vllm import LLM

        torch.set_num_threads(1)
        options = dict(dtype="float32", max_num_seqs=8, enforce_eager=True, max_model_len=1024)
        overrides = {"pruning": pruning} if pruning else {}
        self.llm = LLM(str(folder), trust_remote_code=True, hf_overrides=overrides, **{**options, **engine})
        self.pruned, self.encoded = [], 0
        vision = self.model.vision
        prune, encode = vision.prune_items, vision.encode_items

        def prune_items(items, pruning, question, *args):
            prune(items, pruning, question, *args)
            self.pruned += [(tuple(question.ids[0].tolist()), item.kind, tuple(item.kept.tolist())) for item in items]

        def encode_items(items, *args, **kwargs):
            self.encoded += len(items)
            encode(items, *args, **kwargs)

        vision.prune_items, vision.encode_items = prune_items, encode_items

    @property
    def model(self):
        return self.llm.llm_engine.model_executor.driver_worker.model_runner.model

    def answers(self, asked, max_tokens=8, options=()) -> list:
        """The token ids of the answers to (media, question) that are asked at the same time."""
        from vllm import SamplingParams

        self.pruned, self.encoded = [], 0
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
        requests = [self.request(media, question, **dict(options)) for media, question in asked]
        outputs = self.llm.generate(requests, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    @staticmethod
    def request(media, question, **options):
        data = {}
        for name in media:
            if kind_of(name) == "video":
                medium = np.frombuffer((SAMPLES / name).read_bytes(), dtype=np.uint8)
            else:
                medium = Image.open(SAMPLES / name)
            data.setdefault(kind_of(name), []).append(medium)
        request = {"prompt": prompt_of(media, question), "multi_modal_data": data}
        return {**request, "mm_processor_kwargs": options} if options else request

    def forget(self) -> None:
        """Empties every cache."""
        self.llm.reset_prefix_cache()
        self.llm.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()
        self.model.media.clear()

    def prune_by(self, method: str) -> None:
        """Another method, one that moves no positions: starting an engine for each takes longer than what they answer."""
        self.forget()
        self.model.vision.config.pruning = {"method": method}
        self.llm.renderer.get_mm_processor().info.processor.set_pruning({"method": method})

    def stop(self) -> None:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()
        gc.collect()


class Reference:
    """transformers with the variant's own code."""

    def __init__(self, folder, pruning=None):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        options = {"trust_remote_code": True, **({"pruning": pruning} if pruning else {})}
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **options).eval()
        self.processor = AutoProcessor.from_pretrained(folder, **options)

    def prune_by(self, method: str) -> None:
        self.model.config.pruning = {"method": method}
        self.processor.set_pruning({"method": method})

    def inputs(self, media, question, text=None, **options):
        files = {
            "images": [Image.open(SAMPLES / name) for name in media if kind_of(name) == "image"] or None,
            "videos": [str(SAMPLES / name) for name in media if kind_of(name) == "video"] or None,
        }
        return self.processor(text=text or prompt_of(media, question), **files, **options)

    def answers(self, asked, max_tokens=8, options=()) -> list:
        """As `Served.answers`, one after the other."""
        results = []
        for media, question in asked:
            inputs = self.inputs(media, question, **dict(options))
            with torch.no_grad():
                ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens)
            results.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
        return results

    def pruned(self, asked, options=()) -> set:
        """(question, kind, kept indices) of every medium that is asked about."""
        found = set()
        for media, question in asked:
            inputs = self.inputs(media, question, **dict(options))
            ids = inputs["input_ids"][0]
            masks = self.model.placeholder_masks(inputs["input_ids"])
            last = (masks["image"] | masks["video"])[0].nonzero()[-1, 0]
            for item in self.model.select_tokens(**inputs):
                found.add((tuple(ids[last + 1 :].tolist()), item.kind, tuple(item.kept.tolist())))
        return found
