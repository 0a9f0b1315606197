"""Trains the tiny checkpoint: a small LLaVA-NeXT-Video that answers questions about the toy world.

Everything starts from random weights and runs on two CPU cores in little more than an hour. Two stages, each resumable:

1. vision    the vision tower learns what covers each patch and where the patch is (dense labels at the tapped layer), and its
             class token learns which objects are there
2. language  the tower is frozen and its features are cached; projector and language model learn to answer. Many questions
             share one visual prefix: each attends to the prefix and to itself only

The model always sees all visual tokens: pruning is training-free, so the checkpoint must not have met it.

Examples:
    python scripts/train_tiny.py --work-dir runs/tiny --output runs/tiny/export
    python scripts/train_tiny.py --work-dir runs/quick --output runs/quick/export \\
        --vision-steps 200 --language-steps 600 --frame-steps 200

A killed run goes on where it stopped when it is started again with the same arguments.
"""

import argparse
import json
import math
import os
import pickle
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional as F
from toy_world import (
    COLOURS,
    FRAME_SIZE,
    HELD_OUT_START,
    IMAGE_SIZES,
    NUM_FRAMES,
    PAIRS,
    PATCH_SIZE,
    SHAPES,
    STILL_TYPES,
    TABLES_START,
    VIDEO_TYPES,
    Question,
    Scene,
    draw_questions,
    object_map,
    patch_labels,
    sample_image,
    sample_video,
)
from tqdm import tqdm
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaNextImageProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
)
from writing import output_folder, replacing, write_whole

# Preprocessing, the same here and in the processor files that are exported.
IMAGE_MEAN = IMAGE_STD = (0.5, 0.5, 0.5)
GRID_PINPOINTS = [[FRAME_SIZE, 2 * FRAME_SIZE], [2 * FRAME_SIZE, FRAME_SIZE]]
MAX_LENGTH = 2048
GRID = FRAME_SIZE // PATCH_SIZE  # patches per side of a view

BOS, EOS, PAD, IMAGE, VIDEO = SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", "<image>", "<video>")

# How often each question type is asked about one scene in a training step: the harder ones more often.
FRAME_PACK = {type_: 2 for type_ in STILL_TYPES}
IMAGE_PACK = {"colour": 1, "shape": 1, "place": 3, "count": 3, "presence": 2}
VIDEO_PACK = {"colour": 1, "shape": 1, "place": 3, "count": 3, "presence": 1, "motion": 3, "order": 2}
SECOND_TURN_SHARE = 0.15  # how many questions follow another one in the same chat
SHARD = 2000  # scenes in one file of cached features
TRAINING_SCENES = range(HELD_OUT_START)
FOLLOWED_SCENES = range(HELD_OUT_START, HELD_OUT_START + 192)  # the final evaluation uses those after them
# Small batches: how soon answers turn right depends on the number of steps more than on the number of questions in each.
VIDEO_BATCH, IMAGE_BATCH, FRAME_BATCH = 8, 8, 16


# -------------------------------------------------------------------------------------------------- tokenizer and model


def first_turn(question: Question) -> str:
    """The rest of the first turn, after the placeholders."""
    return f"\n{question.question} ASSISTANT:"


def later_turn(question: Question) -> str:
    """A turn that follows an answer and its end token."""
    return f"USER: {question.question} ASSISTANT:"


