"""The source archive and the wheel hold all that is needed, and work outside the checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import arctic_jax
from arctic_jax.testing import write_model

ROOT = Path(__file__).parents[1]
MINE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive, and the wheel made from it."""
    folder = tmp_path_factory.mktemp("dist")
    # Of a copy: setuptools leaves files of its own where it builds.
    copy = shutil.copytree(ROOT, folder / "checkout", symlinks=True, ignore=MINE)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*pip, "wheel", *options, str(sdist)], check=True)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's files, and nothing of the checkout."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(built[1]).extractall(folder)
    return folder


def run(installed: Path, *arguments: str, cwd: Path) -> str:
    """What Python says there, with the dependencies of this environment."""
    environment = os.environ | {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_archives_hold_every_module_and_nothing_else(built: tuple[Path, Path]) -> None:
    sdist, wheel = built
    folders = ("arctic_jax", "models", "pallas_kernels", "serving")
    modules = {
        str(
            path.relative_to(ROOT)
            if folder == "arctic_jax"
            else "arctic_jax" / path.relative_to(ROOT)
        )
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if "__pycache__" not in path.parts
    }
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if name.endswith(".py")} == modules
    assert "arctic_jax/py.typed" in names
    assert any(name.startswith("arctic_jax/assets/") for name in names)
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"arctic_jax", f"arctic_jax-{arctic_jax.__version__}.dist-info"}
    assert arctic_jax.__version__ in sdist.name
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("/LICENSE") for name in archive.getnames())


def test_what_is_installed_answers(installed: Path, tmp_path: Path) -> None:
    code = "import arctic_jax; print(arctic_jax.__file__, arctic_jax.__version__)"
    where, version = run(installed, "-c", code, cwd=tmp_path).split()
    assert Path(where).is_relative_to(installed)
    assert version == arctic_jax.__version__
    model = write_model(tmp_path / "model")
    options = ["--max-model-len", "64", "--max-num-seqs", "1", "--max-tokens", "4"]
    command = ["generate", "--model", str(model), "--prompt", "abc", "--json", *options]
    said = run(installed, "-m", "arctic_jax.serving.cli", *command, cwd=tmp_path)
    assert '"completion_tokens"' in said or '"token_ids"' in said, said
    listed = run(installed, "-m", "arctic_jax.serving.cli", "models", "list", cwd=tmp_path)
    assert "smollm2-135m-instruct-swiftkv" in listed
