"""The precision of a model: what "auto" stands for on a device, and what loaded and saved models have."""

from __future__ import annotations

import pytest
import torch

from latent_grpo import LatentSFTConfig
from latent_grpo.model import choose_device, choose_dtype, load_model, precision_line, with_chosen_dtype
from latent_grpo.quickstart.toy_task import make_model


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        ("auto", "cuda", "bfloat16"),
        ("auto", "cuda:3", "bfloat16"),
        ("auto", "cpu", "float32"),
        ("auto", "mps", "float32"),
        ("float32", "cuda", "float32"),
        ("float16", "cpu", "float16"),
    ],
)
def test_auto_is_bfloat16_on_cuda_alone_and_a_named_dtype_is_kept(dtype, device, expected):
    assert choose_dtype(dtype, device) == expected
    assert with_chosen_dtype(LatentSFTConfig(dtype=dtype, device=device)).dtype == expected


@pytest.mark.parametrize(("has_gpu", "device"), [(True, "cuda"), (False, "cpu")])
def test_without_a_device_the_gpu_is_used_if_there_is_one(has_gpu, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert choose_device(None) == device
    assert choose_device("cuda:1") == "cuda:1"
    assert precision_line("m", "auto", None) == f"m: {'bfloat16' if has_gpu else 'float32'} on {device} (dtype auto)"


def test_a_saved_model_has_the_dtype_of_its_run_whatever_the_files_it_came_from_had(tokenizer, tmp_path):
    make_model(tokenizer, seed=0).to(torch.bfloat16).save_pretrained(tmp_path / "given")
    model = load_model(str(tmp_path / "given"), "auto", "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path / "float32")
    load_model(str(tmp_path / "float32"), "bfloat16", "cpu").save_pretrained(tmp_path / "bfloat16")
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        loaded = type(model).from_pretrained(tmp_path / name, dtype="auto")
        assert loaded.dtype == dtype