def build_tokenizer() -> Tokenizer:
    """A byte-level BPE in which every word of the questions is one token, and which can still spell anything else."""
    corpus = []
    for seed in range(3000):
        for question in sample_video(seed).questions if seed % 2 else sample_image(seed).questions:
            corpus += [first_turn(question), later_turn(question), f" {question.answer}"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def build_config(tokenizer: Tokenizer) -> LlavaNextVideoConfig:
    """The stock configuration of the tiny checkpoint: about 2.3 M parameters."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        projection_dim=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=FRAME_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=-(-tokenizer.get_vocab_size() // 8) * 8,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
        tie_word_embeddings=False,
    )
    return LlavaNextVideoConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.token_to_id(IMAGE),
        video_token_index=tokenizer.token_to_id(VIDEO),
        image_grid_pinpoints=GRID_PINPOINTS,
        image_seq_length=GRID**2,
        video_seq_length=NUM_FRAMES * GRID**2 // 4,
        tie_word_embeddings=False,
    )


# -------------------------------------------------------------------------------------------------------- preprocessing


def frames_to_pixels(frames: np.ndarray) -> torch.Tensor:
    """Frames, uint8 (N, 96, 96, 3), as the stock video processor gives them: float32 (N, 3, 96, 96)."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    return (pixels - mean) / std


def build_image_processor() -> LlavaNextImageProcessor:
    return LlavaNextImageProcessor(
        size={"shortest_edge": FRAME_SIZE},
        crop_size={"height": FRAME_SIZE, "width": FRAME_SIZE},
        image_grid_pinpoints=GRID_PINPOINTS,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
        do_pad=True,
    )


def image_to_pixels(processor: LlavaNextImageProcessor, scene: Scene) -> torch.Tensor:
    """The views of an image scene: float32 (3, 3, 96, 96), the base view and two tiles."""
    return processor(Image.fromarray(scene.frames[0]), return_tensors="pt")["pixel_values"][0]


def view_maps(objects: np.ndarray) -> list[np.ndarray]:
    """The object maps (see `toy_world.object_map`) of an image's views, in the order of `image_to_pixels`."""
    base = Image.fromarray(objects).resize((FRAME_SIZE, FRAME_SIZE), Image.Resampling.NEAREST)
    if objects.shape == (FRAME_SIZE, FRAME_SIZE):  # a square image is centred in a wide pair of tiles
        objects = np.pad(objects, ((0, 0), (FRAME_SIZE // 2, FRAME_SIZE // 2)))
    rows, columns = range(0, objects.shape[0], FRAME_SIZE), range(0, objects.shape[1], FRAME_SIZE)
    return [np.asarray(base), *(objects[i : i + FRAME_SIZE, j : j + FRAME_SIZE] for i in rows for j in columns)]


# --------------------------------------------------------------------------------------------------------- vision stage


class VisionHeads(nn.Module):
    """What the vision tower is asked in its own stage; not part of the checkpoint.

    Per patch of the tapped layer: shape, colour, row, column. Of the class token, at the tapped layer and at the end: which
    (shape, colour) pairs are in view, so that its attention goes to the objects.
    """

    def __init__(self, width: int):
        super().__init__()
        self.sizes = (len(SHAPES) + 1, len(COLOURS) + 1, GRID, GRID)
        self.norm = nn.LayerNorm(width)
        self.dense = nn.Linear(width, sum(self.sizes))
        self.tap_pairs = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(PAIRS)))
        self.final_pairs = nn.Linear(width, len(PAIRS))

    def forward(self, outputs) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
        tap = outputs.hidden_states[-2]
        dense = self.dense(self.norm(tap[:, 1:])).float().split(self.sizes, -1)
        return dense, self.tap_pairs(tap[:, 0]).float(), self.final_pairs(outputs.pooler_output).float()


def vision_batch(
    rng: np.random.Generator, image_processor: LlavaNextImageProcessor, num_videos: int, num_images: int, seeds: range
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four frames of each video and all views of each image, of scenes drawn from `seeds`.

    Returns pixels float32 (N, 3, 96, 96), patch labels int64 (N, 144, 4) and the pairs in view float32 (N, 42).
    """
    pixels, labels = [], []
    for _ in range(num_videos):
        scene = sample_video(seeds[rng.integers(len(seeds))])
        times = rng.choice(NUM_FRAMES, 4, replace=False)
        pixels.append(frames_to_pixels(scene.frames[times]))
        labels += [patch_labels(scene.things, object_map(scene, t)) for t in times]
    for _ in range(num_images):
        scene = sample_image(seeds[rng.integers(len(seeds))])
        pixels.append(image_to_pixels(image_processor, scene))
        labels += [patch_labels(scene.things, view) for view in view_maps(object_map(scene))]
    return torch.cat(pixels), *dense_targets(labels)


def dense_targets(labels: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Patch labels of N views, each int64 (12, 12, 4), as int64 (N, 144, 4), and the pairs in view, float32 (N, 42)."""
    stacked = torch.from_numpy(np.stack(labels)).flatten(1, 2)
    shape, colour = stacked[..., 0], stacked[..., 1]
    pair = ((shape - 1) * len(COLOURS) + colour - 1).where(shape > 0, len(PAIRS))
    return stacked, F.one_hot(pair, len(PAIRS) + 1).amax(1)[:, :-1].float()


def vision_loss(dense, tap_pairs, final_pairs, labels, pairs) -> torch.Tensor:
    """Shape and colour count most: position is easy, and most patches are background."""
    losses = [F.cross_entropy(logits.flatten(0, 1), labels[..., i].flatten()) for i, logits in enumerate(dense)]
    tap, final = (F.binary_cross_entropy_with_logits(logits, pairs) for logits in (tap_pairs, final_pairs))
    return 3 * (losses[0] + losses[1]) + 0.3 * (losses[2] + losses[3]) + 2 * tap + final


def vision_accuracy(dense, tap_pairs, labels, pairs) -> dict[str, float]:
    """Right answers per object patch, background patches taken for background, and the pairs that the class token names."""
    covered = labels[..., 0] > 0
    right = [(logits.argmax(-1) == labels[..., i]) for i, logits in enumerate(dense)]
    accuracy = {name: hit[covered].float().mean().item() for name, hit in zip(("shape", "colour"), right, strict=False)}
    accuracy |= {name: hit.float().mean().item() for name, hit in zip(("row", "column"), right[2:], strict=True)}
    accuracy["background"] = right[0][~covered].float().mean().item()
    named = tap_pairs > 0
    both = (named & (pairs > 0)).sum().item()
    return accuracy | {"class precision": both / max(1, named.sum().item()), "class recall": both / pairs.sum().item()}


# ------------------------------------------------------------------------------------------------------------- features


@dataclass
class Sample:
    """A scene as the language stage sees it: vision features, float16 (T, 36, C) for a video, (3, 144, C) for an image."""

    features: torch.Tensor
    scene: Scene  # without its pixels


@torch.no_grad()
def encode(model: LlavaNextVideoForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Features of the tapped layer without the class token: (N, 3, 96, 96) -> (N, 144, C)."""
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model.model.vision_tower(pixels, output_hidden_states=True)
    return outputs.hidden_states[model.config.vision_feature_layer][:, 1:].float()


def encode_scenes(model, kind: str, seeds: range) -> list[Sample]:
    """Renders scenes and runs the vision tower (and the stock pooler for videos) over them."""
    image_processor = build_image_processor()
    samples = []
    for start in tqdm(range(seeds.start, seeds.stop, 16), f"features of {kind}s", mininterval=5):
        scenes = [
            (sample_video if kind == "video" else sample_image)(s) for s in range(start, min(start + 16, seeds.stop))
        ]
        if kind == "video":
            pixels = frames_to_pixels(np.concatenate([scene.frames for scene in scenes]))
            features = model.model.vision_resampler(encode(model, pixels))
        else:
            features = encode(model, torch.cat([image_to_pixels(image_processor, scene) for scene in scenes]))
        parts = features.half().unflatten(0, (len(scenes), -1))
        samples += [
            Sample(part.clone(), replace(scene, frames=scene.frames[:, :, :, :0]))
            for part, scene in zip(parts, scenes, strict=True)
        ]
    return samples


def held_out_scenes(model) -> dict[str, list[Sample]]:
    """The scenes of both kinds that training is followed on."""
    return {kind: encode_scenes(model, kind, FOLLOWED_SCENES) for kind in ("video", "image")}


def cached_scenes(model, kind: str, shard: int, work_dir: Path) -> list[Sample]:
    """Shard `shard` of the training scenes of a kind, from the cache where it is there."""
    path = work_dir / f"features-{kind}-{shard:03d}.pkl"
    if path.exists():
        with path.open("rb") as file:
            return pickle.load(file)
    samples = encode_scenes(model, kind, range(shard * SHARD, (shard + 1) * SHARD))
    write_whole(path, pickle.dumps(samples))
    return samples


# -------------------------------------------------------------------------------------------------------------- packing


@dataclass
class Pack:
    """Questions about B scenes, packed behind their visual prefixes. All tensors are (B, T).

    `segment` is 0 in the prefix, i + 1 in the i-th chat, -1 in padding. `owner` is the number of the question whose answer a
    token belongs to (in `types`), -1 elsewhere.
    """

    ids: torch.Tensor
    segment: torch.Tensor
    position: torch.Tensor
    owner: torch.Tensor
    types: list[str]

    def mask(self) -> torch.Tensor:
        """Which token sees which: bool (B, 1, T, T). A token sees the prefix and its own chat, up to itself."""
        query, key = self.segment[:, :, None], self.segment[:, None]
        return (((key == 0) | (key == query)).tril())[:, None]


class Packer:
    """Turns questions into token ids, exactly as the tokenizer would cut the whole chat."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.pad = tokenizer.token_to_id(PAD)
        self.pieces: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        if text not in self.pieces:
            self.pieces[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.pieces[text]

    def prefix(self, placeholder: str, num_tokens: int) -> list[int]:
        return self.encode(f"{BOS}USER: ") + self.encode(placeholder) * num_tokens

    def __call__(self, prefix: list[int], asked: list[list[Question]], second_turns: np.ndarray | None = None) -> Pack:
        """`second_turns` (bool, one per question of all scenes) says which questions go on with the chat before them."""
        types, rows = [], []
        for questions in asked:
            ids, segment, position, owner = (
                list(prefix),
                [0] * len(prefix),
                list(range(len(prefix))),
                [-1] * len(prefix),
            )
            chat = 0
            for i, question in enumerate(questions):
                follows = i > 0 and second_turns is not None and second_turns[len(types)]
                start = position[-1] + 1 if follows else len(prefix)
                chat += not follows
                text = self.encode((later_turn if follows else first_turn)(question))
                answer = self.encode(f" {question.answer}{EOS}")
                ids += text + answer
                segment += [chat] * (len(text) + len(answer))
                position += range(start, start + len(text) + len(answer))
                owner += [-1] * len(text) + [len(types)] * len(answer)
                types.append(question.type)
            rows.append((ids, segment, position, owner))
        length = max(len(row[0]) for row in rows)
        columns = zip(*rows, strict=True)
        padded = (
            torch.tensor([values + [fill] * (length - len(values)) for values in column])
            for column, fill in zip(columns, (self.pad, -1, 0, -1), strict=True)
        )
        return Pack(*padded, types)


def answer_pack(model, pack: Pack, visual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss over the answers of a pack, and which questions are answered right: bool (len(pack.types),).

    `visual` (B, V, H) are the projected visual tokens. Right means that every token of the answer and its end token is the
    most likely one, given the ones before it: what greedy generation produces.
    """
    config = model.config
    embeds = model.get_input_embeddings()(pack.ids)
    placeholder = (pack.ids == config.image_token_id) | (pack.ids == config.video_token_id)
    embeds = embeds.masked_scatter(placeholder[..., None], visual.to(embeds.dtype))
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=pack.mask(), position_ids=pack.position, use_cache=False
    ).last_hidden_state
    answer = pack.owner[:, 1:] >= 0
    logits = model.lm_head(hidden[:, :-1][answer]).float()
    target = pack.ids[:, 1:][answer]
    wrong = torch.bincount(pack.owner[:, 1:][answer], (logits.argmax(-1) != target).float(), len(pack.types))
    return F.cross_entropy(logits, target), wrong == 0


def project(model, features: torch.Tensor, image_size: tuple[int, int] | None = None) -> torch.Tensor:
    """Vision features (B, T, L, C) as the stock model puts them into the prompt: (B, V, H).

    `image_size` (height, width) is given for images: their tiles are put together and rows end with a newline token.
    """
    projected = model.model.multi_modal_projector(features)
    if image_size is None:
        return projected.flatten(1, 2)
    sizes = torch.tensor([image_size] * len(features))
    packed = model.model.pack_image_features(list(projected), sizes, "default", model.model.image_newline)[0]
    return torch.stack(list(packed))


class PositionHead(nn.Module):
    """Asks each projected visual token for its sixth of the height and of the width; not part of the checkpoint.

    Without it the projector learns from the first answers (colours, shapes) to drop position, and questions about place and
    motion wait long until it has come back.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.rows_and_columns = nn.Linear(width, 12)

    def forward(self, projected: torch.Tensor) -> torch.Tensor:
        """The loss over projected tokens (..., L, H), L a square number."""
        side = math.isqrt(projected.shape[-2])
        logits = self.rows_and_columns(self.norm(projected)).float().unflatten(-1, (2, 6)).flatten(0, -4)
        sixth = torch.arange(side) * 6 // side
        target = torch.stack([sixth[:, None].expand(side, side), sixth[None].expand(side, side)], -1).flatten(0, 1)
        return F.cross_entropy(logits.flatten(0, -2), target.expand(len(logits), -1, -1).flatten())


class Questioner:
    """Draws the batches of the language stage."""

    def __init__(self, model, tokenizer: Tokenizer):
        self.model = model
        self.packer = Packer(tokenizer)

    def _pack(self, placeholder, num_tokens, asked, rng) -> Pack:
        second = None if rng is None else rng.random(sum(map(len, asked))) < SECOND_TURN_SHARE
        return self.packer(self.packer.prefix(placeholder, num_tokens), asked, second)

    def videos(
        self, samples: list[Sample], features: torch.Tensor, rng: np.random.Generator
    ) -> tuple[torch.Tensor, Pack]:
        """All frames, all question types."""
        asked = [ask(sample.scene, VIDEO_PACK, rng) for sample in samples]
        visual = project(self.model, features)
        return visual, self._pack(VIDEO, visual.shape[1], asked, rng)

    def frames(
        self, samples: list[Sample], features: torch.Tensor, rng: np.random.Generator
    ) -> tuple[torch.Tensor, Pack]:
        """One frame of each video and questions about what is visible in it: the first step of the curriculum."""
        times = rng.integers(NUM_FRAMES, size=len(samples))
        asked = []
        for sample, t in zip(samples, times, strict=True):
            things = tuple(thing for thing in sample.scene.things if thing.visible(t))
            asked.append(ask(replace(sample.scene, things=things), FRAME_PACK, rng))
        visual = project(self.model, features[torch.arange(len(samples)), torch.from_numpy(times)][:, None])
        return visual, self._pack(VIDEO, visual.shape[1], asked, rng)

    def images(
        self, samples: list[Sample], features: torch.Tensor, rng: np.random.Generator
    ) -> tuple[torch.Tensor, Pack]:
        """Images, all of one size."""
        asked = [ask(sample.scene, IMAGE_PACK, rng) for sample in samples]
        visual = project(self.model, features, samples[0].scene.frames.shape[1:3])
        return visual, self._pack(IMAGE, visual.shape[1], asked, rng)


def ask(scene: Scene, pack: dict[str, int], rng: np.random.Generator) -> list[Question]:
    types = [type_ for type_, times in pack.items() for _ in range(times)]
    return draw_questions(scene.things, scene.counted, scene.frames.shape[1:3], types, rng)


def stack(samples: list[Sample]) -> torch.Tensor:
    return torch.stack([sample.features.float() for sample in samples])


# ------------------------------------------------------------------------------------------------------------- training


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Warm up, stay, and fall to 2 % over the last quarter; longer runs share their beginning with shorter ones."""
    fall = min(1.0, (steps - step) / (0.25 * steps))
    return peak * min(1.0, (step + 1) / warmup) * max(0.02, fall)


class Run:
    """Where a training run keeps its state: checkpoints of each stage, the log, and the seed."""

    def __init__(self, work_dir: Path, seed: int):
        self.work_dir, self.seed = work_dir, seed
        work_dir.mkdir(parents=True, exist_ok=True)
        self.log_path = work_dir / "training_log.jsonl"

    def rng(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *purpose))

    def log(self, **entry) -> None:
        with self.log_path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        tqdm.write(json.dumps(entry))

    def path(self, stage: str) -> Path:
        return self.work_dir / f"{stage}.pt"

    def steps(self, stage: str, steps: int, peak: float, parts: dict[str, nn.Module], parameters: list) -> Iterator:
        """Yields (step, optimizer) until `steps`, resuming and saving the `parts` as it goes."""
        optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.02)
        first, seconds = 0, 0.0
        if self.path(stage).exists():
            state = torch.load(self.path(stage))
            first, seconds = state["step"], state["seconds"]
            for name, part in parts.items():
                part.load_state_dict(state[name])
            optimizer.load_state_dict(state["optimizer"])
        started = time.monotonic() - seconds
        bar = tqdm(range(first, steps), stage, initial=first, total=steps, mininterval=5)
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak)
            yield step, optimizer, time.monotonic() - started
            if (step + 1) % 250 == 0 or step + 1 == steps:
                state = {name: part.state_dict() for name, part in parts.items()}
                state |= {"optimizer": optimizer.state_dict(), "step": step + 1, "seconds": time.monotonic() - started}
                with replacing(self.path(stage)) as temporary:
                    torch.save(state, temporary)


def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def train_vision(run: Run, model, steps: int, peak: float) -> None:
    tower = model.model.vision_tower
    heads = VisionHeads(model.config.vision_config.hidden_size)
    image_processor = build_image_processor()
    parameters = [*tower.parameters(), *heads.parameters()]
    for step, optimizer, seconds in run.steps("vision", steps, peak, {"model": model, "heads": heads}, parameters):
        pixels, labels, pairs = vision_batch(run.rng(1, step), image_processor, 12, 6, TRAINING_SCENES)
        with torch.autocast("cpu", torch.bfloat16):
            predictions = heads(tower(pixels, output_hidden_states=True))
        loss = vision_loss(*predictions, labels, pairs)
        update(optimizer, loss)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            pixels, labels, pairs = vision_batch(run.rng(2), image_processor, 24, 12, FOLLOWED_SCENES)
            with torch.no_grad():
                dense, tap_pairs, _ = heads(tower(pixels, output_hidden_states=True))
            accuracy = vision_accuracy(dense, tap_pairs, labels, pairs)
            run.log(stage="vision", step=step + 1, seconds=round(seconds), loss=loss.item(), held_out=rounded(accuracy))


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


class ScenePool:
    """The training scenes in use, more and more of them, so that training starts before all features are computed."""

    def __init__(self, model, kind: str, shards: int, work_dir: Path):
        self.model, self.kind, self.shards, self.work_dir = model, kind, shards, work_dir
        self.samples: list[Sample] = []

    def grow(self, shards: int) -> None:
        while len(self.samples) < SHARD * min(shards, self.shards):
            self.samples += cached_scenes(self.model, self.kind, len(self.samples) // SHARD, self.work_dir)

    def draw(self, rng: np.random.Generator, number: int) -> list[Sample]:
        if self.kind == "video":
            return [self.samples[i] for i in rng.choice(len(self.samples), number, replace=False)]
        size = IMAGE_SIZES[rng.integers(len(IMAGE_SIZES))]
        samples = []
        while len(samples) < number:
            sample = self.samples[rng.integers(len(self.samples))]
            samples += [sample] if sample.scene.frames.shape[1:3] == size else []
        return samples


def train_language(run: Run, model, tokenizer: Tokenizer, steps: int, peak: float, args: argparse.Namespace) -> None:
    """Projector and language model on cached features: single frames first, then whole videos and images."""
    head = PositionHead(model.config.text_config.hidden_size)
    parameters = [p for name, p in model.named_parameters() if "vision_tower" not in name]
    parameters += head.parameters()
    questioner = Questioner(model, tokenizer)
    pools = {"video": ScenePool(model, "video", args.video_shards, run.work_dir)}
    pools["image"] = ScenePool(model, "image", args.image_shards, run.work_dir)
    test = None
    recent: defaultdict[str, list[float]] = defaultdict(list)
    for step, optimizer, seconds in run.steps("language", steps, peak, {"model": model, "head": head}, parameters):
        rng = run.rng(3, step)
        warm = step < args.frame_steps
        kind = "frames" if warm else rng.choice(["videos", "images", "frames"], p=[0.5, 0.4, 0.1])
        pools["video"].grow(1 + step // args.shard_steps)
        if not warm:
            pools["image"].grow(1 + (step - args.frame_steps) // args.shard_steps)
        batch = {"videos": VIDEO_BATCH, "images": IMAGE_BATCH, "frames": FRAME_BATCH}[kind]
        samples = pools["image" if kind == "images" else "video"].draw(rng, batch)
        with torch.autocast("cpu", torch.bfloat16):
            features = stack(samples)
            visual, pack = getattr(questioner, kind)(samples, features, rng)
            loss, right = answer_pack(model, pack, visual)
            position_loss = head(model.model.multi_modal_projector(features))
        update(optimizer, loss + 0.5 * position_loss)
        remember(recent, kind, pack, right)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            run.log(
                stage="language",
                step=step + 1,
                seconds=round(seconds),
                loss=round(loss.item(), 4),
                position_loss=round(position_loss.item(), 4),
                scenes={name: len(pool.samples) for name, pool in pools.items()},
                training=averages(recent),
            )
        if (step + 1) % 500 == 0 or step + 1 == steps:
            test = test or held_out_scenes(model)
            run.log(stage="language", step=step + 1, seconds=round(seconds), held_out=evaluate(model, tokenizer, test))


def remember(recent: defaultdict[str, list[float]], kind: str, pack: Pack, right: torch.Tensor) -> None:
    for type_, hit in zip(pack.types, right.tolist(), strict=True):
        recent[f"{kind} {type_}"].append(hit)


def averages(recent: defaultdict[str, list[float]]) -> dict[str, float]:
    """Accuracy on training questions since the last call."""
    result = rounded({name: float(np.mean(hits)) for name, hits in sorted(recent.items())})
    recent.clear()
    return result


@torch.no_grad()
def evaluate(model, tokenizer: Tokenizer, samples: dict[str, list[Sample]]) -> dict[str, dict[str, float]]:
    """Share of right answers per kind of scene and question type, on the scenes' own questions, in float32."""
    packer = Packer(tokenizer)
    result = {}
    for kind, scenes in samples.items():
        hits: defaultdict[str, list[bool]] = defaultdict(list)
        groups = defaultdict(list)
        for sample in scenes:
            groups[sample.scene.frames.shape[1:3]].append(sample)
        for size, group in groups.items():
            for start in range(0, len(group), 32):
                part = group[start : start + 32]
                visual = project(model, stack(part), size if kind == "image" else None)
                prefix = packer.prefix(IMAGE if kind == "image" else VIDEO, visual.shape[1])
                pack = packer(prefix, [list(sample.scene.questions) for sample in part])
                _, right = answer_pack(model, pack, visual)
                for type_, hit in zip(pack.types, right.tolist(), strict=True):
                    hits[type_].append(hit)
        result[kind] = summary(hits)
    return result


def summary(hits: dict[str, list[bool]]) -> dict[str, float]:
    """Share of right answers per question type and over all questions, and how many there were."""
    everything = [hit for type_hits in hits.values() for hit in type_hits]
    accuracy = rounded({type_: float(np.mean(hits[type_])) for type_ in VIDEO_TYPES if type_ in hits})
    return accuracy | {"all": round(float(np.mean(everything)), 4), "questions": len(everything)}


# --------------------------------------------------------------------------------------------------------------- export


# Module names and the weight names of the public LLaVA-NeXT-Video checkpoints, which transformers 4.57 and 5.x read.
PUBLIC_NAMES = {
    "model.vision_tower.vision_model.": "vision_tower.vision_model.",  # 4.57
    "model.vision_tower.": "vision_tower.vision_model.",  # 5.x
    "model.language_model.": "language_model.model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
    "lm_head.": "language_model.lm_head.",
}


def public_layout(model) -> dict[str, torch.Tensor]:
    weights = {}
    for name, weight in model.state_dict().items():
        own = next(prefix for prefix in PUBLIC_NAMES if name.startswith(prefix))
        weights[PUBLIC_NAMES[own] + name.removeprefix(own)] = weight.float().contiguous()
    return weights


def export(model, tokenizer: Tokenizer, output: Path) -> None:
    """The checkpoint as a folder that transformers 4.57 and 5.x read with their stock classes."""
    output.mkdir(parents=True, exist_ok=True)
    text = model.config.text_config
    ids = {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids, do_sample=False, max_new_tokens=16).save_pretrained(output)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = "float32"
    model.config.save_pretrained(output)
    save_file(public_layout(model), output / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(output / "tokenizer.json"))
    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    # Written by hand: the class name that 5.x writes is unknown to 4.57.
    tokenizer_config = named | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_LENGTH,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": [IMAGE, VIDEO],
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token in SPECIAL_TOKENS
        },
    }
    side = {"height": FRAME_SIZE, "width": FRAME_SIZE}
    pixels = {
        "do_resize": True,
        "size": {"shortest_edge": FRAME_SIZE},
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": True,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
        "do_convert_rgb": True,
    }
    processor_class = {"processor_class": "LlavaNextVideoProcessor"}
    write_json(output / "tokenizer_config.json", tokenizer_config | processor_class)
    write_json(output / "special_tokens_map.json", named | {"additional_special_tokens": [IMAGE, VIDEO]})
    write_json(
        output / "preprocessor_config.json",
        pixels
        | {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": GRID_PINPOINTS, "do_pad": True}
        | processor_class,
    )
    write_json(
        output / "video_preprocessor_config.json",
        pixels
        | {"video_processor_type": "LlavaNextVideoVideoProcessor", "do_sample_frames": True, "num_frames": NUM_FRAMES}
        | processor_class,
    )
    write_json(
        output / "processor_config.json",
        processor_class
        | {
            "patch_size": PATCH_SIZE,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "image_token": IMAGE,
            "video_token": VIDEO,
        },
    )


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


# -------------------------------------------------------------------------------------------------------------- command


def build_model(tokenizer: Tokenizer, seed: int) -> LlavaNextVideoForConditionalGeneration:
    torch.manual_seed(seed)
    return LlavaNextVideoForConditionalGeneration(build_config(tokenizer))


def evaluate_generation(folder: Path, number: int) -> dict[str, dict[str, float]]:
    """Accuracy of the exported folder on `number` held-out scenes of each kind, through stock processor and `generate`."""
    model = LlavaNextVideoForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    first = FOLLOWED_SCENES.stop
    result = {}
    for kind, sample, placeholder in (("video", sample_video, VIDEO), ("image", sample_image, IMAGE)):
        hits: defaultdict[str, list[bool]] = defaultdict(list)
        for seed in tqdm(range(first, first + number), f"answers about {kind}s", mininterval=5):
            scene = sample(seed)
            questions = scene.questions
            prompts = [f"USER: {placeholder}{first_turn(question)}" for question in questions]
            media = {"videos": [scene.frames] * len(questions)}
            if kind == "image":
                media = {"images": [Image.fromarray(scene.frames[0])] * len(questions)}
            inputs = processor(text=prompts, **media, padding=True, return_tensors="pt")
            generated = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
            answers = processor.tokenizer.batch_decode(generated, skip_special_tokens=True)
            for question, answer in zip(questions, answers, strict=True):
                hits[question.type].append(answer.strip() == question.answer)
        result[kind] = summary(hits)
    return result


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--output", type=Path, required=True, help="folder of the finished checkpoint")
    parser.add_argument(
        "--work-dir", type=Path, required=True, help="folder for stage checkpoints, cached features and log"
    )
    parser.add_argument("--seed", **number, default=0, help="seed of weights and batches (default: %(default)s)")
    parser.add_argument("--threads", **number, default=os.cpu_count(), help="CPU threads (default: one for each core)")
    parser.add_argument("--vision-steps", **number, default=900, help="default: %(default)s")
    parser.add_argument("--language-steps", **number, default=9000, help="default: %(default)s")
    parser.add_argument(
        "--frame-steps", **number, default=2000, help="language steps on single frames (default: %(default)s)"
    )
    parser.add_argument(
        "--video-shards", **number, default=7, help=f"{SHARD} training videos each (default: %(default)s)"
    )
    parser.add_argument(
        "--image-shards", **number, default=3, help=f"{SHARD} training images each (default: %(default)s)"
    )
    parser.add_argument(
        "--shard-steps", **number, default=900, help="steps before the next shard is added (default: %(default)s)"
    )
    parser.add_argument(
        "--evaluate", **number, default=200, help="held-out scenes of the final evaluation (default: %(default)s)"
    )
    args = parser.parse_args()
    for name, value in vars(args).items():
        if isinstance(value, int) and value < (name in ("threads", "video_shards", "image_shards", "shard_steps")):
            parser.error(f"--{name.replace('_', '-')} {value}: too small")
    if args.evaluate > TABLES_START - FOLLOWED_SCENES.stop:
        parser.error(
            f"--evaluate {args.evaluate}: at most {TABLES_START - FOLLOWED_SCENES.stop}, then come the scenes of the tables"
        )
    output_folder(args.output)
    output_folder(args.work_dir, "--work-dir")
    return args


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, args.seed)
    run = Run(args.work_dir, args.seed)
    train_vision(run, model, args.vision_steps, 1.5e-3)
    train_language(run, model, tokenizer, args.language_steps, 1e-3, args)
    export(model, tokenizer, args.output)
    run.log(stage="final", scenes=args.evaluate, held_out=evaluate_generation(args.output, args.evaluate))
    shutil.copy(run.log_path, args.output / "training_log.jsonl")


if __name__ == "__main__":
    main()
