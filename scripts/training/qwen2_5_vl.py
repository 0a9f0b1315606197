"""Qwen2.5-VL: a tower with attention in windows, squares of patches merged, positions of three numbers (M-RoPE).

Frames are not paired, so that a video has as many visual tokens as in the other families: 8 x 36. They lie half a second apart,
which is one step of time in the positions.
"""

from dataclasses import replace

import torch
from toy_world import FRAME_SIZE, FRAMES_PER_SECOND, NUM_FRAMES, PATCH_SIZE, object_map
from training.exporting import PIXELS
from training.family import LARGER, Family
from training.pixels import frames_to_pixels, stack_frames
from training.position_heads import PlaceHead
from training.qwen_tower import encode_grid, in_merge_order
from training.recipe import Recipe
from training.tokenizing import BOS, EOS, PAD, chat_template, vocabulary_size
from training.vision import VisionHeads
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.video_utils import VideoMetadata

START, END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
MERGE = 2
CELL = MERGE * PATCH_SIZE  # pixels per side of a visual token
TOKENS_PER_SECOND = 2
RARE = 0.2  # share of batches whose frames lie two steps apart, as in clips of one frame a second


class Qwen2_5VL(Family):
    name = "qwen2_5_vl"
    model_class = Qwen2_5_VLForConditionalGeneration
    processor_class = "Qwen2_5_VLProcessor"
    special_tokens = (BOS, EOS, PAD, START, END, IMAGE, VIDEO)
    placeholders = {"image": IMAGE, "video": VIDEO}
    public_names = {"model.visual.": "visual.", "model.language_model.": "model.", "lm_head.": "lm_head."}
    chat_template = chat_template(f"{START}{IMAGE}{END}", f"{START}{VIDEO}{END}")
    # An image is one view, where it is three in other families.
    recipe = Recipe(vision_images=3, images=6)

    def build_config(self, tokenizer):
        """The stock configuration of the tiny checkpoint: about 2.4 M parameters.

        Rotations are slow (a small base), since all positions of a chat are below a hundred.
        """
        vision = dict(
            depth=6,
            hidden_size=128,
            intermediate_size=240,
            num_heads=4,
            patch_size=PATCH_SIZE,
            spatial_merge_size=MERGE,
            temporal_patch_size=1,
            tokens_per_second=TOKENS_PER_SECOND,
            window_size=FRAME_SIZE // 2,
            fullatt_block_indexes=[2, 5],
            out_hidden_size=128,
            initializer_range=LARGER,
        )
        rope = {"rope_type": "default", "mrope_section": [4, 6, 6]}
        text = dict(
            vocab_size=vocabulary_size(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=self.max_length,
            bos_token_id=tokenizer.token_to_id(BOS),
            eos_token_id=tokenizer.token_to_id(EOS),
            pad_token_id=tokenizer.token_to_id(PAD),
            rope_theta=100.0,
            rope_scaling=rope,
            initializer_range=LARGER,
            tie_word_embeddings=False,
        )
        return Qwen2_5_VLConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=tokenizer.token_to_id(IMAGE),
            video_token_id=tokenizer.token_to_id(VIDEO),
            vision_start_token_id=tokenizer.token_to_id(START),
            vision_end_token_id=tokenizer.token_to_id(END),
            tie_word_embeddings=False,
        )

    def in_tower(self, name):
        """The merger is the projector."""
        return "visual." in name and "merger" not in name

    # -- vision

    def image_views(self, scene):
        """The whole image, whatever its size."""
        return frames_to_pixels(scene.frames), [object_map(scene)]

    def vision_heads(self, config):
        """Without positions: the tower has none but those between patches."""
        return VisionHeads(config.vision_config.hidden_size, positions=False, class_token=False)

    def look(self, model, pixels):
        return encode_grid(model.model.visual, pixels).flatten(1, 2), ()

    # -- language

    def encode(self, model, kind, scenes):
        """Squares of patches in the order of the merger, (T, L, 4 C)."""
        groups = [scenes] if kind == "video" else [[scene] for scene in scenes]
        features = []
        for group in groups:
            grid = encode_grid(model.model.visual, frames_to_pixels(stack_frames(group)))
            features += in_merge_order(grid, MERGE).half().unflatten(0, (len(group), -1))
        return features

    def project(self, model, features, image_size=None):
        merger = model.model.visual.merger
        return merger(features.unflatten(-1, (MERGE**2, -1))).unflatten(0, (len(features), -1))

    def written(self, kind):
        """Between its marks."""
        return f"{START}{self.placeholders[kind]}{END}"

    def place(self, pack, features, image_size=None, rng=None):
        """Visual tokens count from where they start, and text goes on behind the larger side of their grid.

        Some batches are as transformers 4.57 has it: text goes on behind the largest number, that of time included.
        """
        height, width = (side // CELL for side in image_size or (FRAME_SIZE, FRAME_SIZE))
        sides = (torch.arange(features.shape[1]), torch.arange(height), torch.arange(width))
        places = torch.stack(torch.meshgrid(*sides, indexing="ij")).flatten(1)
        slow, older = (False, False) if rng is None else rng.random(2) < RARE
        found = places * torch.tensor([2 if slow else 1, 1, 1])[:, None]
        advance = int(found.max()) + 1 if older else max(height, width)
        mark = int((pack.segment[0] == 0).sum()) - 1  # that behind the visual tokens
        start = mark - places.shape[1]
        position = pack.position.expand(3, -1, -1).clone()
        position[:, :, mark:] += start + advance - mark
        position[:, :, start:mark] = start + found[:, None]
        return replace(pack, position=position.clamp_min(0), places=places.T)

    def position_head(self, model):
        return PlaceHead(model.config.text_config.hidden_size)

    def position_loss(self, model, head, features, pack, states):
        """Of the states behind the second layer."""
        return head(pack, states[2])

    # -- export

    def published_config(self, values):
        """As in the public checkpoints: without a block for the language model, and with the older keys of rotations."""
        text = values.pop("text_config")
        rope = text.pop("rope_parameters", None) or text.pop("rope_scaling")
        text["rope_theta"] = rope.get("rope_theta", text.get("rope_theta"))
        text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        return text | values

    def processor_files(self):
        cells = {"patch_size": PATCH_SIZE, "merge_size": MERGE, "temporal_patch_size": 1}
        frame = FRAME_SIZE**2
        images = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "size": {"shortest_edge": frame, "longest_edge": 2 * frame},
            "min_pixels": frame,
            "max_pixels": 2 * frame,
        }
        videos = {
            "video_processor_type": "Qwen2VLVideoProcessor",
            "size": {"shortest_edge": frame, "longest_edge": frame},
            "min_pixels": frame,
            "max_pixels": frame,
            "do_sample_frames": True,
            "num_frames": NUM_FRAMES,
            "fps": None,
        }
        return {
            "preprocessor_config.json": PIXELS | cells | images,
            "video_preprocessor_config.json": PIXELS | cells | videos,
            "processor_config.json": {},
        }

    def media(self, kind, scene, number):
        media = super().media(kind, scene, number)
        if kind == "video":
            frames = dict(total_num_frames=NUM_FRAMES, frames_indices=list(range(NUM_FRAMES)))
            media["video_metadata"] = [VideoMetadata(fps=FRAMES_PER_SECOND, **frames) for _ in range(number)]
        return media
