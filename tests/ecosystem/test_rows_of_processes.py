"""Rows of `docs/ecosystem.md`: one variant on two processes of the CPU."""

import pytest
from ecosystem_ranks import run_ranks

pytestmark = pytest.mark.slow


@pytest.mark.ecosystem("data parallel over two CPU processes (`torchrun`, gloo)", families=False)
def test_data_parallel(case, note):
    found = run_ranks(case.folder, "data")
    assert found["gradient difference"] <= 1e-5, f"gradients differ by {found['gradient difference']}"
    note("averaged gradients of two half batches are those of the whole batch")


@pytest.mark.ecosystem("answers by two CPU processes, each its share (`torchrun`, gloo)", families=False)
def test_share_torchrun(case, note):
    note(shared_answers(run_ranks(case.folder, "share")))


@pytest.mark.ecosystem("answers by two CPU processes, each its share (`accelerate launch`)", families=False)
def test_share_accelerate(case, note):
    pytest.importorskip("accelerate")
    note(shared_answers(run_ranks(case.folder, "share", "accelerate")))


def shared_answers(found: dict) -> str:
    same = found["shares"] == [2, 2] and found["answers"] == found["expected"]
    assert same, f"not the answers of one process: {found}"
    return "two of four prompts each; together the answers of a single process"


@pytest.mark.ecosystem("tensor parallel over two CPU processes (`torchrun`, gloo)", families=False)
def test_tensor_parallel(case, note):
    found = run_ranks(case.folder, "tensor")
    assert found["logits difference"] <= 1e-3, f"logits differ by {found['logits difference']}"
    note(f"logits within {found['logits difference']:.0e} of one process; {found['sharded']} parameters sharded")
