"""Builds every launchable configuration of the kernels without a GPU: `python build_kernels.py CAPABILITY`.

Prints one JSON line a configuration: its name, registers, bytes of stack, local memory and shared memory. A process of
its own, because Triton decides when it is imported whether kernels are compiled or interpreted.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain, product
from pathlib import Path
from typing import Any

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from latent_kernels._triton import group_advantages as advantages
from latent_kernels._triton import mix_embeddings as mix

Build = tuple[str, Any, dict[str, str], dict[str, Any], int]  # name, kernel, argument types, constants, warps


def mix_embeddings_builds() -> Iterator[Build]:
    """Table dtypes, mixture sizes up to 32, one tau or one a row."""
    pointers = {"ids_ptr": "*i64", "scores_ptr": "*fp32", "tau_ptr": "*fp32"}
    for dtype, width, per_row in product(("fp32", "bf16", "fp16"), (2, 10, 32), (False, True)):
        constants = mix.constants(width, per_row=per_row)
        table, sizes = {"table_ptr": f"*{dtype}"}, {"table_stride": "i64", "D": "i32"}
        name = f"{dtype} K={width} tau {'a row' if per_row else 'one'}"
        forward = {**pointers, **table, "out_ptr": f"*{dtype}", **sizes}
        yield f"mix {name}", mix.mix_kernel, forward, constants, mix.NUM_WARPS
        gradient = {**pointers, **table, "grad_ptr": f"*{dtype}", "out_ptr": "*fp32", **sizes}
        yield f"mix backward {name}", mix.mix_backward_scores_kernel, gradient, constants, mix.NUM_WARPS


def group_advantages_builds() -> Iterator[Build]:
    """Every combination of the modes, for float32 rewards; the other reward types, and no mask, once each."""
    modes = list(product(("exclude", "zero", "keep"), (True, False), advantages.SELECTIONS))
    variants = [("fp32", True, *mode) for mode in modes]
    variants += [(dtype, True, *modes[0]) for dtype in ("fp64", "bf16", "fp16")] + [("fp32", False, *modes[0])]
    for dtype, has_broken, invalid, normalize_std, first_token in variants:
        constants = advantages.constants(
            has_broken=has_broken, invalid=invalid, normalize_std=normalize_std, first_token=first_token
        )
        types = {
            "rewards_ptr": f"*{dtype}", "groups_ptr": "*i64", "broken_ptr": "*i8" if has_broken else f"*{dtype}",
            "logprob_ptr": "*fp32", **dict.fromkeys(("advantage_ptr", "first_ptr", "mean_ptr", "std_ptr"), "*fp32"),
            "R": "i32", "epsilon": "fp32",
        }  # fmt: skip
        name = f"group_advantages {dtype} {invalid} {first_token} std={normalize_std} mask={has_broken}"
        yield name, advantages.group_advantages_kernel, types, constants, advantages.NUM_WARPS


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread and bytes of stack and local memory, as `cuobjdump` reads them from the cubin."""
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    assert set(found) == {"reg", "stack", "local"}, text
    return found


def main(capability: int) -> None:
    """Build everything for one target."""
    for name, kernel, types, constants, warps in chain(mix_embeddings_builds(), group_advantages_builds()):
        signature = {**types, **dict.fromkeys(constants, "constexpr")}
        source = ASTSource(kernel, signature, constants)
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        print(json.dumps({"name": name, "shared": built.metadata.shared, **resources(built.asm["cubin"])}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
