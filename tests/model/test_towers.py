"""What a method or a family cannot have is refused when it is configured, with the reason."""

import json

import pytest
from exporting import leftovers, refused
from families import FAMILIES
from rediprune.methods_base import CLS_SIGNALS
from rediprune.methods_registry import METHODS
from tiny import PATCH_SIZE, tiny_config
from transformers import CLIPVisionConfig, SiglipVisionConfig
from transformers.models.auto import CONFIG_MAPPING

CLIP, SIGLIP = CLIPVisionConfig.model_type, SiglipVisionConfig.model_type
# Those whose stock config takes a tower of any type.
OPEN = [family for family in FAMILIES if family.config_class.tower_type in (CLIP, SIGLIP)]
EVERY_FAMILY = pytest.mark.parametrize("family", OPEN, ids=lambda family: family.name)
WITHOUT_CLS = [family for family in FAMILIES if family.config_class.tower_type != CLIP]
TOWERS = [CLIP, SIGLIP, "pixtral"]
MERGING = [name for name, method in METHODS.items() if method.merges_in_encoder]


@EVERY_FAMILY
@pytest.mark.parametrize("tower", TOWERS)
def test_a_tower_of_another_type(family, tower, tmp_path):
    right = family.config_class.tower_type
    if tower == right:
        return
    message = f"'vision_config' is of the type '{tower}', but must be '{right}'.*'{family.name}' checkpoint"
    with pytest.raises(ValueError, match=message):
        family.config_class(vision_config={"model_type": tower})
    config = tiny_config(family.stock_config_class).to_dict()
    config["vision_config"]["model_type"] = tower
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        family.config_class.from_pretrained(tmp_path)


@EVERY_FAMILY
def test_a_tower_that_is_set_later(family):
    config, right = family.config(), family.config_class.tower_type
    wrong = SIGLIP if right == CLIP else CLIP
    with pytest.raises(ValueError, match=f"'{wrong}', but must be '{right}'"):
        config.vision_config = CONFIG_MAPPING[wrong]()
    config.vision_config = CONFIG_MAPPING[right](patch_size=PATCH_SIZE)
    assert config.vision_config.patch_size == PATCH_SIZE


@EVERY_FAMILY
def test_a_tower_without_a_type_is_that_of_the_family(family):
    """As in the stock class."""
    config = family.config_class(vision_config={"hidden_size": 16, "num_attention_heads": 2})
    assert config.vision_config.model_type == family.config_class.tower_type
    assert config.vision_config.hidden_size == 16


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


REFUSED = [
    (family, method) for family in FAMILIES if not family.config_class.can_merge_in_encoder for method in MERGING
]
REFUSED += [
    (family, name)
    for family in WITHOUT_CLS
    for name, method in METHODS.items()
    if method.required_signals & CLS_SIGNALS
]


@pytest.mark.parametrize("family, method", REFUSED, ids=lambda value: getattr(value, "name", value))
def test_a_method_that_needs_what_the_tower_cannot_give(family, method, tmp_path):
    """Wherever it is configured; a block by itself is of no family, so that there the next call refuses it."""
    if method in MERGING:
        message = f"method='{method}' merges tokens inside the vision encoder.*'{family.name}': .*CLS"
    else:
        message = f"method='{method}' needs what a tower with CLS tells.*'{family.name}', a '.*', has no CLS"
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
    assert f"method='{method}' " in refused(base, "--method", method, "--output", tmp_path / "variant")
    assert not (tmp_path / "variant").exists()


def test_a_block_of_another_family_is_not_bound_to_this_one():
    """A block is copied where it is set, so that it is checked for the family that it came to."""
    takes = [family for family in FAMILIES if family.config_class.can_merge_in_encoder]
    block = takes[0].config(pruning={"method": MERGING[0]}).pruning
    for family in FAMILIES:
        if family in takes:
            assert family.config(pruning=block).pruning.method == MERGING[0]
        else:
            with pytest.raises(ValueError, match="merges tokens inside the vision encoder"):
                family.config(pruning=block)


@pytest.mark.parametrize("family", WITHOUT_CLS, ids=lambda family: family.name)
def test_no_joint_space_with_the_text_of_a_clip(family):
    """A tower of another kind was not made from the CLIP that `text_tower` names."""
    block = {"method": "cdpruner", "text_tower": "openai/clip-vit-large-patch14-336"}
    for configure in (lambda: family.config(pruning=block), lambda: family.processor(**block)):
        with pytest.raises(ValueError, match=f"'text_tower' is 'openai.*'{family.name}'.*no joint space"):
            configure()
