"""Tells lmms-eval of the model `rediprune`."""


def manifest():
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="rediprune", chat_class_path="rediprune_lmms_eval.model.ReDiPrune")
