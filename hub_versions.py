"""Every workaround for a version of transformers, each with its range of versions, its reason, and when it can go."""

try:
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
except ImportError:
    register_checkpoint_conversion_mapping = None


def loading_options(model_type: str, stock_model_type: str, stock_class) -> dict:
    """What `from_pretrained` of a model class needs, so that the checkpoints of its stock class load."""
    if register_checkpoint_conversion_mapping is None:
        names = {r"^vision_tower\.(?!vision_model\.)": "model.vision_tower.vision_model."}
        return {"key_mapping": {**names, **stock_class._checkpoint_conversion_mapping}}
    mapping = get_checkpoint_conversion_mapping(stock_model_type)
    register_checkpoint_conversion_mapping(model_type, mapping, overwrite=True)
    return {}
