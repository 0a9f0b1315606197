"""What a method or a family cannot have is refused when it is configured, with the reason."""

import json

import pytest
from exporting import leftovers, refused
from families import FAMILIES
from rediprune.methods_registry import METHODS
from tiny import PATCH_SIZE, tiny_config
from transformers import CLIPVisionConfig, SiglipVisionConfig

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
OTHER_TOWERS = ["siglip_vision_model", "pixtral"]
MERGING = [name for name, method in METHODS.items() if method.merges_in_encoder]


@EVERY_FAMILY
@pytest.mark.parametrize("tower", OTHER_TOWERS)
def test_a_tower_that_is_no_clip(family, tower, tmp_path):
    message = f"'vision_config' is of the type '{tower}', but must be 'clip_vision_model'.*'{family.name}' checkpoint"
    with pytest.raises(ValueError, match=message):
        family.config_class(vision_config={"model_type": tower})
    config = tiny_config(family.stock_config_class).to_dict()
    config["vision_config"]["model_type"] = tower
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        family.config_class.from_pretrained(tmp_path)


@EVERY_FAMILY
def test_a_tower_that_is_set_later(family):
    config = family.config()
    with pytest.raises(ValueError, match="'siglip_vision_model', but must be 'clip_vision_model'"):
        config.vision_config = SiglipVisionConfig()
    config.vision_config = CLIPVisionConfig(patch_size=PATCH_SIZE)
    assert config.vision_config.patch_size == PATCH_SIZE


@EVERY_FAMILY
def test_a_tower_without_a_type_is_clip(family):
    """As in the stock class."""
    config = family.config_class(vision_config={"hidden_size": 16, "num_attention_heads": 2})
    assert config.vision_config.model_type == "clip_vision_model" and config.vision_config.hidden_size == 16


def test_an_export_of_a_base_with_another_tower(tmp_path):
    """Nothing is written."""
    (tmp_path / "base").mkdir()
    base = FAMILIES[0].save_stock_checkpoint(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["vision_config"]["model_type"] = "siglip_vision_model"
    (base / "config.json").write_text(json.dumps(config))
    message = refused(base, "--output", tmp_path / "variant")
    assert "'siglip_vision_model', but must be 'clip_vision_model'" in message
    assert leftovers(tmp_path) == ["base"]


@pytest.mark.parametrize("method", MERGING)
def test_a_method_that_merges_where_cls_is_a_token(method, tmp_path):
    """Wherever it is configured; a block by itself is of no family, so that there the next call refuses it."""
    family = next(family for family in FAMILIES if not family.config_class.can_merge_in_encoder)
    message = f"method='{method}' merges tokens inside the vision encoder.*'video_llava': CLS of each frame"
    config, model = family.config(), family.model(keep_ratio=0.3)
    config.save_pretrained(tmp_path)
    inputs = family.inputs(family.processor(keep_ratio=0.3), 0)
    model.config.pruning.method = method
    for configure in (
        lambda: family.config(pruning={"method": method}),
        lambda: setattr(config, "pruning", {"method": method}),
        lambda: family.config_class.from_pretrained(tmp_path, pruning={"method": method}),
        lambda: family.processor(method=method),
        lambda: model(**inputs),
        lambda: model.generate(**inputs),
    ):
        with pytest.raises(ValueError, match=message):
            configure()
    assert config.pruning.method == "rediprune"
    (tmp_path / "base").mkdir()
    base = family.save_stock_checkpoint(tmp_path / "base")
    assert f"method='{method}' merges" in refused(base, "--method", method, "--output", tmp_path / "variant")
    assert not (tmp_path / "variant").exists()


def test_a_block_of_another_family_is_not_bound_to_this_one():
    """A block is copied where it is set, so that it is checked for the family that it came to."""
    takes = [family for family in FAMILIES if family.config_class.can_merge_in_encoder]
    block = takes[0].config(pruning={"method": MERGING[0]}).pruning
    for family in FAMILIES:
        if family in takes:
            assert family.config(pruning=block).pruning.method == MERGING[0]
        else:
            with pytest.raises(ValueError, match="CLS of each frame"):
                family.config(pruning=block)
