"""The import rules of DESIGN.md: who may know whom, and which parts run without the server's packages."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Which other moesaic modules the files of a folder may import, by prefix. A folder may always import itself.
ALLOWED: dict[str, tuple[str, ...]] = {
    "kernels": (),
    "eplb": (),
    "overlap": (),
    "attention": ("kernels",),
    "moe": ("kernels", "eplb"),
    "launch/models": ("kernels", "eplb", "overlap", "attention", "moe"),
    "launch/engine": (
        *("kernels", "eplb", "overlap", "attention", "moe", "launch.models"),
        *("launch.config", "launch.topology"),
    ),
    "launch/disaggregation": (
        *("kernels", "eplb", "overlap", "attention", "moe", "launch.models", "launch.engine"),
        *("launch.config", "launch.topology", "launch.conflicts"),
    ),
    "launch/http": ("launch.engine.messages",),
    "launch/demo": ("kernels",),
}
# DESIGN.md: these run on a bare GPU box.
BARE_MODULES = ("launch.engine.model_runner",)
BARE_FOLDERS = ("kernels", "moe", "attention", "overlap", "eplb", "launch/models")
SERVER_PACKAGES = (
    *("fastapi", "starlette", "uvicorn", "zmq", "msgspec", "tokenizers", "jinja2", "prometheus_client", "rich"),
    *("pydantic", "transformers"),
)
BLOCKER = """
import importlib, importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is a package of the server")
sys.meta_path.insert(0, Blocker())
for module in {modules!r}:
    importlib.import_module(module)
"""


def test_every_folder_imports_only_what_it_may_know() -> None:
    violations = [
        f"{path.relative_to(ROOT)} imports moesaic.{imported}"
        for folder, allowed in ALLOWED.items()
        for path in sorted((ROOT / folder).rglob("*.py"))
        for imported in _moesaic_imports(path)
        if not _begins_with(imported, (folder.replace("/", "."), *allowed))
    ]

    assert not violations, "\n".join(violations)


def test_imports_are_absolute() -> None:
    """A relative import would escape the rules above."""
    relative = [
        str(path.relative_to(ROOT))
        for folder in ("kernels", "eplb", "overlap", "attention", "moe", "launch")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level > 0
    ]

    assert not relative


@pytest.mark.parametrize(
    ("importer", "imported", "legal"),
    [
        ("attention", "kernels.rope", True),
        ("attention", "moe.gate", False),
        ("launch/engine", "launch.config", True),
        ("launch/engine", "launch.config_reader", False),
        ("launch/engine", "launch.workers", False),
        ("launch/http", "launch.engine.messages", True),
        ("launch/http", "launch.engine.scheduler", False),
    ],
)
def test_the_table_means_what_it_says(importer: str, imported: str, legal: bool) -> None:
    assert _begins_with(imported, (importer.replace("/", "."), *ALLOWED[importer])) is legal


def test_the_model_runs_without_the_packages_of_the_server() -> None:
    modules = [f"moesaic.{name}" for name in (*_modules(BARE_FOLDERS), *BARE_MODULES)]
    code = BLOCKER.format(blocked=set(SERVER_PACKAGES), modules=modules)

    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr


def test_the_launcher_starts_without_torch() -> None:
    """Importing it takes a second or two, which every start would wait for; the ranks import it beside each other."""
    code = BLOCKER.format(blocked={"torch"}, modules=["moesaic.launch.server"])

    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr


def _modules(folders: tuple[str, ...]) -> Iterator[str]:
    """Every module of the folders, but those of Triton and CuTe kernels, which only a GPU's packages can import."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if not {"triton", "cute"} & set(parts):
                yield ".".join(parts).removesuffix(".__init__")


def _begins_with(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def _moesaic_imports(path: Path) -> Iterator[str]:
    """What a file imports from moesaic, without that prefix; imports inside functions count too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from moesaic.launch import workers` imports moesaic.launch.workers.
            is_folder = (ROOT / Path(*node.module.split(".")[1:])).is_dir()
            names = [f"{node.module}.{alias.name}" for alias in node.names] if is_folder else [node.module]
        yield from (name.removeprefix("moesaic.") for name in names if name.split(".")[0] == "moesaic")
