"""Every launchable configuration compiles for the GPUs that people have, without spills, within their shared memory."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Bytes of shared memory that one block can have: A100, H100, B200.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
CONFIGURATIONS = 36 + 22  # mix_embeddings, group_advantages


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_kernels_compile_without_spills(capability: int, repository: Path, tmp_path: Path):
    environment = {
        **os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(repository), "TRITON_CACHE_DIR": str(tmp_path),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(repository / "tests" / "build_kernels.py"), str(capability)],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    builds = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(builds) == len({build["name"] for build in builds}) == CONFIGURATIONS
    for build in builds:
        assert build["reg"] > 0
        assert build["stack"] == build["local"] == 0, f"{build['name']} spills: {build}"
        assert build["shared"] <= SHARED_MEMORY[capability], build
