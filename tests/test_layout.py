"""The layout of the repository: imports go one way, modules stay small, Triton is optional, no file names a machine."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import latent_kernels

PACKAGES = ("latent_kernels", "latent_grpo", "bench")
# The rooms of each package, lowest first. A room is a folder or a module directly below the package. It imports only
# rooms that come before it.
KERNEL_ROOMS = (
    "_types",
    "_noise",
    "_loss_types",
    "_chunks",
    "_validate",
    "_dispatch",
    "_operator",
    "reference",
    "_linear",
    "_scored_chunks",
    "_eager",
    "_triton",
    "ops",
    "__init__",
)
NEEDS_TORCH_ONLY = frozenset(KERNEL_ROOMS[:11])  # and NumPy; the other rooms may need Triton
TRAINER_ROOMS = (
    "trl_names",
    "errors",
    "config",
    "seeds",
    "recipes",
    "prompts",
    "architecture",
    "model",
    "rewards",
    "data",
    "rollout",
    "parallel",
    "update",
    "decoding_proof",
    "collect",
    "saving",
    "watching",
    "evaluation",
    "sft",
    "trainer",
    "quickstart",
    "study",
    "commands",
    "__init__",
    "__main__",
)
LINES_OF_A_MODULE, LINES_OF_A_FUNCTION = 400, 60
STANDARD = sys.stdlib_module_names | {"__future__"}


def sources(root: Path, *folders: str) -> list[Path]:
    """Return the Python files below some folders."""
    paths = sorted(path for folder in folders for path in (root / folder).rglob("*.py"))
    assert paths, f"no source files in {folders}"
    return paths


def imports(path: Path) -> Iterator[tuple[str, str | None]]:
    """Yield (module, imported name or None) of every import in a file, also of imports inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively"
            yield from ((node.module or "", alias.name) for alias in node.names)


def room_of(path: Path, package: Path) -> str:
    """Return the room of a module."""
    return path.relative_to(package).with_suffix("").parts[0]


def rooms_imported(path: Path, package: str) -> Iterator[str]:
    """Yield the rooms that a module imports from its own package."""
    for module, name in imports(path):
        top, _, rest = module.partition(".")
        if top == package:
            yield rest.split(".")[0] if rest else str(name)


@pytest.mark.parametrize(("package", "rooms"), [("latent_kernels", KERNEL_ROOMS), ("latent_grpo", TRAINER_ROOMS)])
def test_imports_go_one_way_between_rooms(package: str, rooms: tuple[str, ...], repository: Path):
    exported = set(importlib.import_module(package).__all__) | {"__version__"}
    seen = set()
    for path in sources(repository, package):
        room = room_of(path, repository / package)
        assert room in rooms, f"{room!r} has no place in the order of the rooms of {package}: add it"
        seen.add(room)
        for other in set(rooms_imported(path, package)) - {room} - exported:
            assert other in rooms[: rooms.index(room)], (
                f"{path.relative_to(repository)} imports {other}, which is no lower room"
            )
    assert seen == set(rooms)


def test_no_export_of_a_package_is_imported_by_its_own_rooms(repository: Path):
    """`from latent_grpo import name` inside latent_grpo would hide which room the name comes from."""
    for package, rooms in (("latent_kernels", KERNEL_ROOMS), ("latent_grpo", TRAINER_ROOMS)):
        for path in sources(repository, package):
            names = {name for module, name in imports(path) if module == package}
            assert names <= {*rooms, "__version__"}, f"{path.relative_to(repository)} imports {names}"


def test_modules_and_functions_fit_their_size(repository: Path):
    for path in sources(repository, *PACKAGES, "tests"):
        text = path.read_text(encoding="utf-8")
        where = path.relative_to(repository)
        assert len(text.splitlines()) <= LINES_OF_A_MODULE, f"{where} has more than {LINES_OF_A_MODULE} lines: split it"
        if path.parent.name == "_triton":
            continue  # Triton compiles a kernel from one function
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                assert size <= LINES_OF_A_FUNCTION, f"{where}: {node.name} has {size} lines: split it"


