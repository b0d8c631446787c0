"""The page of TRL's options: current, complete, and what the command line answers to a name of TRL."""

from __future__ import annotations

import importlib.util
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from support import REPOSITORY
from support.documents import script

from latent_grpo.commands.main import main
from latent_grpo.config import LatentGRPOConfig, default_of
from latent_grpo.errors import ConfigError
from latent_grpo.recipes.read import read_yaml
from latent_grpo.trl_names import HINTS

OWN = {item.name: default_of(item) for item in fields(LatentGRPOConfig)}


def test_the_page_is_current(tmp_path: Path) -> None:
    written = tmp_path / "trl.md"
    script("trl").main([str(written)])
    assert written.read_text() == (REPOSITORY / "docs" / "trl.md").read_text(), "run `python docs/trl.py docs/trl.md`"


def test_a_name_of_trl_exists_here_or_has_a_hint() -> None:
    shared, notes = script("trl").SHARED, script("trl").NOTES
    assert set(shared) <= set(OWN)
    assert not set(HINTS) & set(OWN)
    assert set(notes) <= set(shared)
    differing = {name for name, default in shared.items() if OWN[name] != default}
    assert differing - set(notes) == {"output_dir", "project", "seed"}  # another default needs a reason
    page = (REPOSITORY / "docs" / "trl.md").read_text()
    assert all(page.count(f"| `{name}` |") == 1 for name in shared)
    assert all(f"`{name}`" in page for name in HINTS)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_the_list_is_that_of_trl() -> None:
    from trl import GRPOConfig

    defaults = {
        item.name: item.default_factory() if item.default_factory is not MISSING else item.default
        for item in fields(GRPOConfig)
    }
    shared = script("trl").SHARED
    assert set(defaults) == set(shared) | set(HINTS)
    assert {name: defaults[name] for name in shared} == shared


def test_the_command_line_says_what_to_use_for_a_name_of_trl(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--steps_per_generation", "4"])
    assert stopped.value.code == 2
    answer = "unknown option 'steps_per_generation', a name of TRL: give generation_batch_size"
    assert answer in capsys.readouterr().err
    file = tmp_path / "config.yaml"
    file.write_text("use_vllm: true\n")
    with pytest.raises(ConfigError, match="unknown option 'use_vllm', a name of TRL: latent steps need"):
        read_yaml(str(file), LatentGRPOConfig)
