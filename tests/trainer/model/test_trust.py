"""No code of a model's folder runs, and nobody is asked whether it may."""

from __future__ import annotations

import builtins
import json

import pytest

from latent_grpo.errors import ModelError
from latent_grpo.model import load_model, load_tokenizer


def test_code_in_a_model_folder_does_not_run(tmp_path, monkeypatch):
    def ask(*_):
        raise AssertionError("asked to run the code of a folder")

    monkeypatch.setattr(builtins, "input", ask)
    folder, marker = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    parts = {f"Auto{name}": "own.Own" for name in ("Config", "ModelForCausalLM")} | {"AutoTokenizer": ["own.Own", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": parts}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Own", "auto_map": parts}))
    for load in (load_model, load_tokenizer):
        with pytest.raises(ModelError, match="cannot load") as error:
            load(str(folder))
        assert "\n" not in str(error.value)
    assert not marker.exists()
