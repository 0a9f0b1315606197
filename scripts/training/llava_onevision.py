"""LLaVA-OneVision: SigLIP tower without a class token, its last layer, frames pooled behind the projector, Qwen2."""

from functools import cached_property

import torch
from toy_world import FRAME_SIZE, NUM_FRAMES, PATCH_SIZE
from training.exporting import PIXELS
from training.family import LARGER
from training.llava_next_video import IMAGE, VIDEO, LlavaNextVideo
from training.pixels import GRID, GRID_PINPOINTS, IMAGE_MEAN, IMAGE_STD, frames_to_pixels, stack_frames
from training.tokenizing import BOS, EOS, PAD, chat_template, vocabulary_size
from training.vision import VisionHeads
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)

SIDE = {"height": FRAME_SIZE, "width": FRAME_SIZE}
ASPECT = "anyres_max_9"


class LlavaOnevision(LlavaNextVideo):
    """Images lie in the same views as those of LLaVA-NeXT-Video, and weights have the same names."""

    name = "llava_onevision"
    model_class = LlavaOnevisionForConditionalGeneration
    processor_class = "LlavaOnevisionProcessor"
    chat_template = chat_template(IMAGE, VIDEO)

    def build_config(self, tokenizer):
        """The stock configuration of the tiny checkpoint: about 2.3 M parameters."""
        vision = SiglipVisionConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=4,
            image_size=FRAME_SIZE,
            patch_size=PATCH_SIZE,
            vision_use_head=False,
        )
        text = Qwen2Config(
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
        return LlavaOnevisionConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=tokenizer.token_to_id(IMAGE),
            video_token_index=tokenizer.token_to_id(VIDEO),
            image_grid_pinpoints=GRID_PINPOINTS,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            vision_aspect_ratio=ASPECT,
            tie_word_embeddings=False,
        )

    # -- vision

    @cached_property
    def image_processor(self):
        options = {"image_mean": list(IMAGE_MEAN), "image_std": list(IMAGE_STD)}
        return LlavaOnevisionImageProcessor(size=SIDE, image_grid_pinpoints=GRID_PINPOINTS, **options)

    def vision_heads(self, config):
        return VisionHeads(config.vision_config.hidden_size, class_token=False)

    def look(self, model, pixels):
        return model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1], ()

    def tapped(self, model, pixels):
        """Features of the last layer: (N, 3, 96, 96) -> (N, 144, C)."""
        return self.look(model, pixels)[0]

    # -- language

    def encode(self, model, kind, scenes):
        """Frames are pooled only behind the projector."""
        if kind == "image":
            return super().encode(model, kind, scenes)
        features = self.tapped(model, frames_to_pixels(stack_frames(scenes)))
        return list(features.half().unflatten(0, (len(scenes), -1)))

    def project(self, model, features, image_size=None):
        """One newline token ends a video; images as in LLaVA-NeXT-Video."""
        projected = model.model.multi_modal_projector(features)
        newline = model.model.image_newline
        if image_size is None:
            pooled = model.model.apply_pooling(projected.flatten(0, 1)).unflatten(0, projected.shape[:2]).flatten(1, 2)
            return torch.cat([pooled, newline.to(pooled.dtype).expand(len(pooled), 1, -1)], 1)
        sizes = torch.tensor([image_size] * len(features))
        packed = model.model.pack_image_features(list(projected), sizes, newline, ASPECT)[0]
        return torch.stack(list(packed))

    # -- export

    def processor_files(self):
        pixels = PIXELS | {"size": SIDE}
        images = {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "image_grid_pinpoints": GRID_PINPOINTS,
            "do_pad": True,
        }
        videos = {
            "video_processor_type": "LlavaOnevisionVideoProcessor",
            "do_sample_frames": True,
            "num_frames": NUM_FRAMES,
        }
        processor = {
            "num_image_tokens": GRID**2,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": ASPECT,
            "image_token": IMAGE,
            "video_token": VIDEO,
        }
        return {
            "preprocessor_config.json": pixels | images,
            "video_preprocessor_config.json": pixels | videos,
            "processor_config.json": processor,
        }

    def media(self, kind, scene, number):
        media = super().media(kind, scene, number)
        return media if kind == "video" else {"images": [[image] for image in media["images"]]}
