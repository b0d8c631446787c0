"""Peak memory of one provider in a process of its own: `python -m bench.memory REQUEST`, REQUEST in JSON.

Prints the bytes. Started by `bench.common.peak_extra_in_fresh_process`: in a process that has already run other
providers, memory that the allocator kept from them would hide what this one needs.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import torch

from bench.harness.cases import DTYPES, SHAPES, Operator, Parameters, Run
from bench.harness.memory import peak_extra_bytes


def operator_named(name: str) -> Operator:
    """The benchmark in the file of its name; `bench.operators` would import all of them, the trainer too."""
    found: Operator = getattr(importlib.import_module(f"bench.{name}"), name.upper())
    return found


def measure(request: dict[str, Any]) -> int:
    """Bytes that the requested provider needs beyond its inputs, its outputs included."""
    torch.manual_seed(0)
    torch.set_num_threads(request["threads"])
    device, dtype = torch.device("cpu"), DTYPES[request["dtype"]]
    operator = operator_named(request["op"])

    def run_of(parameters: Parameters) -> Run:
        problem = operator.build(parameters, device, dtype, request["compile"])
        runs = {provider.name: provider.run for provider in problem.providers}
        return runs[request["provider"]]

    # The first call loads code and starts threads, which are no part of what an input needs.
    tiny = operator.cases(SHAPES["tiny"], device)
    same_kind = [case for case in tiny if case.get("latent_share") == request["parameters"].get("latent_share")]
    for parameters in same_kind or tiny:
        run_of(parameters)()
    return peak_extra_bytes(run_of(request["parameters"]), device)


if __name__ == "__main__":
    print(measure(json.loads(sys.argv[1])))
