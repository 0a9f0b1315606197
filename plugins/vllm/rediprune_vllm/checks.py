"""What the engine is told when it starts, and what it refuses."""

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from .families import REFUSED, SERVED
from .repository import class_of, plain_config

NAME = "rediprune"  # of the renderer, the tokenizer, the video loader and the loader of weights
POSITIONS = 2**17  # that a token of an unpruned prompt can have


class PrunedConfig(VerifyAndUpdateConfig):
    """What vLLM asks about a configuration of one of the families."""

    @staticmethod
    def verify_and_update_model_config(model_config) -> None:
        """
        Raises:
            ValueError: an argument of the engine that does not work with pruning, or a family that is not served.
        """
        multimodal = model_config.multimodal_config
        if model_config.architecture in REFUSED:
            raise ValueError(
                f"{model_config.architecture} is not served by this package yet: {REFUSED[model_config.architecture]}. Run it with "
                f"transformers, or serve one of {', '.join(SERVED)}."
            )
        refuse(
            {
                f"--tokenizer-mode {model_config.tokenizer_mode}": model_config.tokenizer_mode
                not in ("auto", "hf", NAME),
                "--skip-tokenizer-init": model_config.skip_tokenizer_init,
                "--enable-prompt-embeds": model_config.enable_prompt_embeds,
                "--enable-mm-embeds": multimodal.enable_mm_embeds,
                "--language-model-only": multimodal.language_model_only,
                "--mm-encoder-only": multimodal.mm_encoder_only,
                f"--runner {model_config.runner_type}": model_config.runner_type != "generate",
            },
            "a pruned model reads prompts and media as they are sent, since the question decides which tokens stay",
        )
        refuse(
            {"--video-pruning-rate": not _is_set_up(model_config) and multimodal.video_pruning_rate},
            "which tokens stay is said by 'pruning' in config.json",
        )
        refuse(
            {f"--quantization {model_config.quantization}": model_config.quantization},
            "quantized weights have not been tried with it; serve the checkpoint in float16 or bfloat16",
        )
        model_config.tokenizer_mode = NAME  # which finds the renderer of this package
        video = multimodal.media_io_kwargs.setdefault("video", {})
        if video.setdefault("video_backend", NAME) != NAME or len(video) > 1:
            raise ValueError(
                f"--media-io-kwargs has {video} for videos, but the frames of a pruned model are decoded and chosen by its "
                "processor; pass num_frames or fps in --mm-processor-kwargs."
            )
        pruning = _pruning(model_config)
        if moves_positions(pruning):
            text_config = model_config.hf_config.get_text_config()
            # Four rows of positions for each token, and embeddings that bring their own: what vLLM has for M-RoPE and for
            # its own video pruning.
            text_config.rope_parameters = {**text_config.rope_parameters, "mrope_section": [1, 0, 0, 0]}
            multimodal.video_pruning_rate = 0.5  # any: vLLM asks only whether there is one
            kind = text_config.rope_parameters.get("rope_type", "default")
            if kind not in ("default", "linear", "llama3"):
                raise ValueError(
                    f"the language model has rope_type={kind!r}, whose angles depend on the length of the prompt; set "
                    "pruning.positions to 'compact' and pruning.proportional_attention to false in config.json."
                )

    @staticmethod
    def verify_and_update_config(vllm_config) -> None:
        """
        Raises:
            ValueError: an argument of the engine that does not work with pruning.
        """
        model_config, parallel, load = vllm_config.model_config, vllm_config.parallel_config, vllm_config.load_config
        refuse(
            {
                f"--pipeline-parallel-size {parallel.pipeline_parallel_size}": parallel.pipeline_parallel_size > 1,
                "--speculative-config": vllm_config.speculative_config is not None,
                "--enable-lora": vllm_config.lora_config is not None,
                "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
                "--ec-transfer-config": getattr(vllm_config, "ec_transfer_config", None) is not None,
            },
            "it has not been tried with pruned tokens",
        )
        pruning = _pruning(model_config)
        if pruning.inner is not None:
            raise ValueError(
                f"{pruning.inner!r} leaves visual tokens behind inside the language model, but here all layers share the places of "
                "one cache. Set pruning.method to one that prunes before the language model, and pruning.inner_method to null."
            )
        if pruning.drops_tokens and pruning.distance_bias:
            raise ValueError(
                "distance_bias adds a number for each pair of tokens to attention, which its kernels here do not take. Set "
                "pruning.distance_bias to false in config.json."
            )
        if pruning.prunes and pruning.resolved("proportional_attention"):
            refuse(
                {
                    f"--kv-cache-dtype {vllm_config.cache_config.cache_dtype}": "fp8"
                    in vllm_config.cache_config.cache_dtype,
                    "a language model with a sliding window": model_config.hf_config.get_text_config()
                    .to_dict()
                    .get("sliding_window"),
                },
                "proportional_attention keeps the number of tokens that each stands for in the keys, whole; set "
                "pruning.proportional_attention to false in config.json",
            )
        if getattr(model_config.hf_config, "weights_from", None) is not None and load.load_format != "dummy":
            refuse(
                {f"--load-format {load.load_format}": load.load_format not in ("auto", "hf", "safetensors", NAME)},
                "the weights of a linked variant are read as safetensors files",
            )
            load.load_format = NAME


def moves_positions(pruning) -> bool:
    """Whether tokens have positions, or weights, of their own under a pruning block."""
    return pruning.prunes and (
        pruning.resolved("positions") != "compact" or bool(pruning.resolved("proportional_attention"))
    )


def refuse(arguments: dict, reason: str) -> None:
    """Raises ValueError for the first of the arguments, {argument: whether it was given}, that was."""
    for argument, given in arguments.items():
        if given:
            raise ValueError(f"{argument} does not work with this model: {reason}.")


def _pruning(model_config):
    model_class = class_of(model_config, "AutoModelForImageTextToText")
    return plain_config(model_class, model_config.hf_config).pruning


def _is_set_up(model_config) -> bool:
    return model_config.tokenizer_mode == NAME
