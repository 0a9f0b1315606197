"""What every method does on the sample media is what was written down."""

import json

import pytest
import reference


@pytest.fixture(scope="module")
def written():
    records = json.loads(reference.REFERENCE.with_suffix(".json").read_text())["settings"]
    return records, reference.load_file(reference.REFERENCE.with_suffix(".safetensors"))


def test_every_setting_is_written_down(written):
    assert list(written[0]) == reference.settings() and set(written[1]) == set(written[0])


@pytest.mark.slow
@pytest.mark.parametrize("setting", reference.settings())
def test_nothing_differs(written, setting):
    assert reference.differences(setting, *reference.observe(setting), *written, exact=False) == []


def test_differences_are_named(written):
    records, tensors = written
    now = json.loads(json.dumps(records["uniform"]))
    now[3]["answer"], now[4]["kept"][0] = "another", -1
    logits = tensors["uniform"].clone()
    logits[5, 0] += 1
    lines = reference.differences("uniform", now, logits, records, tensors, exact=False)
    assert [("answer" in line, "kept" in line, "logits" in line) for line in lines] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
