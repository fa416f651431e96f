"""What a reader of the house meets, in numbers: read from the sources, or from a run under a profiler."""

from __future__ import annotations

import ast
import importlib
import os
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "src" / "distoptim"
EXPERIMENTS = ROOT / "experiments" / "src" / "distoptim_experiments"


def modules(package: Path) -> list[str]:
    """Names of all modules of `package`, but its own."""
    names = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        names.append(".".join(parts).removesuffix(".__init__"))
    return [name for name in names if name != package.name]


def fail_alone(names: list[str]) -> list[str]:
    """Which of the library's modules cannot be the first of it that a process imports.

    `import distoptim.rule` runs `distoptim/__init__` first, whose order of imports can hide that two
    modules need each other; here an empty module stands for it.
    """
    failed = []
    for name in names:
        child = os.fork()
        if child == 0:
            stub = types.ModuleType("distoptim")
            stub.__path__ = [str(LIBRARY)]
            sys.modules["distoptim"] = stub
            importlib.import_module(name)
            os._exit(0)  # a failure ends the child with its traceback
        if os.waitpid(child, 0)[1] != 0:
            failed.append(name)
    return failed


def functions(package: Path) -> Iterator[tuple[str, int]]:
    """Name and length in lines, docstring not counted, of every function of `package`."""
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = _lines(node)
                if ast.get_docstring(node) is not None:
                    lines -= _lines(node.body[0])
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", lines


def unpicklers(package: Path) -> set[str]:
    """Files of `package` in which an object may be unpickled."""
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            imported = {name.name for name in node.names} if isinstance(node, ast.Import) else set()
            unsafe = isinstance(node, ast.Call) and _may_unpickle(node)
            if unsafe or imported & {"cloudpickle", "dill", "joblib", "pickle", "shelve"}:
                found.add(str(path.relative_to(package)))
    return found


def _may_unpickle(call: ast.Call) -> bool:
    """Of torch's: collectives of objects, and a load of more than tensors and plain data."""
    name = ast.unparse(call.func)
    if name == "torch.load":
        return "weights_only=True" not in map(ast.unparse, call.keywords)
    return re.search(r"_object(_list)?$", name) is not None


def packed_per_1000_lines(package: Path) -> float:
    """How often `a, b = c, d` stands in `package`, which hides two statements in one."""
    lines = packed = 0
    for path in package.rglob("*.py"):
        text = path.read_text()
        lines += text.count("\n")
        packed += sum(_is_packed(node) for node in ast.walk(ast.parse(text)))
    return 1000 * packed / lines


def concrete_bases(package: Path) -> set[str]:
    """Classes of `package` from which another one of it derives, and which are not abstract."""
    bases: set[str] = set()
    concrete: set[str] = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                derives_from = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
                bases |= derives_from
                decorators = [d for part in node.body for d in getattr(part, "decorator_list", ())]
                if not derives_from & {"ABC", "Protocol"} and "abstractmethod" not in map(
                    ast.unparse, decorators
                ):
                    concrete.add(node.name)
    return bases & concrete


def files_entered(call: Callable[[], object], package: Path) -> list[str]:
    """The files of `package`, in the order in which `call` enters functions in them."""
    entered: list[str] = []

    def profile(frame: types.FrameType, event: str, _: object) -> None:
        code = frame.f_code
        named = not code.co_name.startswith("<")  # comprehensions are calls in some Pythons only
        if event == "call" and named and Path(code.co_filename).is_relative_to(package):
            entered.append(code.co_filename)

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


def _lines(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def _is_packed(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Tuple)
        and any(isinstance(target, ast.Tuple) for target in node.targets)
    )
