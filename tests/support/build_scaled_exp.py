"""The builds of the kernels that score rows straight from the product with the head."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from latent_kernels._triton import scaled_exp
from latent_kernels._types import PLAIN_HEAD, HeadOptions
from support.kernel_build import Build, head_types


def scaled_exp_builds() -> Iterator[Build]:
    """Yield the picked logits and the rows of every method, and the product in each tile of the table."""
    heads = [PLAIN_HEAD, HeadOptions(torch.zeros(1)), HeadOptions(torch.zeros(1), softcap=30.0)]
    outputs = dict.fromkeys(("picked_ptr", "rate_ptr", "reference_ptr"), "*fp32")
    tiles = dict.fromkeys(("sums_ptr", "shifts_ptr"), "*fp32")
    sizes = dict.fromkeys(("hidden_stride", "weight_stride", "N", "V", "D"), "i32")
    pointers = dict.fromkeys(("hidden_ptr", "weight_ptr", "bias_ptr"), "*bf16")
    for head, width in product(heads[1:], (1, 10, 128)):
        types = {**pointers, "ids_ptr": "*i64", **outputs, "inverse_temperature": "fp32", **sizes, **head_types("bf16")}
        options = {"num_warps": scaled_exp.PICK_WARPS, "num_stages": scaled_exp.PICK_STAGES}
        constants = scaled_exp.pick_constants(width, torch.bfloat16, head)
        name, whole = f"picked logits K={width} cap={head.softcap}", ("hidden_stride", "weight_stride", "D")
        yield Build(name, scaled_exp.picked_logits_kernel, types, constants, options, aligned=whole)
    rows = [("latent_grpo", width, margin, True) for width, margin in product((10, 128), ("none", "aligned"))]
    rows += [("latent_grpo", 10, "released", False), ("soft_grpo", 5, "none", True), ("multiplex", 3, "none", True)]
    config = scaled_exp.TABLE[9][0]
    for (method, width, margin, dlogits), capped in product(rows, (False, True)):
        numbers = ("scores_ptr", "advantages_ptr", "logprob_ptr", "factor_ptr")
        types = {"exps_ptr": "*bf16", **tiles, **outputs, **dict.fromkeys(numbers, "*fp32"), "ids_ptr": "*i64"}
        types |= {"crossed_ptr": "*i32", "inner": "fp32", **dict.fromkeys(("exps_stride", "V", "G"), "i32")}
        chosen = scaled_exp.row_constants(
            width, 501, config, margin, method, components=not dlogits, dlogits=dlogits, softcap=capped
        )
        name, options = f"scaled rows {method} K={width} {margin} {dlogits=} {capped=}", {"num_warps": 4}
        yield Build(name, scaled_exp.scaled_rows_kernel, types, chosen, options, aligned=("exps_stride", "V"))
    for major, (without, with_options) in scaled_exp.TABLE.items():
        for head, store in product(heads, (True, False)):
            tile = without if head is PLAIN_HEAD else with_options
            types = {"hidden_desc": f"tensordesc<bf16[{tile.block_n}, {tile.block_d}]>"}
            types |= {"weight_desc": f"tensordesc<bf16[{tile.block_v}, {tile.block_d}]>", "bias_ptr": "*bf16"}
            types |= {"rate_ptr": "*fp32", "reference_ptr": "*fp32", "exps_ptr": "*bf16", **tiles, "inner": "fp32"}
            types |= dict.fromkeys(("exps_stride", "N", "V", "D", "G"), "i32")
            constants = scaled_exp.product_constants(tile, torch.bfloat16, head, store=store)
            name = f"scaled exp bias={head.bias is not None} cap={head.softcap} {store=}"
            options, whole = scaled_exp.product_options(tile), ("exps_stride", "V", "D")
            yield Build(name, scaled_exp.scaled_exp_kernel, types, constants, options, aligned=whole, major=major)
