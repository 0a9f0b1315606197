"""What the benchmark counts, compares and refuses. Nothing here looks at how long anything takes."""

import itertools
import json
import math
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import benchmark
import pytest
import selection_cost
import torch
from benchmarking.operations import count_operations, formula
from benchmarking.selection import compare, measure_size, plain_select
from benchmarking.shapes import SHAPES, random_model, shape_config
from benchmarking.tables import COLUMNS, SECOND, _goal, markdown, spread, summarise
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from rediprune.configuration_rediprune import PruningConfig
from rediprune.core_layout import PatchSize, Qwen3Layouts, QwenLayouts
from rediprune.ops_selection import select_rediprune
from repository import StageTimer
from tiny import PATCHES, POOLED, TEXT_SIZES, tiny_config, tiny_model
from transformers import LlamaConfig
from writing import replacing, write_whole

QUICK = ["--frames", 2, "--text", 24, "--new-tokens", 3, "--repeats", 2, "--warmup", 0, "--threads", 1]


def call(*arguments):
    return benchmark.main([*map(str, arguments)])


def refusal(*arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        call(*arguments)
    return str(stopped.value.code)


@pytest.fixture
def tiny(monkeypatch):
    """The benchmark measures this small random model instead of a checkpoint."""
    model = tiny_model()
    model.generation_config.pad_token_id = 0
    monkeypatch.setattr(benchmark, "load", lambda args: (model, None))
    return model


@pytest.fixture
def report(tiny, tmp_path):
    output = tmp_path / "results" / "tiny"
    call(*QUICK, "--ratios", 0.5, 0.25, "--methods", "rediprune", "random", "--output", output)
    return json.loads(output.with_suffix(".json").read_text())


def test_a_report_has_every_setting_beside_the_unpruned_model(report):
    settings_ = [(row["method"], row["keep_ratio"]) for row in report["rows"]]
    assert settings_ == [
        ("unpruned", 1.0),
        *((name, ratio) for name in ("rediprune", "random") for ratio in (0.5, 0.25)),
    ]
    assert [row["visual_tokens"] for row in report["rows"]] == [2 * POOLED, *[2 * POOLED // 2, 2 * POOLED // 4] * 2]
    for row in report["rows"]:
        assert row["error"] is None
        assert set(row["samples"]) == {*COLUMNS, SECOND}
        assert all(len(values) == 2 for values in row["samples"].values())
    for key in ("python", "torch", "transformers", "threads", "cpu", "date", "device", "dtype"):
        assert report["environment"][key]
    assert report["command"].startswith("python scripts/benchmark.py --frames 2") and report["seed"] == 0


def test_stages_add_up_to_the_whole(report):
    for row in report["rows"]:
        samples = row["samples"]
        for turn in range(2):
            parts = {name: samples[name][turn] for name in COLUMNS[:-1]}
            parts["decode"] *= 2  # of three tokens the first comes from prefill
            assert sum(parts.values()) == pytest.approx(samples["end to end"][turn], abs=2e-6)
            assert all(value > 0 for name, value in parts.items() if name != "selection")
            assert (parts["selection"] > 0) == (row["method"] != "unpruned")


def test_operations_and_bytes(report):
    base, text = report["rows"][0], tiny_config().text_config
    vision = tiny_config().vision_config
    width, mlp, patches = vision.hidden_size, vision.intermediate_size, PATCHES + 1
    # Pruned, the tower stops at the tapped layer, the last but one.
    last_layer = 2 * 2 * (4 * patches * width**2 + 2 * patches**2 * width + 2 * patches * width * mlp)
    for row in report["rows"]:
        tokens = row["prompt_tokens"]
        heads = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
        assert row["kv_cache_bytes"] == 4 * text.num_hidden_layers * 2 * tokens * heads  # keys and values in fp32
        assert row["peak_bytes"] > row["kv_cache_bytes"]
        counted = row["operations"]
        left_out = 0 if row is base else last_layer
        assert counted["vision encoder"] == base["operations"]["vision encoder"] - left_out > 0
        assert counted["total"] >= sum(value for name, value in counted.items() if name != "total")
        assert counted["projector"] / base["operations"]["projector"] == row["visual_tokens"] / base["visual_tokens"]
        width, mlp = text.hidden_size, text.intermediate_size
        layer = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * mlp
        assert row["paper_prefill_multiply_adds"] == text.num_hidden_layers * layer


def test_counted_operations_of_prefill():
    """Four projections of which two are to fewer heads, three MLP matrices, and the two products of attention."""
    model = tiny_model()
    inputs = benchmark.random_inputs(model, model.config.pruning, frames=2, batch=1, text=30, seed=0)
    tokens, text = inputs["input_ids"].shape[1], model.config.text_config
    operations, _ = count_operations(model, inputs)
    width, mlp = text.hidden_size, text.intermediate_size
    layer = 3 * tokens * width**2 + 3 * tokens * width * mlp + 2 * tokens**2 * width
    # 4.57 also counts the angles of the rotary positions.
    assert operations["prefill"] == pytest.approx(2 * text.num_hidden_layers * layer, rel=1e-3)


def test_the_paper_formula_at_the_true_size():
    """The paper's 29.211 and 2.712 for LLaVA-NeXT-Video, 8 frames, with the text lengths of `test_tflops.py`."""
    config = shape_config(SHAPES["llava-next-video-7b"])
    nothing = PruningConfig(method="none")
    for visual, published in ((4608, 29.211), (464, 2.712)):
        mean = sum(formula(config, nothing, visual, visual, text) for text in (64, 57)) / 2
        assert mean / 1e12 == pytest.approx(published, abs=1e-3)


def test_the_formula_where_tokens_leave_inside():
    """FastV at its paper's layer 2 of 32, by hand."""
    config = shape_config(SHAPES["llava-next-video-7b"])
    layer = lambda tokens: 4 * tokens * 4096**2 + 2 * tokens**2 * 4096 + 2 * tokens * 4096 * 11008  # noqa: E731
    fastv = formula(config, PruningConfig(method="fastv", keep_ratio=0.25), 1152, 1152, 60)
    assert fastv == pytest.approx(2 * layer(1152 + 60) + 30 * layer(288 + 60))
    assert formula(config, PruningConfig(method="vtw"), 1152, 1152, 60) == pytest.approx(
        15 * layer(1212) + 17 * layer(60)
    )
    two = PruningConfig(method="divprune", keep_ratio=0.5, inner_method="fastv", inner_keep_ratio=0.25)
    assert formula(config, two, 576, 1152, 60) == pytest.approx(2 * layer(576 + 60) + 30 * layer(288 + 60))
    assert formula(config, two.with_changes(keep_ratio=0.1), 115, 1152, 60) == pytest.approx(32 * layer(115 + 60))


@pytest.mark.parametrize("method", ["fastv", "dart", "vtw"])
def test_counted_operations_where_tokens_leave_inside(method):
    """As the formula has it, but for the key and value heads and the third MLP matrix; and no stage is missing."""
    model = tiny_model()
    text, number = model.config.text_config, model.config.text_config.num_hidden_layers
    model.config.pruning = pruning = PruningConfig(method=method, keep_ratio=0.25, inner_layer=1)
    inputs = benchmark.random_inputs(model, pruning, frames=4, batch=1, text=30, seed=0)
    whole, width, mlp = inputs["input_ids"].shape[1], text.hidden_size, text.intermediate_size
    visual = whole - 30
    layer = lambda tokens: 3 * tokens * width**2 + 3 * tokens * width * mlp + 2 * tokens**2 * width  # noqa: E731
    first, stay = pruning.first_inner_layer(number), pruning.inner_count(visual) + 30
    operations, cache = count_operations(model, inputs)
    chosen = whole * width  # the attention of one token, at most
    assert operations["prefill"] == pytest.approx(
        2 * (first * layer(whole) + (number - first) * layer(stay)), abs=8 * chosen, rel=2e-3
    )
    assert [layer.get_seq_length() for layer in cache.layers[:number]] == [whole] * first + [stay] * (number - first)


def test_a_method_inside_the_language_model_in_the_tables(monkeypatch, tmp_path):
    text = LlamaConfig(**{**TEXT_SIZES, "num_hidden_layers": 3}, max_position_embeddings=2048)
    model = random_model(tiny_config(text_config=text), torch.float32, "cpu", "sdpa")
    model.generation_config.pad_token_id = 0
    monkeypatch.setattr(benchmark, "load", lambda args: (model, None))
    output = tmp_path / "inside"
    call(*QUICK, "--ratios", 0.5, 0.25, "--methods", "fastv", "vtw", "--output", output)
    report = json.loads(output.with_suffix(".json").read_text())
    assert [(row["method"], row["keep_ratio"]) for row in report["rows"][1:]] == [
        ("fastv", 0.5),
        ("fastv", 0.25),
        ("vtw", 0.5),
    ]
    assert [row["inner_tokens"] for row in report["rows"]] == [None, POOLED, POOLED // 2, 0]
    table = output.with_suffix(".md").read_text()
    assert (
        f"| fastv 0.25 | 2, pooled | 1 | {2 * POOLED}, then {POOLED // 2} |" in table and "| vtw | 2, pooled |" in table
    )
    assert all(value > 0 for row in report["rows"] for value in row["samples"]["prefill"])


def test_results_survive_a_round_trip(report, tmp_path, capsys):
    source, output = tmp_path / "results" / "tiny.json", tmp_path / "again"
    capsys.readouterr()
    call("--from", source, "--output", output, "--json")
    assert json.loads(capsys.readouterr().out) == report
    assert output.with_suffix(".md").read_text() == source.with_suffix(".md").read_text() == markdown(report)
    assert summarise(report) == report["summary"]
    assert output.with_suffix(".json").read_text() == source.read_text()


def test_inputs_are_the_same_for_every_setting(tiny):
    unpruned, pruned = (
        benchmark.random_inputs(tiny, tiny.config.pruning.with_budget(ratio), 3, 2, 30, seed=5) for ratio in (1.0, 0.25)
    )
    assert torch.equal(unpruned["pixel_values_videos"], pruned["pixel_values_videos"])
    is_word = [ids != tiny.config.video_token_id for ids in (unpruned["input_ids"], pruned["input_ids"])]
    assert torch.equal(unpruned["input_ids"][is_word[0]], pruned["input_ids"][is_word[1]])
    assert (~is_word[0]).sum() == 2 * 3 * POOLED and (~is_word[1]).sum() == 2 * 3 * POOLED // 4
    other = benchmark.random_inputs(tiny, tiny.config.pruning, 3, 2, 30, seed=6)
    assert not torch.equal(other["pixel_values_videos"], pruned["pixel_values_videos"])


def test_poolings_batches_and_frames_are_groups_of_their_own(tiny, capsys):
    arguments = ["--video-pooling", "true", "false", "--batch", 1, 2, "--ratios", 0.25, "--repeats", 1, "--json"]
    call(*QUICK, *arguments)
    report = json.loads(capsys.readouterr().out)
    per_sample = {True: 2 * POOLED, False: 2 * PATCHES}
    for row, short in zip(report["rows"], report["summary"]):
        whole = per_sample[row["video_pooling"]]
        assert row["visual_tokens"] == (whole if row["method"] == "unpruned" else whole // 4)
        assert short["answers_per_second"] == row["batch"] / row["samples"]["end to end"][0]
    assert [row["method"] for row in report["rows"]] == ["unpruned", "rediprune"] * 4


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(
    "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
), MemoryError()])  # fmt: skip
@pytest.mark.parametrize("after", [0, 5])
def test_out_of_memory_is_a_row(tiny, monkeypatch, capsys, error, after):
    generate, calls = benchmark.generate, []

    def short_of_memory(model, inputs, new_tokens):
        calls.append(inputs["input_ids"].shape[1])
        if calls[-1] == 24 + 2 * POOLED and len(calls) > after:  # the unpruned model
            raise error
        return generate(model, inputs, new_tokens)

    monkeypatch.setattr(benchmark, "generate", short_of_memory)
    call(*QUICK, "--ratios", 0.25, "--json")
    report = json.loads(capsys.readouterr().out)
    unpruned, pruned = report["rows"]
    assert unpruned["error"] == "out of memory" and unpruned["samples"] == {}
    assert pruned["error"] is None and len(pruned["samples"]["prefill"]) == 2
    assert "prefill_speedup" not in report["summary"][1]
    text = markdown(report)
    assert "unpruned not measured" in text and "out of memory" in text
    assert calls.count(24 + 2 * POOLED) <= after + 1  # not tried again
    assert tiny.config.pruning.keep_ratio == 0.15  # as before


def test_other_errors_are_not_hidden(tiny, monkeypatch):
    def broken(*args):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(benchmark, "generate", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        call(*QUICK)


def test_a_prompt_that_is_too_long_is_a_row(tiny, capsys):
    tiny.config.text_config.max_position_embeddings = 24 + POOLED
    call(*QUICK, "--ratios", 0.25, "--json")
    unpruned, pruned = json.loads(capsys.readouterr().out)["rows"]
    assert "at most" in unpruned["error"] and pruned["error"] is None


@pytest.mark.parametrize("arguments, message", [
    (["--shape", "llava-70b"], "--shape llava-70b: no such shape; choose one of llava-next-video-7b, llava-1.5-7b, llava"),
    (["--shape", "llava-1.5-7b", "--frames", 8], "--shape llava-1.5-7b is one image: it goes with --frames 1"),
    (["--shape", "llava-1.5-7b", "--model", "me/mine"], "does not go with --model me/mine"),
    (["--layers", 2], "--layers and --vision-layers cut a --shape"),
    (["--shape", "llava-next-video-7b", "--layers", 0], "--layers 0: must be at least 1"),
    (["--methods", "best"], "--methods best: no such pruning method; choose of rediprune, "),
    (["--methods", "none"], "--methods none: no such pruning method"),
    (["--ratios", 0.5, 1.5], "--ratios 1.5: a keep ratio lies between 0 and 1"),
    (["--ratios", "nan"], "--ratios nan: a keep ratio lies between 0 and 1"),
    (["--video-pooling", "after"], "--video-pooling after: must be true or false"),
    (["--batch", 0], "--batch 0: must be at least 1"),
    (["--new-tokens", 0], "--new-tokens 0: must be at least 1"),
    (["--repeats", 0], "--repeats 0: must be at least 1"),
    (["--plots"], "--plots needs --output"),
    (["--device", "abacus"], "--device abacus: torch knows no such device; pass cpu, cuda"),
    (["--output", "tests"], "--output tests is a folder; name the files in it, for example tests/results"),
    (["--output", "pyproject.toml/results"], "--output pyproject.toml/results: cannot write to pyproject.toml"),
    (["--from", "nowhere.json"], "--from nowhere.json: cannot be read (No such file or directory)"),
])  # fmt: skip
def test_wrong_arguments(arguments, message):
    assert message in refusal(*arguments)


def test_a_ratio_that_is_no_number(capsys):
    refusal("--ratios", "many")
    assert "'many'" in capsys.readouterr().err


def test_threads_that_cannot_be(capsys):
    refusal("--threads", "-1")
    assert "'-1' is not a number of at least 1" in capsys.readouterr().err


def test_a_second_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    message = refusal("--device", "cuda:1", "--selection")
    assert "--device cuda:1: torch sees 1 GPU(s) here, of which the last is cuda:0" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("what", [["--shape", "llava-next-video-7b"], ["--selection"], []])
def test_a_gpu_that_is_not_there(what):
    assert "--device cuda: torch sees no GPU here; pass --device cpu" in refusal("--device", "cuda", *what)


@pytest.mark.parametrize("content", ["", '{"rows": [', "[]", '{"rows": []}'])
def test_half_a_results_file(tmp_path, content):
    path = tmp_path / "half.json"
    path.write_text(content)
    assert f"--from {path}: not the whole result of a benchmark" in refusal("--from", path)


def test_files_are_written_whole(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    write_whole(path, b"\x89PNG")
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, b"half")
    assert path.read_bytes() == b"\x89PNG" and list(tmp_path.iterdir()) == [path]


def test_what_is_written_by_another_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "video.mp4"
    with replacing(path) as temporary:
        assert temporary.suffix == ".mp4" and not path.exists()  # encoders choose the container by the ending
        temporary.write_bytes(b"whole")
    assert path.read_bytes() == b"whole" and path.stat().st_mode & 0o777 == 0o644
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"whole" and list(path.parent.iterdir()) == [path]


def test_plots(report, tmp_path):
    call("--from", tmp_path / "results" / "tiny.json", "--output", tmp_path / "drawn", "--plots")
    for name in ("speedup", "memory", "stages"):
        assert (tmp_path / f"drawn-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_plots_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "benchmarking.plots", raising=False)
    message = refusal("--output", tmp_path / "x", "--plots")
    assert "needs matplotlib" in message and "pip install matplotlib" in message
    monkeypatch.delitem(sys.modules, "benchmarking.plots", raising=False)


def test_a_timer_of_another_clock(model):
    ticks = iter(range(1000))
    inputs = benchmark.random_inputs(model, model.config.pruning, 2, 1, 24, seed=0)
    with StageTimer(model, lambda: next(ticks)) as timer, torch.no_grad():
        model(**inputs)
    stages = ("vision encoder", "selection", "projector", "prefill")
    assert dict(timer.seconds) == dict.fromkeys(stages, 1)  # one tick each, none inside another


def test_timers_of_two_threads_do_not_see_each_other(model):
    inputs = benchmark.random_inputs(model, model.config.pruning, 2, 1, 24, seed=0)
    barrier, methods = threading.Barrier(2, timeout=30), (model.encode_items, model.prune_items)

    def measure(new_tokens):
        ticks = itertools.count()
        with StageTimer(model, lambda: next(ticks)) as timer:
            barrier.wait()
            with torch.no_grad():
                model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
            if new_tokens == 2:
                barrier.wait()  # leaves while the other one is inside
        if new_tokens == 5:
            barrier.wait()
        return dict(timer.seconds), timer.passes

    with ThreadPoolExecutor(2) as pool:
        short, long = pool.map(measure, (2, 5))
    stages = dict.fromkeys(("vision encoder", "selection", "projector", "prefill"), 1)
    assert short == ({**stages, "decode": 1}, 2) and long == ({**stages, "decode": 4}, 5)
    assert (model.encode_items, model.prune_items) == methods and "forward" not in vars(model.model.language_model)


def test_a_timer_leaves_what_stood_in_for_a_method_and_ends_with_an_error(model):
    model.prune_items = stands_in = model.prune_items
    with pytest.raises(TypeError), StageTimer(model) as timer:
        model.prune_items()
    assert vars(model)["prune_items"] is stands_in and "encode_items" not in vars(model) and not timer.seconds


def test_shapes():
    """True sizes, without drawing their weights: 7.06 billion parameters, of which all but 0.32 are the language model's."""
    config = shape_config(SHAPES["llava-next-video-7b"])
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (4096, 32)
    assert (config.vision_config.image_size // config.vision_config.patch_size) ** 2 == 576
    with torch.device("meta"):
        from rediprune.modeling_rediprune_llava import ReDiPruneLlavaNextVideoForConditionalGeneration

        model = ReDiPruneLlavaNextVideoForConditionalGeneration(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(7.06e9, rel=1e-3)
    cut = shape_config(SHAPES["llava-1.5-7b"], layers=3, vision_layers=2)
    assert (cut.text_config.num_hidden_layers, cut.vision_config.num_hidden_layers) == (3, 2)
    assert [SHAPES[name].family for name in SHAPES] == [
        "llava_next_video",
        "llava",
        "llava_onevision",
        "qwen2_5_vl",
        "qwen3_vl",
    ]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_is_measured_with_a_medium_that_it_takes(family, monkeypatch, capsys):
    model = family.model(keep_ratio=0.25)
    monkeypatch.setattr(benchmark, "open_model", lambda args: (model, "tiny"))
    call(*QUICK, "--ratios", 0.25, "--json")
    report = json.loads(capsys.readouterr().out)
    unpruned, pruned = report["rows"]
    if family.name == "llava_next":
        assert "cuts its images into tiles" in pruned["error"]
        return
    assert report["medium"] == family.kinds[-1] and pruned["visual_tokens"] < unpruned["visual_tokens"] / 3
    assert ("one image" in markdown(report)) == (family.name == "llava")


@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "qwen3-vl-8b"])
def test_the_shapes_of_qwen(name):
    """The tokens of a frame are as many as LLaVA-NeXT-Video's; a tower that is cut keeps what its layers do apart from it."""
    shape, whole = SHAPES[name], shape_config(SHAPES[name])
    cut = shape_config(shape, layers=2, vision_layers=9)
    assert (cut.text_config.num_hidden_layers, cut.vision_config.depth) == (2, 9)
    assert (whole.text_config.num_hidden_layers, whole.vision_config.depth) == (shape.layers, shape.vision_layers)
    if name == "qwen3-vl-8b":
        assert cut.vision_config.deepstack_visual_indexes == [2, 5, 8]
    else:
        assert cut.vision_config.fullatt_block_indexes == [7] and whole.vision_config.fullatt_block_indexes == [
            7,
            15,
            23,
            31,
        ]
    pruning = PruningConfig(keep_ratio=0.25, scope="frame")
    model = SimpleNamespace(
        config=whole, frame_size=PatchSize(2), layout_class=Qwen3Layouts if "qwen3" in name else QwenLayouts
    )
    layout = benchmark.medium_of(model, pruning, 8)[0]
    assert layout.num_unpruned == 4 * 144 and layout.num_placeholders(pruning) == 4 * 36
    with pytest.raises(ValueError, match="sees 2 frames at once, which 7 are not a multiple of"):
        benchmark.medium_of(model, pruning, 7)


def test_a_random_model_runs():
    model = random_model(tiny_config(), torch.float32, attention="eager")
    inputs = benchmark.random_inputs(model, model.config.pruning, 2, 1, 24, seed=0)
    assert model(**inputs).logits.isfinite().all()
    assert model.config.text_config._attn_implementation == "eager"


# -- the selection alone -------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.integers(1, 4), st.integers(2, 40), st.sampled_from([8, 64]), st.sampled_from([0.0, 1e-3, 1.0]), st.floats(0.01, 0.9),
    st.integers(0, 2**16),
)  # fmt: skip
def test_the_yardstick_is_the_same_rule(frames, tokens, width, noise, ratio, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1, 3, width, generator=generator).repeat(frames, tokens // 3 + 1, 1)[:, :tokens]
    features = features + noise * torch.randn(features.shape, generator=generator)
    query = torch.randn(frames, width, generator=generator)
    num_kept = max(1, round(ratio * tokens))
    assert torch.equal(plain_select(features, query, num_kept), select_rediprune(features, query, num_kept))


def test_a_tie_for_one_implementation_alone():
    """Tokens 1 and 2 differ in the score that decides by 1.1 times the tolerance: rounding may make that a tie or not."""
    angles = torch.tensor([0.0, 1.0, 1.0 + 1.1e-6 / math.sin(1), 0.1], dtype=torch.float64)
    features = torch.stack([angles.cos(), angles.sin()], dim=1)[None]
    query = torch.zeros(1, 2, dtype=torch.float64)  # no relevance: token 0 first, then the farthest
    plain = plain_select(features, query, 2)
    assert plain.tolist() == [[0, 2]] and plain_select(features, query, 2, 1.2e-6).tolist() == [[0, 1]]
    assert compare(features, query, plain, plain) == {"identical_frames": 1, "frames_at_the_edge_of_a_tie": 0}
    for ours, at_edge in ([0, 1], 1), ([0, 3], 0):
        found = compare(features, query, plain, torch.tensor([ours]))
        assert found == {"identical_frames": 0, "frames_at_the_edge_of_a_tie": at_edge}


def test_layers_that_were_left_out_are_scaled():
    samples = {"selection": [0.6], "projector": [0.0], "vision encoder": [0.4], "other": [0.0]}
    rows = [
        {"method": method, "keep_ratio": ratio, "frames": 8, "video_pooling": True, "batch": 1, "error": None,
         "operations": {"prefill": prefill}, "paper_prefill_multiply_adds": prefill,
         "samples": {**samples, "prefill": [prefill], "decode": [0.5], "end to end": [1 + prefill + 2 * 0.5]}}
        for method, ratio, prefill in (("unpruned", 1.0, 4.0), ("rediprune", 0.25, 1.0))
    ]  # fmt: skip
    report = {"rows": rows, "new_tokens": 3, "layers": {"language": 2, "language_of": 20}}
    found = summarise(report)[1]
    assert found["end_to_end_speedup"]["median"] == 6 / 3
    assert found["scaled_end_to_end_speedup"]["median"] == (1 + 10 * 5) / (1 + 10 * 2)
    assert found["selection_share_of_saving"] == pytest.approx(0.6 / (10 * (4 - 1)))
    assert found["prefill_speedup"]["median"] == found["prefill_operations_ratio"] == 4 and found["share_of_limit"] == 1


def test_measuring_one_size_of_selection():
    row = measure_size(frames=2, tokens=30, ratio=0.2, repeats=2, seed=0, device="cpu")
    assert (row["identical_frames"], row["frames_at_the_edge_of_a_tie"], row["kept"]) == (2, 0, 6)
    assert {name: len(values) for name, values in row["samples"].items()} == {"plain loop": 2, "select_rediprune": 2}


def test_the_selection_report(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarking.selection.SIZES", ((1, 20), (2, 30)))
    arguments = [
        "--selection",
        "--ratios",
        0.1,
        0.2,
        "--repeats",
        1,
        "--threads",
        1,
        "--output",
        tmp_path / "selection",
    ]
    call(*arguments)
    report = json.loads((tmp_path / "selection.json").read_text())
    assert [(row["frames"], row["tokens"], row["kept"]) for row in report["rows"]] == [
        (1, 20, 2), (1, 20, 4), (2, 30, 3), (2, 30, 6)
    ]  # fmt: skip
    assert (tmp_path / "selection.md").read_text() == markdown(report)
    assert "| 1 of 1 |" in markdown(report)
    assert "| 1 of 1 | - |" in markdown(report)  # goals are for two threads
    report["rows"][2] |= {"identical_frames": 0, "frames_at_the_edge_of_a_tie": 1}
    assert "| 0 of 2, 1 at the edge of a tie, 1 DIFFERENT |" in markdown(report)


def test_spread():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}


@pytest.mark.parametrize("run, size, ratio, speedup, milliseconds, goal", [
    ({"device": "cpu", "threads": 2}, (32, 144), 0.1, 4.1, 5, "4 times: met"),
    ({"device": "cpu", "threads": 2}, (32, 144), 0.15, 3.9, 5, "4 times: MISSED"),
    ({"device": "cpu", "threads": 2}, (32, 144), 0.5, 3.9, 5, "not slower: met"),
    ({"device": "cpu", "threads": 2}, (32, 576), 0.1, 2.0, 50, "2 times: met"),
    ({"device": "cpu", "threads": 2}, (8, 576), 0.1, 0.9, 50, "not slower: MISSED"),
    ({"device": "cpu", "threads": 1}, (32, 144), 0.1, 4.1, 5, "-"),
    ({"device": "cuda:0", "threads": 8}, (32, 144), 0.1, 21, 0.9, "20 times, under 1 ms: met"),
    ({"device": "cuda:0", "threads": 8}, (32, 144), 0.1, 21, 1.1, "20 times, under 1 ms: MISSED"),
])  # fmt: skip
def test_goals_of_the_selection(run, size, ratio, speedup, milliseconds, goal):
    row = {"frames": size[0], "tokens": size[1], "keep_ratio": ratio}
    assert _goal(row, speedup, milliseconds, run) == goal


def test_selection_cost(monkeypatch, tmp_path, capsys):
    """Both ways on the same tokens, with the one that the selection would choose."""
    monkeypatch.setattr(selection_cost, "SIZES", ((36, 64),))
    monkeypatch.setattr(selection_cost, "JOINT_SIZES", ())
    arguments = ["--ratios", "0.1", "0.5", "--repeats", "3", "--threads", "1", "--output", str(tmp_path / "cost")]
    selection_cost.main(arguments)
    report = json.loads((tmp_path / "cost.json").read_text())
    few, many = report["rows"]
    assert (few["kept"], many["kept"]) == (4, 18) and few["same_tokens"] and many["same_tokens"]
    assert (few["chosen"], many["chosen"]) == ("row by row", "all pairs")
    assert all(len(row["samples"][way]) == 3 for row in report["rows"] for way in ("row by row", "all pairs"))
    text = (tmp_path / "cost.md").read_text()
    assert text.strip() in capsys.readouterr().out and "| 36 x 64 | 4 | " in text
    few["samples"] = {"row by row": [0.001, 0.002, 0.003], "all pairs": [0.002, 0.004, 0.004]}
    assert "| 2 (1 to 3) | 4 (2 to 4) | 0.50 (0.50 to 0.75) | row by row | yes |" in selection_cost.markdown(report)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_is_measured_on_a_medium_that_it_takes(family):
    model = family.model()
    model.config.pruning.keep_ratio = 0.25
    if family.name == "llava_next":
        with pytest.raises(ValueError, match="cuts its images into tiles"):
            benchmark.random_inputs(model, model.config.pruning, frames=1, batch=1, text=30, seed=0)
        return
    inputs = benchmark.random_inputs(model, model.config.pruning, frames=2, batch=2, text=30, seed=0)
    assert ("pixel_values_videos" in inputs) == model.config.takes_videos
    row = benchmark.measure_once(model, inputs, 2)
    assert row["end to end"] > row["prefill"] > 0 and row["selection"] > 0
