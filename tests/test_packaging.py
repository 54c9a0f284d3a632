"""What is in the package: every folder of code, and nothing forgotten that an editable install would hide."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CODE_FOLDERS = ("moe", "eplb", "overlap", "attention", "kernels", "launch")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)


def test_the_package_list_is_the_folders_that_hold_an_init_file(project: dict[str, Any]) -> None:
    found = {
        "moesaic." + ".".join(path.parent.relative_to(ROOT).parts)
        for folder in CODE_FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    }

    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(found)


def test_every_folder_with_code_holds_an_init_file() -> None:
    bare = {
        str(path.parent.relative_to(ROOT))
        for folder in CODE_FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if not (path.parent / "__init__.py").exists()
    }

    assert not bare


def test_each_code_folder_is_mapped_into_the_namespace_and_typed(project: dict[str, Any]) -> None:
    mapped = project["tool"]["setuptools"]["package-dir"]

    assert mapped == {f"moesaic.{folder}": folder for folder in CODE_FOLDERS}
    assert sorted(project["tool"]["mypy"]["packages"]) == sorted(mapped)
    assert all((ROOT / folder / "py.typed").exists() for folder in CODE_FOLDERS)


def test_no_init_file_makes_the_root_or_the_tests_a_package() -> None:
    assert not (ROOT / "__init__.py").exists()
    # Stand-ins are the packages that they stand in for.
    assert not [path for path in (ROOT / "tests").rglob("__init__.py") if ROOT / "tests" / "standins" not in path.parents]


def test_every_direct_dependency_is_constrained(project: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line}
    wanted = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["test"]]
    names = {requirement.split(">=")[0].split("==")[0].strip().lower() for requirement in wanted}

    assert names <= pinned


def test_torch_is_open_in_the_package_and_pinned_for_the_commands(project: dict[str, Any]) -> None:
    assert "torch>=2.11" in project["project"]["dependencies"]
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
