"""Build every launchable configuration of the kernels without a GPU: `python build_kernels.py CAPABILITY [--quick]`.

With `--quick`, build one configuration per family of kernels. Print one JSON line per configuration: its name,
registers, bytes of stack, local memory and shared memory, and of an LM head warpgroup matrix instructions (HGMMA).
This is a program of its own, because Triton decides when it is imported whether kernels are compiled or interpreted.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from latent_kernels._loss_types import LossOptions, LossSpec
from latent_kernels._triton import group_advantages as advantages
from latent_kernels._triton import latent_logprob as logprob
from latent_kernels._triton import latent_step, lm_head, policy_loss, project_with_noise, scaled_exp
from latent_kernels._triton import latent_step_methods as methods
from latent_kernels._triton import lm_head_routes as routes
from latent_kernels._triton import mix_embeddings as mix
from latent_kernels._types import PLAIN_HEAD, LatentStepOptions, NoiseSpec, TextOptions
from support.build_scaled_exp import scaled_exp_builds
from support.kernel_build import DTYPES, HEADS, Build, head_types


def mix_embeddings_builds() -> Iterator[Build]:
    """Yield dtypes of the table, mixture sizes up to 32, one tau or one per row."""
    pointers = {"ids_ptr": "*i64", "scores_ptr": "*fp32", "tau_ptr": "*fp32"}
    for dtype, width, per_row in product(("fp32", "bf16", "fp16"), (2, 10, 32), (False, True)):
        constants = mix.constants(width, per_row=per_row)
        table, sizes = {"table_ptr": f"*{dtype}"}, {"table_stride": "i64", "V": "i32", "D": "i32"}
        name = f"{dtype} K={width} tau {'per row' if per_row else 'one'}"
        forward = {**pointers, **table, "out_ptr": f"*{dtype}", **sizes}
        options = {"num_warps": mix.NUM_WARPS}
        yield Build(f"mix {name}", mix.mix_embeddings_kernel, forward, constants, options)
        gradient = {**pointers, **table, "grad_ptr": f"*{dtype}", "out_ptr": "*fp32", **sizes}
        yield Build(f"mix backward {name}", mix.mix_embeddings_backward_kernel, gradient, constants, options)


def group_advantages_builds() -> Iterator[Build]:
    """Yield every combination of modes for float32 rewards; other dtypes, no mask and the other winner once each."""
    modes = list(product(("exclude", "zero", "keep"), (True, False), advantages.SELECTIONS))
    variants = [("fp32", True, *mode) for mode in modes]
    variants += [(dtype, True, *modes[0]) for dtype in ("fp64", "bf16", "fp16")] + [("fp32", False, *modes[0])]
    pairs = [(*variant, "valid") for variant in variants] + [("fp32", True, "zero", True, "best_of_group", "all")]
    for dtype, has_invalid, invalid, normalize_std, first_token, winner in pairs:
        constants = advantages.constants(
            has_invalid=has_invalid,
            invalid=invalid,
            normalize_std=normalize_std,
            first_token=first_token,
            winner_from=winner,
        )
        types = {
            "rewards_ptr": f"*{dtype}",
            "groups_ptr": "*i64",
            "invalid_ptr": "*i8" if has_invalid else f"*{dtype}",
            "logprob_ptr": "*fp32",
            **dict.fromkeys(("advantage_ptr", "first_ptr", "mean_ptr", "std_ptr"), "*fp32"),
            "R": "i32",
            "epsilon": "fp32",
        }
        name = f"group_advantages {dtype} {invalid} {first_token} {winner} std={normalize_std} mask={has_invalid}"
        options = {"num_warps": advantages.NUM_WARPS}
        yield Build(name, advantages.group_advantages_kernel, types, constants, options)


def lm_head_builds() -> Iterator[Build]:
    """Yield every tile of the product in both 16-bit dtypes with every head, and the pass over logits of any dtype."""
    sidecar = {"maxima_ptr": "*fp32", "sums_ptr": "*fp32"}
    sizes = dict.fromkeys(("weight_stride", "hidden_stride", "logits_stride", "B", "V", "D", "G"), "i32")
    tempered = {"latent_ptr": "*i8", "inverse_text": "fp32"}  # the rows of a rollout
    for dtype, config, (number, head) in product(("bf16", "fp16"), routes.PRODUCTS, enumerate(HEADS)):
        types = {"weight_ptr": f"*{dtype}", "hidden_ptr": f"*{dtype}", "logits_ptr": "*fp32", **sidecar, **sizes}
        types |= {**head_types(dtype), **tempered}
        constants = lm_head.product_constants(config, DTYPES[dtype], head, tempered=number % 2 == 0)
        name, options = f"lm_head {dtype} {config.block_b} rows{HEADS[head]}", lm_head.product_options(config)
        whole = ("weight_stride", "hidden_stride", "logits_stride", "D")
        yield Build(name, lm_head.lm_head_kernel, types, constants, options, aligned=whole)
    for dtype, head in (*((dtype, PLAIN_HEAD) for dtype in DTYPES), *(("fp32", head) for head in list(HEADS)[1:])):
        types = {"logits_ptr": f"*{dtype}", **sidecar, **dict.fromkeys(("logits_stride", "V", "G"), "i32")}
        types |= {**head_types(dtype), **tempered}
        constants = lm_head.sidecar_constants(head, tempered=dtype == "fp32")
        options = lm_head.SIDECAR_OPTIONS
        yield Build(f"sidecar {dtype}{HEADS[head]}", lm_head.sidecar_kernel, types, constants, options)


def noise_spec(kind: str, *, tensors: bool, injected: bool = False) -> NoiseSpec:
    """Return noise whose options are all numbers or all tensors."""
    value = torch.zeros(()) if tensors else 0
    return NoiseSpec(
        kind, value, value, value, torch.zeros(1) if tensors else None, torch.ones(1) if injected else None
    )


def option_types(noise: NoiseSpec) -> dict[str, str]:
    """Return types of the arguments that a noise specification passes to a kernel."""
    tensor = isinstance(noise.seed, torch.Tensor)
    return {
        "draws_ptr": "*fp32",
        "row_ids_ptr": "*i64",
        "scale": "*fp32" if tensor else "fp32",
        "delta": "fp32",
        "seed": "*i64" if tensor else "i64",
        "step": "*i64" if tensor else "i32",
    }


def latent_step_builds() -> Iterator[Build]:
    """Yield kinds of noise, options as numbers and as tensors, mixture sizes, dtypes and vocabularies."""
    cut, whole, greedy = TextOptions(0.6, 30, 0.95), TextOptions(0.6, uniform=torch.zeros(1)), TextOptions(0.0)
    variants = [
        ("one_sided", 10, "fp32", "bf16", 128_256, True, False, cut),  # of a rollout
        ("one_sided", 10, "fp32", "bf16", 128_256, False, False, None),
        ("two_sided", 10, "bf16", "bf16", 152_064, True, False, None),
        ("none", 10, "fp16", "fp16", 32_000, False, False, None),
        ("one_sided", 32, "fp32", "fp32", 128_256, True, False, None),
        ("one_sided", 32, "fp32", "bf16", 262_144, False, False, None),
        ("one_sided", 1, "fp32", "bf16", 49_152, False, False, None),
        ("one_sided", 10, "fp32", "fp32", 128_256, False, True, None),
        ("one_sided", 32, "fp32", "bf16", 262_144, True, False, cut),
        ("two_sided", 10, "fp32", "bf16", 128_256, True, False, whole),
        ("none", 2, "fp32", "bf16", 151_936, True, False, cut),  # text alone
        ("one_sided", 10, "fp32", "bf16", 128_256, True, False, greedy),
    ]
    for kind, top_k, logits, table, vocab, tensors, injected, text in variants:
        noise = noise_spec(kind, tensors=tensors, injected=injected)
        value, mask = (torch.zeros(()), torch.ones(1)) if tensors else (0, None)
        step_options = LatentStepOptions(
            top_k, value, value, kind, value, value, value, noise.row_ids, noise.exponential, mask
        )
        constants = latent_step.constants(vocab, step_options, text)
        number = "*fp32" if tensors else "fp32"
        types = {
            "logits_ptr": f"*{logits}",
            "maxima_ptr": "*fp32",
            "sums_ptr": "*fp32",
            "latent_ptr": "*i8",
            "table_ptr": f"*{table}",
            "list_ptr": "*i32",
            "buffer_ptr": "*i64",
            "ids_ptr": "*i64",
            "scores_ptr": "*fp32",
            "weights_ptr": "*fp32",
            "mixture_ptr": f"*{table}",
            "top_ptr": "*i64",
            "is_latent_ptr": "*i8",
            "logprob_ptr": "*fp32",
            "uniform_ptr": "*fp64",
            "top_p": number,
            "tau": number,
            **option_types(noise),
            **dict.fromkeys(("temperature", "text_top_p"), "fp32"),
            **dict.fromkeys(("step_stride", "end_token_id", "noisy_end_id", "text_top_k"), "i32"),
            **dict.fromkeys(("least", "most"), "i64" if tensors else "i32"),  # numbers of any size are allowed
            **dict.fromkeys(("logits_stride", "draws_stride", "table_stride", "V", "G", "D"), "i32"),
        }
        name = f"latent_step {kind} K={top_k} V={vocab} {logits} {table} tensors={tensors} injected={injected}"
        name += f" text={constants['TEXT']}"
        strides = ("logits_stride", "table_stride", "D")
        for rows in (1,) if latent_step.FEW_REGISTERS else (1, latent_step.ONE_WAVE + 1):
            options = latent_step.launch_options(rows)
            warps = f"{name} warps={options['num_warps']}"
            yield Build(warps, latent_step.latent_step_kernel, types, constants, options, aligned=strides)


def latent_step_method_builds() -> Iterator[Build]:
    """Yield the methods with options as numbers and as tensors, mixture sizes and vocabularies."""
    variants = [
        ("soft_grpo", "two_sided", 5, "fp32", "bf16", 128_256, False, False),
        ("soft_grpo", "one_sided", 32, "bf16", "fp32", 128_256, True, True),
        ("soft_grpo", "none", 10, "fp32", "fp16", 32_000, False, False),
        ("multiplex", "one_sided", 3, "fp32", "bf16", 128_256, False, False),
        ("multiplex", "one_sided", 32, "bf16", "fp32", 262_144, True, True),
    ]
    for method, kind, top_k, logits, table, vocab, tensors, injected in variants:
        noise = noise_spec(kind, tensors=tensors, injected=injected)
        value = torch.zeros(()) if tensors else 0
        options = LatentStepOptions(
            top_k, value, value, kind, value, value, value, noise.row_ids, noise.exponential, method=method
        )
        soft, number = method == "soft_grpo", "*fp32" if tensors else "fp32"
        pointers = ("scores_ptr", "weights_ptr", *(() if soft else ("maxima_ptr", "sums_ptr")))
        types = {
            "logits_ptr": f"*{logits}",
            "table_ptr": f"*{table}",
            "mixture_ptr": f"*{table}",
            **dict.fromkeys(pointers, "*fp32"),
            **dict.fromkeys(("ids_ptr", "top_ptr"), "*i64"),
            "is_latent_ptr": "*i8",
            "tau": number,
            **option_types(noise),
            **dict.fromkeys(("step_stride", "noisy_end_id", "least", "logits_stride", "draws_stride"), "i32"),
            **dict.fromkeys(("table_stride", "V", "D"), "i32"),
        }
        if soft:
            types["top_p"] = number
        else:
            del types["scale"], types["delta"]
            types["G"] = "i32"
        name = f"{method} {kind} K={top_k} V={vocab} {logits} {table} tensors={tensors} injected={injected}"
        launch = {"num_warps": methods.SOFT_GRPO_WARPS if soft else methods.MULTIPLEX_WARPS}
        launch |= methods.BUILD_OPTIONS
        kernel = methods.soft_grpo_kernel if soft else methods.multiplex_kernel
        strides = ("logits_stride", "table_stride", "D")
        yield Build(name, kernel, types, methods.constants(vocab, options), launch, aligned=strides)


def project_with_noise_builds() -> Iterator[Build]:
    """Yield dtypes, options as numbers and as tensors, aligned widths and others."""
    for dtype, tensors, aligned in product(DTYPES, (False, True), (False, True)):
        noise = noise_spec("one_sided", tensors=tensors)
        types = {
            "product_ptr": "*fp32",
            **dict.fromkeys(("bias_ptr", "out_ptr"), f"*{dtype}"),
            **option_types(noise),
            **dict.fromkeys(("draws_stride", "V"), "i32"),
        }
        constants = project_with_noise.constants(noise, has_bias=True)
        name = f"project_with_noise {dtype} tensors={tensors} aligned={aligned}"
        options, whole = project_with_noise.BUILD_OPTIONS, ("V",) if aligned else ()
        yield Build(name, project_with_noise.add_noise_kernel, types, constants, options, aligned=whole)


def logprob_builds() -> Iterator[Build]:
    """Yield log-probs with and without their gradient in the logits, the gradient only, and both with an entropy."""
    variants = [(logits, None, 10, "aligned", True, False, False) for logits in DTYPES]
    variants += [(logits, logits, 10, "aligned", False, True, False) for logits in DTYPES]
    variants += [
        ("fp32", dlogits, 10, margin, True, False, False) for dlogits, margin in product(DTYPES, logprob.MARGINS)
    ]
    variants += [("fp32", "bf16", width, "aligned", True, True, False) for width in (1, 10, 32, 128)]
    variants += [("fp32", None, width, "aligned", True, False, True) for width in (10, 128)]
    variants += [
        ("fp32", dlogits, 10, margin, False, True, True) for dlogits, margin in product(DTYPES, logprob.MARGINS)
    ]
    variants += [("fp32", "bf16", width, "aligned", False, True, True) for width in (1, 32, 128)]
    runs = [(*variant, "latent_grpo", False) for variant in variants]
    for method, components, width in (("soft_grpo", False, 5), ("multiplex", False, 3), ("multiplex", True, 3)):
        passes = [(None, True, False, False), ("bf16", True, not components, False), ("fp32", True, True, False)]
        passes += [("bf16", False, True, True), (None, True, False, True)]
        for dlogits, forward, upstream, entropy in passes:
            runs.append(("fp32", dlogits, width, "none", forward, upstream or components, entropy, method, components))
    runs += [("fp32", "bf16", 128, "none", True, True, False, "soft_grpo", False)]
    runs += [("fp32", "bf16", 128, "none", False, True, entropy, "multiplex", True) for entropy in (False, True)]
    default, every = ("latent_grpo", False), list(HEADS)[-1]
    heads = [("fp32", dlogits, width, "aligned", True, True, False) for dlogits, width in product(DTYPES, (10, 128))]
    heads += [("fp32", None, 10, "none", True, False, True), ("fp32", "bf16", 128, "aligned", False, True, True)]
    cases = [(*run, PLAIN_HEAD) for run in runs] + [(*variant, *default, every) for variant in heads]
    cases += [(*run, every) for run in runs if run[-1]]
    for logits, dlogits, width, margin, forward, upstream, entropy, method, components, head in cases:
        chosen = logprob.constants(
            128_256,
            width,
            margin,
            forward=forward,
            dlogits=dlogits is not None,
            upstream=upstream,
            entropy=entropy,
            method=method,
            components=components,
            head=head,
            relative=dlogits == "fp16" != logits,
        )
        types = {
            **head_types("bf16"),
            "scale_ptr": "*fp32",
            "logits_ptr": f"*{logits}",
            "ids_ptr": "*i64",
            "scores_ptr": "*fp32",
            **dict.fromkeys(("advantages_ptr", "upstream_ptr", "logprob_ptr", "log_z_ptr"), "*fp32"),
            **dict.fromkeys(("entropy_ptr", "bonus_ptr"), "*fp32"),
            "crossed_ptr": "*i32",
            "dlogits_ptr": f"*{dlogits or logits}",
            **dict.fromkeys(("logits_stride", "dlogits_stride", "V"), "i32"),
            "inverse_temperature": "fp32",
        }
        options = logprob.launch_options(128_256, width, head)
        name = f"logprob {logits} dlogits={dlogits} K={width} {margin} {forward=} {upstream=} {entropy=}"
        name += f" {method} {components=}{HEADS[head]}"
        strides = ("logits_stride", "dlogits_stride", "V")
        yield Build(name, logprob.latent_logprob_kernel, types, chosen, options, aligned=strides)


def policy_loss_builds() -> Iterator[Build]:
    """Yield every combination of mask, reference and dual clip in float32; other dtypes, ratios, objectives and KLs."""
    default = LossOptions()
    modes = list(product((True, False), (True, False), (default, default._replace(dual_clip=None))))
    ratios = ("token", "sequence")
    others = [*product(ratios, ("clip", "cispo"), ("k1", "k2", "k3")), *product(ratios, ("sapo", "vespo"), ("k3",))]
    variants = [("fp32", *mode) for mode in modes] + [(dtype, *modes[0]) for dtype in ("bf16", "fp16")]
    variants += [
        ("fp32", True, True, default._replace(ratio=ratio, objective=objective, kl_estimator=kl))
        for ratio, objective, kl in others
        if (ratio, objective, kl) != ("token", "clip", "k3")
    ]
    variants += [
        ("fp32", True, True, default._replace(ratio=ratio, kl_bias_correction=True)) for ratio in ("token", "sequence")
    ]
    zero = torch.zeros(1)
    for dtype, has_mask, has_ref, options in variants:
        of_response = zero if options.ratio == "sequence" else None
        spec = LossSpec(zero, zero, zero if has_ref else None, zero, of_response, of_response, options)
        chosen = policy_loss.constants(spec, has_mask=has_mask)
        pointers = ("logprob_ptr", "old_ptr", "advantages_ptr", "ref_ptr")
        types = {
            **dict.fromkeys(pointers, f"*{dtype}"),
            "mask_ptr": "*i8" if has_mask else f"*{dtype}",
            **dict.fromkeys(("weights_ptr", "sequence_ptr", "sequence_kl_ptr", "gradient_ptr", "sums_ptr"), "*fp32"),
            "N": "i32",
            "T": "i32",
            **dict.fromkeys(
                ("lowest_ratio", "highest_ratio", "dual_clip", "kl_coef", "positive_gate", "negative_gate"), "fp32"
            ),
        }
        launch = {"num_warps": policy_loss.NUM_WARPS}
        name = f"policy_loss {dtype} mask={has_mask} ref={has_ref} {options}"
        yield Build(name, policy_loss.policy_loss_kernel, types, chosen, launch)


FAMILIES = (
    latent_step_builds,
    latent_step_method_builds,
    lm_head_builds,
    project_with_noise_builds,
    mix_embeddings_builds,
    group_advantages_builds,
    logprob_builds,
    policy_loss_builds,
    scaled_exp_builds,
)


PRODUCTS = (lm_head.lm_head_kernel, scaled_exp.scaled_exp_kernel)


def builds(quick: bool, capability: int) -> list[Build]:
    """Return every configuration that can be launched on a GPU, or the first of each family."""
    every = [build for family in FAMILIES for build in (islice(family(), 1) if quick else family())]
    return [build for build in every if build.major in (None, capability // 10)]


def run_tool(name: str, *arguments: str) -> str:
    """Return the output of a program of the CUDA toolkit, of which Triton brings a few."""
    tool = Path(nvidia.__file__).parent / "bin" / name
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def resources(cubin: bytes, has_product: bool) -> dict[str, int]:
    """Return registers per thread, bytes of stack and local memory of a cubin, and HGMMA of a product (slow)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = run_tool("cuobjdump", "--dump-resource-usage", file.name)
        counts = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        assert set(counts) == {"reg", "stack", "local"}, text
        return {**counts, "hgmma": run_tool("nvdisasm", file.name).count("HGMMA")} if has_product else counts


def compile_one(index: int, capability: int, quick: bool) -> str:
    """Build a configuration and return its JSON line."""
    build = builds(quick, capability)[index]
    pointers = [name for name, kind in build.types.items() if kind.startswith("*")]
    divisible = [["tt.divisibility", 16]]
    names = build.kernel.arg_names
    attributes = {(names.index(name),): divisible for name in (*pointers, *build.aligned)}
    signature = {**build.types, **dict.fromkeys(build.constants, "constexpr")}
    source = ASTSource(build.kernel, signature, build.constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=build.options)
    used = resources(built.asm["cubin"], has_product=build.kernel in PRODUCTS)
    return json.dumps({"name": build.name, "shared": built.metadata.shared, **used})


def main(capability: int, quick: bool) -> None:
    """Build everything for one target."""
    tasks = [(index, capability, quick) for index in range(len(builds(quick, capability)))]
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:  # forked, with the imported modules
        for line in pool.starmap(compile_one, tasks, chunksize=1):
            print(line)


if __name__ == "__main__":
    main(int(sys.argv[1]), quick="--quick" in sys.argv)