def test_the_lower_rooms_of_the_kernels_import_only_torch_and_numpy(repository: Path):
    seen = set()
    for path in sources(repository, "latent_kernels"):
        room = room_of(path, repository / "latent_kernels")
        if room not in NEEDS_TORCH_ONLY:
            continue
        seen.add(room)
        for module, _ in imports(path):
            top = module.partition(".")[0]
            assert top in STANDARD or top in ("torch", "numpy", "latent_kernels"), f"{room} imports {module}"
    assert seen == NEEDS_TORCH_ONLY


def test_the_kernels_import_only_torch_numpy_and_triton(repository: Path):
    for path in sources(repository, "latent_kernels"):
        in_triton = "_triton" in path.parts
        for module, _ in imports(path):
            top = module.split(".")[0]
            allowed = {"torch", "numpy", "latent_kernels"} | ({"triton"} if in_triton else set())
            assert top in STANDARD or top in allowed, f"{path.relative_to(repository)} imports {module}"


def test_the_trainer_imports_only_exports_of_the_kernels(repository: Path):
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


def test_an_installation_has_every_module_and_nothing_else(repository: Path):
    for path in sources(repository, *PACKAGES):
        assert (path.parent / "__init__.py").exists(), f"{path.parent} has no __init__.py: it would not be installed"
    setting = re.search(r"^include = \[(.*)\]$", (repository / "pyproject.toml").read_text(), re.MULTILINE)
    assert setting is not None
    assert set(re.findall(r'"([^"]+)"', setting[1])) == {"latent_kernels*", "latent_grpo*"}
    for package in ("latent_kernels", "latent_grpo"):
        assert (repository / package / "py.typed").exists(), (
            f"{package} has no py.typed: a type checker would not read its types"
        )


def test_nobody_imports_bench_or_tests(repository: Path):
    test_modules = {path.stem for path in (repository / "tests").rglob("test_*.py")} | {"support"}
    for path in sources(repository, *PACKAGES):
        for module, _ in imports(path):
            top = module.split(".")[0]
            where = f"{path.relative_to(repository)} imports {module}"
            assert top not in {"tests", "conftest", *test_modules}, where
            assert top != "bench" or path.is_relative_to(repository / "bench"), where


def test_exports_exist_are_sorted_and_documented():
    names = latent_kernels.__all__
    assert names == sorted(names, key=lambda name: (not name.isupper(), name))  # ruff sorts constants first
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


# The first letters are in brackets, so that the pattern does not match its own source.
MACHINE_PATHS = re.compile(r"(?<![\w.])/(?:[w]ork|[t]mp|[r]oot|[h]ome|[m]nt)\b")
TEXT_FILES = ("*.py", "*.md", "*.toml", "*.yaml", "*.yml", "*.cfg", "*.txt")


def test_no_source_file_names_a_path_of_the_machine(repository: Path):
    files = [
        path for folder in (*PACKAGES, "tests") for kind in TEXT_FILES for path in (repository / folder).rglob(kind)
    ]
    files += [path for kind in TEXT_FILES for path in repository.glob(kind)]
    assert len(files) > 20
    for path in files:
        match = MACHINE_PATHS.search(path.read_text(encoding="utf-8"))
        assert match is None, f"{path.relative_to(repository)} contains {match and match.group()!r}"


@pytest.mark.parametrize(
    ("text", "matches"), [(f"/{'tmp'}/x", True), (f"'/{'work'}'", True), ("a/work", False), ("home/", False)]
)
def test_the_pattern_matches_absolute_paths_only(text, matches):
    assert bool(MACHINE_PATHS.search(text)) == matches


def test_no_test_module_imports_another(repository: Path):
    modules = {path.stem for path in (repository / "tests").rglob("test_*.py")}
    for path in sources(repository, "tests"):
        for module, _ in imports(path):
            assert module.split(".")[-1] not in modules, f"{path.relative_to(repository)} imports {module}"


def test_no_file_cites_a_document_outside_the_repository(repository: Path):
    for folder in (*PACKAGES, "docs"):
        for kind in ("*.py", "*.md", "*.yaml"):
            for path in (repository / folder).rglob(kind):
                assert not re.search(r"\bSPEC\b", path.read_text(encoding="utf-8")), path.relative_to(repository)
