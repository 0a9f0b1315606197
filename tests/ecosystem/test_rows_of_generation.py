"""Rows of `docs/ecosystem.md`: ways to generate, each of which gives the answer of plain generation."""

import copy
import time

import pytest
import torch
import transformers


@pytest.mark.ecosystem('`generate(cache_implementation="static")`')
def test_static_cache(case, note):
    note(case.same(case.model, cache_implementation="static"))


@pytest.mark.slow
@pytest.mark.ecosystem("`torch.compile` of decoding, static cache", families=False)
def test_compiled(case, note, monkeypatch):
    config = transformers.generation.CompileConfig(fullgraph=True)
    config._compile_all_devices = True  # generate compiles by itself on accelerators alone
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)  # so that the time is that of a first run
    torch._dynamo.utils.counters.clear()
    start = time.perf_counter()
    said = case.same(copy.deepcopy(case.model), cache_implementation="static", compile_config=config)
    graphs = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
    assert graphs, "nothing was compiled"
    note(f"{said}; {graphs} graph{'s' * (graphs > 1)}, {time.perf_counter() - start:.0f} s")


@pytest.mark.ecosystem("assisted generation, prompt lookup")
def test_prompt_lookup(case, note):
    # Candidates are copied from the prompt: without this they hold placeholders that have no media.
    banned = [[getattr(case.processor, f"{kind}_token_id")] for kind in case.processor.placeholders]
    said = case.same(case.model, prompt_lookup_num_tokens=2, bad_words_ids=banned)
    note(f"{said}, with the placeholders in `bad_words_ids`")


@pytest.mark.ecosystem("assisted generation, assistant model")
def test_assistant(case, note):
    note(case.same(case.model, assistant_model=copy.deepcopy(case.model)))
