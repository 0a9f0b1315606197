"""The check of an export: what does not pass it is not kept."""

import os

import check_variant
import export
import pytest
import torch
from exporting import leftovers, run
from safetensors.torch import load_file, save_file
from tiny import save_stock_checkpoint

NAME = "multi_modal_projector.linear_2.bias"


def changed(base, folder, value):
    """The base with another value in one of its weights."""
    save_stock_checkpoint(folder)
    tensors = load_file(base / "model.safetensors")
    tensors[NAME][0] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def check(*arguments):
    check_variant.main([*map(str, arguments), "--device", "cpu"])


@pytest.mark.slow
def test_a_variant_passes(base, tmp_path, capsys):
    for mode in ("--copy", "--link"):
        variant = tmp_path / f"variant_{mode.strip('-')}_{os.getpid()}"
        run(base, mode, "--output", variant)
        check(variant, "--base", base)
        assert "bit for bit (image and video prompt)" in capsys.readouterr().out


def test_logits_that_differ_do_not_pass(base, tmp_path):
    """By one value in one tensor, a little."""
    variant = tmp_path / f"variant_{os.getpid()}"
    run(base, "--output", variant)
    other = changed(base, tmp_path / "other", load_file(base / "model.safetensors")[NAME][0] + 1e-3)
    with pytest.raises(SystemExit, match="the logits of .* differ from those of .*'image': .*'video': "):
        check(variant, "--base", other)


@pytest.mark.slow
def test_an_export_that_does_not_pass_is_not_kept(base, tmp_path):
    """The check runs in a process of its own, whose exit code says how it went."""
    spoilt = changed(base, tmp_path / "spoilt", torch.nan)
    args = export.parse_arguments([str(spoilt), "--output", str(tmp_path / "variant")])
    with pytest.raises(export.ExportError, match="(?s)not kept.*did not pass its check.*not finite"):
        export.export(args)
    assert leftovers(tmp_path) == ["spoilt"]
