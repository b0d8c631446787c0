"""The layout of the repository: imports go one way, Triton is optional, no path of a machine is in a source file."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import latent_kernels

PACKAGES = ("latent_kernels", "latent_grpo", "bench")
# What needs torch only, and which of these modules may be imported by which: each one those before it.
BASE_LAYERS = ("_types", "_noise", "_rows", "reference", "_backend", "_eager")
STANDARD = sys.stdlib_module_names | {"__future__"}


def sources(root: Path, *folders: str) -> list[Path]:
    """Python files below the folders."""
    found = sorted(path for folder in folders for path in (root / folder).rglob("*.py"))
    assert found, f"no source files in {folders}"
    return found


def imports(path: Path) -> Iterator[tuple[str, str | None]]:
    """(module, imported name or None) of every import in a file, function bodies included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively"
            yield from ((node.module or "", alias.name) for alias in node.names)


def base_layer(path: Path, root: Path) -> str | None:
    """The layer of a module of latent_kernels that must need torch and NumPy only, else None."""
    parts = path.relative_to(root / "latent_kernels").with_suffix("").parts
    return parts[0] if parts[0] in BASE_LAYERS else None


def test_base_modules_need_torch_numpy_and_the_layers_below(repository: Path):
    seen = set()
    for path in sources(repository, "latent_kernels"):
        layer = base_layer(path, repository)
        if layer is None:
            continue
        seen.add(layer)
        below = BASE_LAYERS[: BASE_LAYERS.index(layer) + 1]
        for module, _ in imports(path):
            top, _, rest = module.partition(".")
            if top == "latent_kernels":
                assert rest.split(".")[0] in below, f"{layer} imports {module}"
            else:
                assert top in STANDARD or top in ("torch", "numpy"), f"{layer} imports {module}"
    assert seen == set(BASE_LAYERS)


def test_kernels_need_nothing_but_torch_numpy_and_triton(repository: Path):
    for path in sources(repository, "latent_kernels"):
        in_triton = "_triton" in path.parts
        for module, _ in imports(path):
            top = module.split(".")[0]
            allowed = {"torch", "numpy", "latent_kernels"} | ({"triton"} if in_triton else set())
            assert top in STANDARD or top in allowed, f"{path.relative_to(repository)} imports {module}"


def test_the_trainer_uses_what_the_kernels_export(repository: Path):
    used = set()
    for path in sources(repository, "latent_grpo"):
        for module, name in imports(path):
            if module.split(".")[0] != "latent_kernels":
                continue
            where = f"{path.relative_to(repository)} imports {module}.{name}"
            assert module == "latent_kernels", where
            assert name is None or name in (*latent_kernels.__all__, "__version__"), where
            used.add(name)
    assert used


def test_an_installation_has_every_module(repository: Path):
    for path in sources(repository, *PACKAGES):
        assert (path.parent / "__init__.py").exists(), f"{path.parent} is no package: it would not be installed"


def test_nobody_imports_bench_or_tests(repository: Path):
    test_modules = {path.stem for path in (repository / "tests").glob("*.py")}
    for path in sources(repository, *PACKAGES):
        for module, _ in imports(path):
            top = module.split(".")[0]
            where = f"{path.relative_to(repository)} imports {module}"
            assert top not in {"tests", "conftest", *test_modules}, where
            assert top != "bench" or path.is_relative_to(repository / "bench"), where


def test_exports_exist_are_sorted_and_documented():
    names = latent_kernels.__all__
    assert names == sorted(names)
    assert len(set(names)) == len(names)
    for name in names:
        assert getattr(latent_kernels, name).__doc__, f"{name} has no docstring"
    assert re.fullmatch(r"\d+\.\d+\.\d+", latent_kernels.__version__)


WITHOUT_TRITON = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("triton is refused")

sys.meta_path.insert(0, Refuse())
try:
    import triton
except ImportError:
    pass
else:
    raise SystemExit("triton was imported all the same")

import torch
import latent_kernels
from latent_kernels import latent_step_from_logits

step = latent_step_from_logits(torch.randn(2, 50), torch.randn(50, 4), seed=0)
assert step.embedding.shape == (2, 4)
assert not any(name.split(".")[0] == "triton" for name in sys.modules)
print("works")
"""


def test_kernels_work_where_triton_cannot_be_imported(repository: Path):
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "works"


# The first letters are bracketed, so that this file does not find itself.
MACHINE_PATHS = re.compile(r"(?<![\w.])/(?:[w]ork|[t]mp|[r]oot|[h]ome|[m]nt)\b")
TEXT_FILES = ("*.py", "*.md", "*.toml", "*.yaml", "*.yml", "*.cfg", "*.txt")


def test_no_source_file_names_a_path_of_the_machine(repository: Path):
    files = [
        path for folder in (*PACKAGES, "tests") for kind in TEXT_FILES for path in (repository / folder).rglob(kind)
    ]
    files += [path for kind in TEXT_FILES for path in repository.glob(kind)]
    assert len(files) > 20
    for path in files:
        found = MACHINE_PATHS.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path.relative_to(repository)} contains {found and found.group()!r}"


@pytest.mark.parametrize(
    ("text", "found"), [(f"/{'tmp'}/x", True), (f"'/{'work'}'", True), ("a/work", False), ("home/", False)]
)
def test_the_pattern_for_machine_paths(text, found):
    assert bool(MACHINE_PATHS.search(text)) == found
