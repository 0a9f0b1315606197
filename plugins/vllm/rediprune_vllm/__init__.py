"""
vLLM with pruned visual tokens: serves every variant of ReDiPrune for Transformers.

Counts, encoders and methods are the code of the variant itself, loaded from its repository; here is what the engine needs around
them.
"""

from .families import REFUSED, SERVED


def register() -> None:
    """The entry point in `vllm.general_plugins`: vLLM calls it in each of its processes, more than once."""
    from vllm import ModelRegistry
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY
    from vllm.platforms import current_platform
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from .checks import NAME, PrunedConfig
    from .loading import LinkedLoader
    from .video import UndecodedVideo

    for family in (*SERVED, *REFUSED):
        ModelRegistry.register_model(family, "rediprune_vllm.model:PrunedModel")
        MODELS_CONFIG_MAP[family] = PrunedConfig
    if NAME not in RENDERER_REGISTRY.renderers:
        RENDERER_REGISTRY.register(NAME, "rediprune_vllm.chat", "ChatRenderer")
        TokenizerRegistry.register(NAME, "vllm.tokenizers.hf", "CachedHfTokenizer")
        VIDEO_LOADER_REGISTRY.register(NAME)(UndecodedVideo)
        register_model_loader(NAME)(LinkedLoader)
    if current_platform.is_cpu():
        from .cpu import see_pruned_positions

        see_pruned_positions()
