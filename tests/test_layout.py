"""The shape of the repository: links, names, imports, documentation (CONTRIBUTING.md says why)."""

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import arctic_jax

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("models", "serving", "pallas_kernels")
FOLDERS = ("arctic_jax", *LINKED)
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "arctic_jax" else ("arctic_jax", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def tracked_files() -> list[Path]:
    listed = run("git", "ls-files", "-z")
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize("folder", LINKED)
def test_the_folder_is_linked_and_python_knows_where_it_really_is(folder):
    link = ROOT / "arctic_jax" / folder
    assert link.is_symlink(), f"arctic_jax/{folder} must be a link (git config core.symlinks true)"
    assert os.readlink(link) == f"../{folder}"
    package = importlib.import_module(f"arctic_jax.{folder}")
    assert list(package.__path__) == [str(ROOT / folder)]


@pytest.mark.parametrize("folder", LINKED)
def test_the_folder_is_no_package_of_its_own(folder):
    result = run(sys.executable, "-c", f"import {folder}")
    assert result.returncode
    assert f"import arctic_jax.{folder}, not {folder}" in result.stderr


def test_every_module_imports_alone():
    """In a fresh interpreter each: a fork of one that has loaded other people's packages only."""
    code = """
import gc, os, sys, warnings
import fastapi, flax.nnx, gguf, huggingface_hub, jax.experimental.pallas, jaxtyping, jinja2.sandbox
import numba, orbax.checkpoint, prometheus_client, rich.progress, safetensors.numpy, tokenizers
import typer
from jax.experimental.pallas import mosaic_gpu
from transformers import AutoTokenizer, PreTrainedTokenizerFast
warnings.simplefilter("ignore")  # jax does not like a fork; no child computes anything
gc.disable()  # it would copy the parent's memory into each child
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            __import__(name)
        except BaseException as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
    names = [module_name(path) for path in SOURCES]
    result = run(sys.executable, "-c", code, *names)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


def test_import_contracts_hold():
    result = run(str(Path(sys.executable).parent / "lint-imports"), "--no-logo")
    assert result.returncode == 0, f"see 'Who may import whom' in pyproject.toml\n{result.stdout}"


def undocumented(path: Path) -> list[str]:
    def visit(node: ast.AST, inside: str) -> list[str]:
        found = []
        for child in ast.iter_child_nodes(node):
            kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            if not isinstance(child, kinds) or child.name.startswith("_"):
                continue
            name = f"{inside}.{child.name}"
            if not ast.get_docstring(child):
                found.append(name)
            if isinstance(child, ast.ClassDef):
                found += visit(child, name)
        return found

    module = ast.parse(path.read_text())
    name = module_name(path)
    return ([] if ast.get_docstring(module) else [name]) + visit(module, name)


def test_every_module_and_public_name_is_documented():
    assert [name for path in SOURCES for name in undocumented(path)] == []


def test_the_public_names_exist():
    assert [name for name in arctic_jax.__all__ if not hasattr(arctic_jax, name)] == []


def test_no_file_is_a_second_home_for_helpers():
    assert [p for p in SOURCES if p.stem in ("utils", "util", "helpers", "common", "misc")] == []


def test_the_lock_file_holds_versions_only_and_every_direct_dependency():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9._-]+==[0-9][\w.+]*", line)] == []
    locked = {re.split("==", line)[0].replace("_", "-") for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.split(r"[\[>=<!~; ]", requirement)[0].replace("_", "-") for requirement in wanted}
    assert names <= locked, f"run scripts/lock: {names - locked}"


def test_every_decision_is_listed():
    folder = ROOT / "docs" / "decisions"
    listed = re.findall(r"\]\((0[^)]*)\)", (folder / "index.md").read_text())
    assert listed == sorted(path.name for path in folder.glob("0*.md"))


def test_no_file_says_where_packages_come_from():
    """Which index serves a package is the business of the machine, not of the project."""
    hosts = (
        "pypi" + ".org",
        "python" + "hosted",
        "npm" + "js",
        "pytorch" + ".org",
        "index" + "-url",
    )
    found = []
    for path in tracked_files():
        text = path.read_bytes().decode(errors="ignore")
        found += [(path.name, host) for host in hosts if host in text]
    assert found == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_the_paths_in_a_document_exist(name):
    folders = "arctic_jax|models|serving|pallas_kernels|tests|scripts|docs|notebooks|examples"
    paths = re.findall(rf"`((?:{folders})/[\w./-]*)`", (ROOT / name).read_text())
    assert [path for path in paths if not (ROOT / path).exists()] == []
