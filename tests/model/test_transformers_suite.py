"""transformers' own common tests, run against the class of this repository and against the stock class.

The tests come from the source archive of the installed release, at test time:

    pip download --no-deps --no-binary :all: transformers==$(python -c "import transformers; print(transformers.__version__)")
    TRANSFORMERS_SDIST=transformers-*.tar.gz python -m pytest tests/model/test_transformers_suite.py

The archive holds `ModelTesterMixin` and `ConfigTester`. `GenerationTesterMixin` (tests/generation) is not in it, nor are the
model folders, so generation is tested by this repository's own tests alone.
"""

import importlib
import os
import sys
import tarfile
import tempfile
import types
import unittest
import warnings
from pathlib import Path

import pytest
import torch
import transformers

SDIST = os.environ.get("TRANSFORMERS_SDIST")
if not SDIST:
    pytest.skip("TRANSFORMERS_SDIST does not name the source archive of transformers", allow_module_level=True)
pytest.importorskip("parameterized")

from families import FAMILIES  # noqa: E402
from rediprune.core_layout import FrameSize  # noqa: E402
from transformers import CLIPVisionConfig, LlamaConfig, Qwen2Config, SiglipVisionConfig  # noqa: E402

# What the archive's files import, but the archive does not hold.
ABSENT = {
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": {}},
}


def import_suite(folder):
    """`test_modeling_common` and `test_configuration_common` of the archive, as modules of a package."""
    package = folder / "transformers_suite"
    version = transformers.__version__
    with tarfile.open(SDIST) as archive:
        prefix = f"transformers-{version}/tests/"
        members = [member for member in archive if member.name.startswith(prefix) and member.isfile()]
        if not members:
            raise RuntimeError(
                f"{SDIST} holds no tests of transformers {version}; download the archive of that version"
            )
        for member in members:
            path = package / member.name.removeprefix(prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.extractfile(member).read())
    (package / "__init__.py").touch()
    sys.path.insert(0, str(folder))
    for name, contents in ABSENT.items():
        parent, _, leaf = name.partition(".")
        for full in (f"transformers_suite.{parent}", f"transformers_suite.{name}"):
            module = sys.modules.setdefault(full, types.ModuleType(full))
            module.__path__ = []
        vars(module).update(contents)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pytest marks that are registered elsewhere
        names = ("test_modeling_common", "test_configuration_common")
        return [importlib.import_module(f"transformers_suite.{name}") for name in names]


modeling, configuration = import_suite(Path(tempfile.mkdtemp(prefix="transformers-suite-")))

IMAGE_SIZE, PATCH_SIZE, FRAMES, BATCH = 16, 4, 2, 7
SIDE = IMAGE_SIZE // PATCH_SIZE
TOKENS, VOCABULARY = {"image": 1, "video": 2}, 99
UNPRUNED = {"keep_ratio": 1.0}


