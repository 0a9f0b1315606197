"""The TFLOPs of the ReDiPrune paper's tables, to the digits that it prints; text lengths are those of the benchmarks' questions
plus the prompt template, where the paper leaves them open."""

import json

import encoder_cost
import pytest
import tflops
import torch
from encoder_cost import count_flops
from rediprune.vision_clip import encode_and_merge
from tflops import attention_relevance, encoder, prefill
from transformers import CLIPVisionConfig, CLIPVisionModel

IMAGE_BENCHMARKS = (23, 83, 25, 21, 91)  # GQA, MMBench, MME, POPE, ScienceQA


def mean(visual_tokens, texts):
    return sum(prefill(visual_tokens, text) for text in texts) / len(texts)


@pytest.mark.parametrize("full, kept, texts, cost, pruned, share", [
    (2056, 206, (28, 21), 11.606, 1.174, 10.11),  # Video-LLaVA, ActivityNet-QA and Video-ChatGPT
    (2056, 308, (38, 196), 12.177, 2.188, 17.86),  # Video-LLaVA, NextQA and EgoSchema
    (4608, 464, (64, 57), 29.211, 2.712, 9.28),  # LLaVA-NeXT-Video, unpooled
    (4608, 688, (60, 249), 29.918, 4.429, 14.77),
    (1152, 464, (64, 57), 6.488, 2.712, 41.80),  # the same against the native, pooled baseline
    (1152, 688, (69, 240), 7.025, 4.428, 62.88),
    (1152, 112, (64, 57), 6.488, 0.876, 13.50),  # pruned after pooling
    (1152, 176, (69, 240), 7.025, 1.694, 23.79),
    (2056, 208, (28, 21), 11.606, 1.184, 10.20),  # Video-LLaVA rounded frame by frame, which the paper does not do for it
    (2056, 312, (38, 196), 12.177, 2.209, 18.03),
    (4608, 461, (64, 57), 29.211, 2.696, 9.23),  # LLaVA-NeXT-Video rounded once, which the paper does not do for it
    (4608, 691, (69, 240), 29.918, 4.445, 14.83),
    (576, 58, IMAGE_BENCHMARKS, 3.246, 0.540, 16.42),  # LLaVA-1.5; the paper prints 2.23 for 3.246, its shares imply 3.24
    (576, 229, IMAGE_BENCHMARKS, 3.246, 1.418, 43.53),  # PruMerge+, 230 tokens in the paper
    (576, 231, IMAGE_BENCHMARKS, 3.246, 1.428, 43.85),  # PruMerge+ here
    (576, 57, IMAGE_BENCHMARKS, 3.246, 0.535, 16.26),  # the paper's 0.53 for 58 tokens: 16.29 %, ...
    (576, 56, IMAGE_BENCHMARKS, 3.246, 0.530, 16.11),  # ... and 16.13 %
])  # fmt: skip
def test_prefill(full, kept, texts, cost, pruned, share):
    assert mean(full, texts) == pytest.approx(cost, abs=1.01e-3)
    assert mean(kept, texts) == pytest.approx(pruned, abs=5.01e-4)
    shares = [prefill(kept, text) / prefill(full, text) for text in texts]
    assert 100 * sum(shares) / len(shares) == pytest.approx(share, abs=0.01)


def test_inside_the_language_model(capsys):
    """FastV from its paper's layer 2 and VTW from layer 15, of a Llama of 32 layers, by hand."""
    layer = lambda n: 4 * n * 4096**2 + 2 * n**2 * 4096 + 2 * n * 4096 * 11008  # noqa: E731
    tflops.main(["--keep-ratio", "0.25"])
    fastv = (2 * layer(1152 + 60) + 30 * layer(288 + 60)) / 1e12
    vtw = (15 * layer(1152 + 60) + 17 * layer(60)) / 1e12
    assert f"| {fastv:.3f} | {vtw:.3f} |" in capsys.readouterr().out


