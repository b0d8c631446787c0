"""Every launchable configuration compiles for common GPUs, without spills and within their shared memory."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Bytes of shared memory that one block can have on an A100, H100 and B200.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# In the order of `build_kernels.FAMILIES`: latent_step, its methods, its LM head, project_with_noise, mix_embeddings,
# group_advantages, logprob, policy_loss, scaled_exp.
CONFIGURATIONS = (12, 5, 29, 12, 36, 23, 66, 27, 20)
HOPPER_ONLY = 6  # products of scaled_exp

# A folder with another Triton, the oldest supported: `pip install --target FOLDER --no-deps triton==3.6.0`
OTHER_TRITON = os.environ.get("LATENT_GRPO_OTHER_TRITON")
EVERY_BUILD = os.environ.get("LATENT_GRPO_EVERY_BUILD", "0") == "1"
NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def build(capability: int, repository: Path, cache: Path, *options: str, triton: str | None = None) -> list[Any]:
    """Return what `build_kernels.py` reports, with the installed Triton or the one in a folder."""
    program = repository / "tests" / "support" / "build_kernels.py"
    path = os.pathsep.join(filter(None, (triton, str(repository), str(repository / "tests"))))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, str(program), str(capability), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_builds_fit(builds: list[Any], capability: int) -> None:
    """Nothing spills, and shared memory is enough."""
    for built in builds:
        assert built["reg"] > 0
        assert built["stack"] == built["local"] == 0, f"{built['name']} spills: {built}"
        assert built["shared"] <= SHARED_MEMORY[capability], built
        if capability == 90 and built["name"].startswith(("lm_head", "scaled exp")):
            assert built["hgmma"] > 0, f"{built['name']} does not use the warpgroup matrix instructions"


def folder_of(release: str) -> str | None:
    """Return the folder of a release of Triton, None for the installed one. Skip the test if there is none."""
    if release == "other" and OTHER_TRITON is None:
        pytest.skip("LATENT_GRPO_OTHER_TRITON names no folder with another Triton")
    return OTHER_TRITON if release == "other" else None


@NEEDS_TRITON
@pytest.mark.parametrize(
    ("release", "capability"), [("installed", 90), ("installed", 100), ("other", 80), ("other", 90), ("other", 100)]
)
def test_one_kernel_of_each_family_compiles(release: str, capability: int, repository: Path, tmp_path: Path):
    builds = build(capability, repository, tmp_path, "--quick", triton=folder_of(release))
    assert len(builds) == len(CONFIGURATIONS)
    assert_builds_fit(builds, capability)


# All builds for one GPU take minutes, so only `.ci/weekly` makes them for every GPU and both releases.
@NEEDS_TRITON
@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("release", ["installed", "other"])
def test_every_configuration_compiles_without_spills(release: str, capability: int, repository: Path, tmp_path: Path):
    if (release == "other" or capability == 100) and not EVERY_BUILD:
        pytest.skip("LATENT_GRPO_EVERY_BUILD is not 1")
    builds = build(capability, repository, tmp_path, triton=folder_of(release))
    expected = sum(CONFIGURATIONS) + (HOPPER_ONLY if capability == 90 else 0)
    expected += CONFIGURATIONS[0] if release == "other" else 0  # the latent step with 8 and with 4 warps
    assert len(builds) == len({built["name"] for built in builds}) == expected
    assert_builds_fit(builds, capability)