class Tester:
    """What the suite asks of a model's tester: a tiny config, and a prompt with one medium of each kind in every row."""

    __test__ = False

    def __init__(self, parent, family, config_class, **config):
        self.parent, self.family, self.config_class, self.config = parent, family, config_class, config
        self.batch_size, self.num_hidden_layers, self.hidden_size, self.num_attention_heads = BATCH, 2, 32, 4
        self.is_training, self.text_tokens, self.pad_token_id = True, 7, 0
        pruning = family.config_class(**config).pruning if config else family.config_class(pruning=UNPRUNED).pruning
        frame, layouts = FrameSize(IMAGE_SIZE, SIDE, [[IMAGE_SIZE, IMAGE_SIZE]], 2, 9), family.model_class.layout_class
        self.num_tokens = {"image": layouts.image(frame, [IMAGE_SIZE, IMAGE_SIZE]).num_placeholders(pruning)}
        if "video" in family.kinds:
            self.num_tokens["video"] = layouts.video(frame, FRAMES, pruning).num_placeholders(pruning)
        self.seq_length = sum(self.num_tokens.values()) + self.text_tokens
        self.encoder_seq_length = self.key_length = self.seq_length

    def get_config(self):
        onevision = self.family.name == "llava_onevision"
        text = (Qwen2Config if onevision else LlamaConfig)(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=3,
            eos_token_id=4,
        )
        vision = (SiglipVisionConfig if onevision else CLIPVisionConfig)(
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            hidden_size=32,
            **({"vision_use_head": False} if onevision else {"projection_dim": 32}),
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
        options = {}
        for kind, number in self.num_tokens.items():
            options |= {f"{kind}_token_index": TOKENS[kind], f"{kind}_seq_length": number}
        if self.family.tiles_images:
            options["image_grid_pinpoints"] = [[IMAGE_SIZE, IMAGE_SIZE]]
        return self.config_class(text_config=text, vision_config=vision, **options, **self.config)

    def prepare_config_and_inputs_for_common(self):
        input_ids = torch.randint(5, VOCABULARY, (BATCH, self.seq_length))
        start = 0
        for kind, number in self.num_tokens.items():
            input_ids[:, start : start + number] = TOKENS[kind]
            start += number
        views = [2] if self.family.tiles_images else []
        pixels = "pixel_values_images" if self.family.name == "video_llava" else "pixel_values"
        inputs = {pixels: torch.rand(BATCH, *views, 3, IMAGE_SIZE, IMAGE_SIZE)}
        if "video" in self.num_tokens:
            inputs["pixel_values_videos"] = torch.rand(BATCH, FRAMES, 3, IMAGE_SIZE, IMAGE_SIZE)
        if views:
            inputs["image_sizes"] = torch.full((BATCH, 2), IMAGE_SIZE)
        inputs |= {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        return self.get_config(), inputs

    def prepare_config_and_inputs(self):
        config, inputs = self.prepare_config_and_inputs_for_common()
        return config, next(iter(inputs.values()))


def without(reason, *names):
    """Tests of the suite that cannot hold, and why."""
    return {name: unittest.skip(reason)(lambda self, *args: None) for name in names}


# For all classes.
SETTING = without("generation tests are not in the source archive", "test_generation_tester_mixin_inheritance")

# For the classes of this repository.
OWN = {
    **without(
        "loads weights that lack some tensors or all; here that is an error, so that weights are never random",
        "test_can_init_all_missing_weights",
        "test_correct_missing_keys",
        "test_model_weights_reload_no_missing_tied_weights",
    ),
    **without(
        "looks for the class without a head in the library's list, and there is none here", "test_torch_save_load"
    ),
    **without("wants the old name of the cache deprecated; here both names are right", "test_bc_cache_name_forward"),
}

# Where tokens are pruned.
PRUNED = without(
    "looks for the outputs of the vision tower; here the kept indices are given instead",
    "test_multimodal_outputs_are_returned",
)


def failing_in_stock(family):
    """Tests that the stock class of a family fails, too."""
    kinds = ["image"] * family.tiles_images + ["video"] * ("video" in family.kinds)
    hidden = ["test_can_capture_specific_layers_hidden_states"] * (family.name == "llava")
    return without("asks for some states of the vision tower, without the tapped ones", *hidden) | without(
        "expects one feature tensor for each image and video; here an image has two views, or a video two frames, and the "
        "stock class fails, too",
        *(f"test_get_{kind}_features_output_{number}" for kind in kinds for number in range(3)),
    )


class Common:
    """What all runs share."""

    _is_composite = True
    additional_model_inputs = ("pixel_values", "pixel_values_images", "pixel_values_videos", "image_sizes")
    test_resize_embeddings = True
    test_pruning = False  # of attention heads, in 4.57; composite models have none
    test_head_masking = False  # in 4.57; Llama takes no head mask, and the stock class fails, too
    test_all_params_have_gradient = False  # the tap is before the last vision layer

    def setUp(self):
        self.model_tester = Tester(self, self.family, self.config_class, **self.config)


# How the classes of this repository are run; `rediprune_plus` has gaps between positions, a bias on attention, and a budget for
# all frames.
BLOCKS = {
    "Unpruned": UNPRUNED,
    "Pruned": {"keep_ratio": 0.5},
    "Plus": {"method": "rediprune_plus", "keep_ratio": 0.5},
}


def suite_of(name, family, model_class, config_class, config, left_out):
    values = {"all_model_classes": (model_class,), "family": family, "config_class": config_class, "config": config}
    bases = (Common, modeling.ModelTesterMixin, unittest.TestCase)
    return type(name, bases, {**values, **left_out, "__module__": __name__})


def config_suite_of(name, family):
    def setUp(self):
        self.model_tester = Tester(self, family, family.config_class, pruning={"keep_ratio": 0.5})
        self.config_tester = configuration.ConfigTester(self, config_class=family.config_class, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()

    return type(name, (unittest.TestCase,), {"setUp": setUp, "test_config": test_config, "__module__": __name__})


for family in FAMILIES:
    if family.has_mrope:  # `Tester` makes square pictures, and these families take patches beside grids
        continue
    # The suite knows by the names of the library's classes which of them take labels and shift them.
    modeling.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[family.config_class.model_type] = family.model_class.__name__
    title = family.name.title().replace("_", "")
    left_out = {**SETTING, **failing_in_stock(family)}
    # What fails for the stock class is not of this repository's making.
    suites = [
        suite_of(f"{title}Stock", family, family.stock_model_class, family.stock_config_class, {}, left_out),
        config_suite_of(f"{title}Config", family),
    ]
    for how, block in BLOCKS.items():
        own, without_own = {"pruning": block}, {**left_out, **OWN, **({} if block is UNPRUNED else PRUNED)}
        suites.append(suite_of(f"{title}{how}", family, family.model_class, family.config_class, own, without_own))
    globals().update({suite.__name__: suite for suite in suites})