def test_qwen(capsys):
    """Two frames are one step of 144 tokens; four of the 32 layers of the tower see all 576 patches, the others 64."""
    tflops.main(["--model", "qwen2.5-vl-7b", "--frames", "16", "--keep-ratio", "0.1"])
    printed = capsys.readouterr().out
    whole, kept = (
        28 * (4 * n * 3584**2 + 2 * n**2 * 3584 + 2 * n * 3584 * 18944) / 1e12 for n in (8 * 144 + 60, 8 * 14 + 60)
    )
    seen = 4 * 576 + 28 * 64
    tower = 8 * (32 * 576 * (4 * 1280**2 + 2 * 1280 * 3420) + seen * 2 * 576 * 1280) / 1e12
    assert f"native (144 tokens a frame): {whole:.3f}\nvision encoder: {tower:.3f}" in printed
    assert f"| true | 0.1 | 8 x 14 | {kept:.3f} | {kept / whole:.1%} |\n" in printed and "fastv" not in printed
    with pytest.raises(SystemExit, match="--frames 7: Qwen2.5-VL-7B sees 2 frames at once"):
        tflops.main(["--model", "qwen2.5-vl-7b", "--frames", "7"])


def test_onevision(capsys):
    """32 frames of 196 tokens and a newline through Qwen2-7B, by hand; keys and values as wide as queries, as in the formula."""
    tflops.main(["--model", "llava-onevision-7b", "--frames", "32", "--keep-ratio", "0.1"])
    printed = capsys.readouterr().out
    whole, kept = (
        28 * (4 * n * 3584**2 + 2 * n**2 * 3584 + 2 * n * 3584 * 18944) / 1e12
        for n in (32 * 196 + 1 + 60, 32 * 20 + 60)
    )
    frame = 26 * (4 * 729 * 1152**2 + 2 * 729**2 * 1152 + 2 * 729 * 1152 * 4304) / 1e12
    assert f"native (196 tokens a frame): {whole:.3f}" in printed and f"vision encoder: {32 * frame:.3f}" in printed
    assert f"| true | 0.1 | 32 x 20 | {kept:.3f} | {kept / whole:.1%} |" in printed and "evoprune" not in printed


def test_encoder():
    assert encoder() == pytest.approx(0.18267, abs=1e-5)  # 23 layers of CLIP-L on 577 tokens
    assert encoder(58) / encoder() == pytest.approx(0.394, abs=1e-3)
    assert encoder(86) / encoder() == pytest.approx(0.439, abs=1e-3)


@pytest.mark.parametrize("size, kept", [(144, 14), (144, 22), (576, 58), (576, 86)])
def test_relevance_costs_under_a_fiftieth_of_what_it_saves(size, kept):
    saved = prefill(8 * size, 60) - prefill(8 * kept, 60)
    assert attention_relevance(8 * size, question_tokens=30) / saved < 0.01
    assert attention_relevance(8 * size, question_tokens=30, layers_read=4, compared=4) / saved < 0.02


@torch.no_grad()
def test_counted_flops_of_the_encoder():
    """What torch counts is the formula: two operations for each multiply-add, and a little for comparing and merging."""
    config = CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4, image_size=32, patch_size=4
    )
    tower, pixels = CLIPVisionModel(config), torch.randn(1, 3, 32, 32)
    sizes = {"num_patches": 64, "layers": 5, "width": 256, "mlp_width": 1024}
    whole, merged = (count_flops(lambda: encode_and_merge(tower, pixels, 5, kept)) for kept in (64, 9))  # noqa: B023
    expected = 2e12 * (encoder(64, **sizes) - encoder(9, **sizes))
    assert 0.9 * expected < whole - merged < expected


def encoder_report(*arguments):
    encoder_cost.main([*map(str, arguments)])


def test_the_encoder_report(monkeypatch, tmp_path):
    rows = [
        {"patches_left": left, "operations": operations, "formula_share": 1e-12 * operations, "samples": samples}
        for left, operations, samples in ((576, 10**12, [1.0, 4.0, 2.0]), (58, 4 * 10**11, [0.5, 1.0, 1.5]))
    ]
    monkeypatch.setattr(encoder_cost, "measure", lambda args: rows)
    encoder_report("--kept", 58, "--repeats", 3, "--device", "cpu", "--output", tmp_path / "encoder")
    report = json.loads((tmp_path / "encoder.json").read_text())
    assert report["rows"] == rows and report["environment"]["dtype"] and report["environment"]["date"]
    text = (tmp_path / "encoder.md").read_text()
    assert text == encoder_cost.markdown(report) and "Command: `python scripts/encoder_cost.py --kept 58" in text
    assert "| 58 | 400 | 40.0% | 40.0% | 1000 (500 to 1500) | 50.0% (25.0% to 75.0%) |" in text


def test_an_encoder_that_merges_nothing_is_refused():
    with pytest.raises(SystemExit, match="--kept 576: the encoder has 576 patches"):
        encoder_report("--kept", 576)
