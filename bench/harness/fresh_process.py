"""Print the peak memory of one provider in bytes: `python -m bench.harness.fresh_process REQUEST`, REQUEST in JSON.

`bench.harness.memory.peak_extra_in_fresh_process` starts this program once per provider. In a process that has already
run other providers, memory that the allocator kept from them would hide what this provider needs.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import torch

from bench.harness.cases import DTYPES, SHAPES, Operator, Parameters, Run
from bench.harness.memory import peak_extra_bytes


def measure(request: dict[str, Any]) -> int:
    """Return the bytes that the requested provider needs beyond its inputs. Its outputs are included."""
    torch.manual_seed(0)
    torch.set_num_threads(request["threads"])
    device, dtype = torch.device("cpu"), DTYPES[request["dtype"]]
    operator = operator_named(request["op"])

    def run_of(parameters: Parameters) -> Run:
        problem = operator.build(parameters, device, dtype, request["compile"])
        runs = {provider.name: provider.run for provider in problem.providers}
        return runs[request["provider"]]

    # The first call loads code and starts threads. That memory does not belong to the requested case.
    tiny = operator.cases(SHAPES["tiny"], device)
    # Some providers exist only in cases of text, so warm up on a case with the same share of latent steps.
    same_kind = [case for case in tiny if case.get("latent_share") == request["parameters"].get("latent_share")]
    for parameters in same_kind or tiny:
        run_of(parameters)()
    return peak_extra_bytes(run_of(request["parameters"]), device)


def operator_named(name: str) -> Operator:
    """Return the benchmark of the file with the operator's name.

    `bench.operators` would import every benchmark, and with the rollouts the trainer and transformers.
    """
    operator: Operator = getattr(importlib.import_module(f"bench.{name}"), name.upper())
    return operator


if __name__ == "__main__":
    print(measure(json.loads(sys.argv[1])))
