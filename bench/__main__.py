"""`python -m bench`: time every operator against PyTorch. Every implementation is checked first."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console

from bench import gpu_report
from bench.harness.cases import DTYPES, SHAPES, CaseError
from bench.harness.report import Report, Row, print_rows, write_csv, write_json
from bench.harness.run import Settings, run_benchmarks
from bench.operators import OPERATORS

DEFAULT_SHAPES = {"cpu": ["tiny"], "cuda": ["llama-1b", "qwen-7b"]}
DEFAULT_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}


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
    operators = _chosen(parser, "operator", options.ops or list(OPERATORS), OPERATORS)
    shapes = _chosen(parser, "shape", options.shapes or DEFAULT_SHAPES[device.type], SHAPES)
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
        report = run_benchmarks(operators, shapes, settings, on_rows)
    except CaseError as error:
        parser.error(str(error))
    if not report.rows:
        parser.error(f"--providers: no chosen operator has a provider named {' or '.join(options.providers or [])}")
    console.print(environment_line(report.environment))
    if options.csv is not None:
        write_csv(report, options.csv)
    for row in report.wrong:
        print(f"bench: error: {row.op}, {row.shape}, {row.provider}: {row.note}", file=sys.stderr)
    return 1 if report.wrong else 0


def _chosen(parser: argparse.ArgumentParser, kind: str, names: list[str], known: dict[str, Any]) -> list[Any]:
    for name in names:
        if name not in known:
            parser.error(f"unknown {kind} {name!r}; choose from {', '.join(known)}")
    return [known[name] for name in names]


def environment_line(stamp: dict[str, Any]) -> str:
    """Return the environment of a report in one line."""
    return (
        f"{stamp['device']}, {stamp['threads']} threads, torch {stamp['torch']}, commit {stamp['commit']}; copy "
        f"{stamp['copy_gb_per_s']:.3g} GB/s, {stamp['matmul_dtype']} matmul {stamp['matmul_tflop_per_s']:.3g} TFLOP/s"
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # One line: argparse would print the usage first, which hides the message.
        self.exit(2, f"bench: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    shapes = "".join(
        f"  {shape.name:<12} {shape.hidden:>6,} {shape.vocab:>9,}  {shape.description}\n" for shape in SHAPES.values()
    )
    parser = _Parser(
        prog="python -m bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Time the operators of latent_kernels against PyTorch.\n"
        "Every implementation is checked before it is timed; a wrong one gets no timing.",
        epilog=f"shapes:\n  {'name':<12} {'D':>6} {'V':>9}\n{shapes}\n"
        "`python -m bench gpu-report --help` describes one command for the tests and benches of a GPU.\n"
        "Exit codes: 0 done, 1 an implementation is wrong, 2 bad arguments, 130 interrupted.",
    )
    add = parser.add_argument
    add("ops", nargs="*", metavar="op", help=f"operators: {', '.join(OPERATORS)} (default: all)")
    add("--shapes", nargs="+", metavar="NAME", help="see below (default: tiny on a CPU, llama-1b and qwen-7b on CUDA)")
    add("--dtype", choices=DTYPES, help="storage dtype (default: float32 on a CPU, bfloat16 on CUDA)")
    add("--device", choices=("cpu", "cuda"), help="device (default: cuda if there is one)")
    add("--repeats", type=_positive, metavar="N", help="rounds per case (default: as many as fit ten seconds)")
    add("--rows", nargs="+", type=_positive, metavar="N", help="rows of the inputs (default: those of each operator)")
    add("--providers", nargs="+", metavar="NAME", help="run only these, such as eager, matmul, ours-triton")
    add("--compile", action="store_true", help="also time the PyTorch version under torch.compile")
    add("--no-memory", dest="memory", action="store_false", help="do not measure peak memory")
    add("--json", type=_output, metavar="FILE", help="write environment and rows as JSON, after every case")
    add("--csv", type=_output, metavar="FILE", help="write the rows as CSV at the end")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _output(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a file in an existing folder")
    return path


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
