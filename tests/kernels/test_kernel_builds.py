"""Every launchable configuration compiles for the GPUs that people have, without spills, within their shared memory."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Bytes of shared memory that one block can have: A100, H100, B200.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# latent_step, its LM head, project_with_noise, mix_embeddings, group_advantages, logprob, policy_loss
CONFIGURATIONS = 7 + 11 + 12 + 36 + 22 + 33 + 21


# A folder with another Triton, the oldest supported: `pip install --target FOLDER --no-deps triton==3.6.0`
OTHER_TRITON = os.environ.get("LATENT_GRPO_OTHER_TRITON")


def build_all(capability: int, repository: Path, cache: Path, triton: str | None) -> list[dict[str, Any]]:
    """What `build_kernels.py` reports, with the installed Triton or the one in a folder."""
    path = os.pathsep.join(filter(None, (triton, str(repository))))
    done = subprocess.run(
        [sys.executable, str(repository / "tests" / "support" / "build_kernels.py"), str(capability)],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("release", ["installed", "other"])
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_kernels_compile_without_spills(release: str, capability: int, repository: Path, tmp_path: Path):
    if release == "other" and OTHER_TRITON is None:
        pytest.skip("LATENT_GRPO_OTHER_TRITON names no folder with another Triton")
    builds = build_all(capability, repository, tmp_path, OTHER_TRITON if release == "other" else None)
    assert len(builds) == len({build["name"] for build in builds}) == CONFIGURATIONS
    for build in builds:
        assert build["reg"] > 0
        assert build["stack"] == build["local"] == 0, f"{build['name']} spills: {build}"
        assert build["shared"] <= SHARED_MEMORY[capability], build
        if capability == 90 and build["name"].startswith("lm_head"):
            assert build["hgmma"] > 0, f"{build['name']} does not use the warpgroup matrix instructions"
