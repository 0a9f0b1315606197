"""What the engine does not do with a pruned model is refused when it starts, with the reason."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT
from families import FAMILIES
from rediprune_vllm.families import REFUSED as REFUSED_FAMILIES
from rediprune_vllm.families import SERVED

REFUSED = {
    "video_pruning_rate": ({"video_pruning_rate": 0.5}, "'pruning' in config.json"),
    "quantization": ({"quantization": "fp8"}, "float16 or bfloat16"),
    "pipeline": ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2"),
    "lora": ({"enable_lora": True}, "--enable-lora"),
    "speculation": ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "--speculative-config"),
    "embeddings of media": ({"enable_mm_embeds": True}, "--enable-mm-embeds"),
    "embeddings of prompts": ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
    "no media": ({"language_model_only": True}, "--language-model-only"),
    "no tokenizer": ({"skip_tokenizer_init": True}, "--skip-tokenizer-init"),
    "frames": ({"media_io_kwargs": {"video": {"num_frames": 4}}}, "--mm-processor-kwargs"),
    "kv cache": (
        {"kv_cache_dtype": "fp8", "hf_overrides": {"pruning": {"method": "rediprune_plus"}}},
        "proportional_attention",
    ),
    "inside the language model": (
        {"hf_overrides": {"pruning": {"method": "fastv"}}},
        "'fastv' leaves visual tokens behind",
    ),
    "a second stage": (
        {"hf_overrides": {"pruning": {"method": "divprune", "inner_method": "dart", "inner_keep_ratio": 0.1}}},
        "'dart' leaves visual tokens behind",
    ),
    "distance bias": ({"hf_overrides": {"pruning": {"distance_bias": True}}}, "Set pruning.distance_bias to false"),
    "rotary angles": (
        {
            "hf_overrides": {
                "pruning": {"method": "rediprune", "positions": "original"},
                "text_config": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
            }
        },
        "rope_type='dynamic'",
    ),
}


def configure(folder=ROOT, **arguments):
    from vllm.engine.arg_utils import EngineArgs

    options = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True, **arguments}
    return EngineArgs(str(folder), trust_remote_code=True, **options).create_engine_config()


@pytest.mark.parametrize("case", REFUSED)
def test_refused_when_it_starts(case):
    arguments, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        configure(**arguments)


def test_options_of_all_requests_are_checked_when_it_starts():
    from vllm.multimodal import MULTIMODAL_REGISTRY

    config = configure(mm_processor_kwargs={"crop_size": {"height": 9, "width": 9}})
    with pytest.raises(ValueError, match="'crop_size', but takes keep_ratio"):
        MULTIMODAL_REGISTRY.create_processor(config.model_config)


def test_a_linked_variant_is_read_as_safetensors(tmp_path):
    (tmp_path / "base").mkdir()
    base = FAMILIES[0].save_stock_checkpoint(tmp_path / "base")
    command = [sys.executable, str(ROOT / "scripts" / "export.py"), str(base), "--link"]
    subprocess.run([*command, "--output", str(tmp_path / "variant")], check=True)
    with pytest.raises(ValueError, match="--load-format pt"):
        configure(tmp_path / "variant", load_format="pt")
    assert json.loads((tmp_path / "variant" / "config.json").read_text())["weights_from"]


@pytest.mark.parametrize("family", [each for each in FAMILIES if each.config_class.model_class in REFUSED_FAMILIES])
def test_families_that_are_not_served(family, tmp_path):
    (tmp_path / "base").mkdir()
    base = family.save_stock_checkpoint(tmp_path / "base")
    command = [sys.executable, str(ROOT / "scripts" / "export.py"), str(base), "--link", "--no-check"]
    subprocess.run([*command, "--output", str(tmp_path / "variant")], check=True)
    with pytest.raises(ValueError, match="is not served by this package yet"):
        configure(tmp_path / "variant")


def test_every_family_is_served_or_refused():
    assert {each.config_class.model_class for each in FAMILIES} == {*SERVED, *REFUSED_FAMILIES}
