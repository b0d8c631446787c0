"""`python -m bench`: time every operator against PyTorch, checking each implementation first."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console

from bench import gpu_report
from bench.harness.cases import DTYPES, SHAPES, CaseError, Settings
from bench.harness.report import Report, Row, print_rows, write_csv, write_json
from bench.harness.run import run_benchmarks
from bench.operators import OPERATORS

DEFAULT_SHAPES = {"cpu": ["tiny"], "cuda": ["llama-1b", "qwen-7b"]}
DEFAULT_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"bench: error: {message}\n")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _output(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a file in an existing directory")
    return path


def _parser() -> argparse.ArgumentParser:
    shapes = "; ".join(f"{s.name} (D {s.hidden}, V {s.vocab}: {s.description})" for s in SHAPES.values())
    parser = _Parser(
        prog="python -m bench",
        description="Time the operators of latent_kernels against PyTorch. Every implementation is checked before it "
        "is timed; a wrong one gets no timing.",
        epilog="`python -m bench gpu-report --help`: tests and benches of a GPU within a time. "
        "Exit codes: 0 done, 1 an implementation is wrong, 2 bad arguments, 130 interrupted.",
    )
    parser.add_argument("ops", nargs="*", metavar="op", help=f"operators (default: all): {', '.join(OPERATORS)}")
    parser.add_argument(
        "--shapes", nargs="+", metavar="NAME", help=f"default: tiny on a CPU, llama-1b and qwen-7b on CUDA. {shapes}"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="storage dtype (default: float32 on a CPU, bfloat16 on CUDA)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument(
        "--repeats", type=_positive, metavar="N", help="rounds a case (default: about ten seconds' worth)"
    )
    parser.add_argument(
        "--rows", nargs="+", type=_positive, metavar="N", help="rows of the inputs (default: each operator's own)"
    )
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="only these, such as eager, matmul, ours-triton")
    parser.add_argument("--compile", action="store_true", help="also time the PyTorch version under torch.compile")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="do not measure peak memory")
    parser.add_argument(
        "--json", type=_output, metavar="FILE", help="write environment and rows as JSON, after every case"
    )
    parser.add_argument("--csv", type=_output, metavar="FILE", help="write the rows as CSV")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == [gpu_report.COMMAND]:
        return gpu_report.main(arguments[1:])
    parser = _parser()
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device; use --device cpu")
    names = options.ops or list(OPERATORS)
    shapes = options.shapes or DEFAULT_SHAPES[device.type]
    for kind, given, known in (("operator", names, OPERATORS), ("shape", shapes, SHAPES)):
        for name in given:
            if name not in known:
                parser.error(f"unknown {kind} {name!r}; choose from {', '.join(known)}")
    settings = Settings(
        device,
        DTYPES[options.dtype or DEFAULT_DTYPE[device.type]],
        repeats=options.repeats,
        rows=None if options.rows is None else tuple(options.rows),
        providers=None if options.providers is None else tuple(options.providers),
        compile=options.compile,
        memory=options.memory,
    )
    console = Console(width=None if sys.stdout.isatty() else 140)

    def on_rows(report: Report, rows: list[Row]) -> None:
        print_rows(console, rows)
        if options.json is not None:
            write_json(report, options.json)

    try:
        report = run_benchmarks([OPERATORS[n] for n in names], [SHAPES[n] for n in shapes], settings, on_rows)
    except CaseError as error:
        parser.error(str(error))
    if not report.rows:
        parser.error(f"no operator here has a provider named {' or '.join(options.providers or [])}")
    stamp = report.environment
    console.print(
        f"{stamp['device']}, {stamp['threads']} threads, torch {stamp['torch']}, commit {stamp['commit']}; copy "
        f"{stamp['copy_gb_per_s']:.3g} GB/s, {stamp['matmul_dtype']} matmul {stamp['matmul_tflop_per_s']:.3g} TFLOP/s"
    )
    if options.csv is not None:
        write_csv(report, options.csv)
    for row in report.wrong:
        print(f"bench: error: {row.op}, {row.shape}, {row.provider}: {row.note}", file=sys.stderr)
    return 1 if report.wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
