"""LLaVA-NeXT-Video: CLIP tower, its last layer but one, frames pooled to 36 tokens, images in tiles, Llama."""

from functools import cached_property

import torch
from PIL import Image
from toy_world import FRAME_SIZE, NUM_FRAMES, PATCH_SIZE, object_map
from training.exporting import PIXELS
from training.family import LARGER, Family
from training.pixels import (
    GRID,
    GRID_PINPOINTS,
    build_image_processor,
    frames_to_pixels,
    image_to_pixels,
    stack_frames,
    view_maps,
)
from training.position_heads import PositionHead
from training.tokenizing import BOS, EOS, PAD, vocabulary_size
from training.vision import VisionHeads
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
)

IMAGE, VIDEO = "<image>", "<video>"


class LlavaNextVideo(Family):
    name = "llava_next_video"
    model_class = LlavaNextVideoForConditionalGeneration
    processor_class = "LlavaNextVideoProcessor"
    special_tokens = (BOS, EOS, PAD, IMAGE, VIDEO)
    placeholders = {"image": IMAGE, "video": VIDEO}
    # Module names and the weight names of the public checkpoints, which transformers 4.57 and 5.x read.
    public_names = {
        "model.vision_tower.vision_model.": "vision_tower.vision_model.",  # 4.57
        "model.vision_tower.": "vision_tower.vision_model.",  # 5.x
        "model.language_model.": "language_model.model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.image_newline": "image_newline",
        "lm_head.": "language_model.lm_head.",
    }

    def build_config(self, tokenizer):
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
            initializer_range=LARGER,
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

    def in_tower(self, name):
        return "vision_tower" in name

    # -- vision

    @cached_property
    def image_processor(self):
        return build_image_processor()

    def image_views(self, scene):
        return image_to_pixels(self.image_processor, scene), view_maps(object_map(scene))

    def vision_heads(self, config):
        return VisionHeads(config.vision_config.hidden_size)

    def look(self, model, pixels):
        outputs = model.model.vision_tower(pixels, output_hidden_states=True)
        tap = outputs.hidden_states[-2]
        return tap[:, 1:], (tap[:, 0], outputs.pooler_output)

    def tapped(self, model, pixels: torch.Tensor) -> torch.Tensor:
        """Features of the tapped layer without the class token: (N, 3, 96, 96) -> (N, 144, C)."""
        outputs = model.model.vision_tower(pixels, output_hidden_states=True)
        return outputs.hidden_states[model.config.vision_feature_layer][:, 1:]

    # -- language

    def encode(self, model, kind, scenes):
        if kind == "video":
            features = model.model.vision_resampler(self.tapped(model, frames_to_pixels(stack_frames(scenes))))
        else:
            pixels = [image_to_pixels(self.image_processor, scene) for scene in scenes]
            features = self.tapped(model, torch.cat(pixels))
        return list(features.half().unflatten(0, (len(scenes), -1)))

    def project(self, model, features, image_size=None):
        """Tiles of images are put together, and their rows end with a newline token."""
        projected = model.model.multi_modal_projector(features)
        if image_size is None:
            return projected.flatten(1, 2)
        sizes = torch.tensor([image_size] * len(features))
        packed = model.model.pack_image_features(list(projected), sizes, "default", model.model.image_newline)[0]
        return torch.stack(list(packed))

    def position_head(self, model):
        return PositionHead(model.config.text_config.hidden_size)

    def position_loss(self, model, head, features, pack, states):
        return head(model.model.multi_modal_projector(features))

    # -- export

    def processor_files(self):
        side = {"height": FRAME_SIZE, "width": FRAME_SIZE}
        pixels = PIXELS | {"size": {"shortest_edge": FRAME_SIZE}, "do_center_crop": True, "crop_size": side}
        images = {
            "image_processor_type": "LlavaNextImageProcessor",
            "image_grid_pinpoints": GRID_PINPOINTS,
            "do_pad": True,
        }
        videos = {
            "video_processor_type": "LlavaNextVideoVideoProcessor",
            "do_sample_frames": True,
            "num_frames": NUM_FRAMES,
        }
        processor = {
            "patch_size": PATCH_SIZE,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "image_token": IMAGE,
            "video_token": VIDEO,
        }
        return {
            "preprocessor_config.json": pixels | images,
            "video_preprocessor_config.json": pixels | videos,
            "processor_config.json": processor,
        }

    def media(self, kind, scene, number):
        if kind == "video":
            return {"videos": [scene.frames] * number}
        return {"images": [Image.fromarray(scene.frames[0])] * number}
