"""What a user installs: the wheel's files and metadata, and one place for the version and for the packages."""

from __future__ import annotations

import email.message
import email.parser
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import roformer_dist

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
# Folders at the top of the repository that are packages inside roformer_dist when installed.
MOVED = {"roformer_dist.configs": "configs", "roformer_dist.launch": "launch"}
SOURCES = ("roformer_dist", "data_tools", *MOVED.values())
EXTRAS = {"cuda", "hf", "remote", "formats", "bench", "docs", "dev"}


def tracked(folder: Path) -> list[Path]:
    """Files below ``folder`` that are no leftovers of Python's own."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy of the sources with the setuptools that is installed: nothing is downloaded."""
    pytest.importorskip("setuptools", minversion="77", reason="building the wheel offline needs setuptools")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in REPOSITORY.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    shutil.copytree(
        REPOSITORY / "tests/unit", source / "tests/unit", ignore=shutil.ignore_patterns("__pycache__")
    )
    build = "import setuptools.build_meta as backend, sys; print(backend.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(out)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "would be ignored" not in done.stdout + done.stderr, done.stderr
    [built] = out.glob("*.whl")
    return zipfile.ZipFile(built)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.parser.Parser().parsestr(wheel.read(name).decode())


def test_every_package_is_listed():
    found = {
        ".".join(path.relative_to(REPOSITORY).parent.parts)
        for top in ("roformer_dist", "data_tools")
        for path in (REPOSITORY / top).rglob("*.py")
    }
    listed = PROJECT["tool"]["setuptools"]["packages"]
    moved = {*MOVED, "roformer_dist.launch.slurm"}
    assert set(listed) == found | moved, "change [tool.setuptools] packages in pyproject.toml"
    assert listed == sorted(listed)
    assert PROJECT["tool"]["setuptools"]["package-dir"] == MOVED


def test_the_wheel_holds_every_source_and_resource_and_nothing_else(wheel: zipfile.ZipFile):
    expected = {
        path.relative_to(REPOSITORY).as_posix() for top in SOURCES for path in tracked(REPOSITORY / top)
    }
    for package, folder in MOVED.items():
        inside = package.replace(".", "/")
        expected = {
            inside + name.removeprefix(folder) if name.startswith(f"{folder}/") else name for name in expected
        }
    built = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert built == expected
    assert {"roformer_dist/py.typed", "roformer_dist/configs/quickstart.toml"} <= built
    launch = {"env.sh", "deepspeed.sh", "slurm/pretrain.sbatch"}
    assert {f"roformer_dist/launch/{name}" for name in launch} <= built


def test_metadata(wheel: zipfile.ZipFile, metadata: email.message.Message):
    assert metadata["Name"] == "roformer-dist"
    assert metadata["Version"] == roformer_dist.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra") or []) == EXTRAS
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
    [entry_points] = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "roformer-dist = roformer_dist.cli:main" in wheel.read(entry_points).decode()


def test_extras_bring_what_they_are_for(metadata: email.message.Message):
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]

    def names(extra: str) -> set[str]:
        return {r.name for r in requirements if r.marker and r.marker.evaluate({"extra": extra})}

    assert names("cuda") == {"flash-attn"}
    assert names("hf") == {"transformers"}
    assert {"fsspec", "s3fs", "aiohttp", "filelock", "tenacity"} == names("remote")
    assert {"pyarrow", "zstandard"} == names("formats")
    assert {"pytest", "ruff", "pyright"} <= names("dev")
    [transformers] = [
        r for r in requirements if r.name == "transformers" and 'extra == "hf"' in str(r.marker)
    ]
    assert not transformers.specifier.contains("4.57")
    plain = {r.name for r in requirements if not r.marker}
    assert {"torch", "deepspeed", "pydantic"} <= plain
    assert plain.isdisjoint(names("dev"))


def test_one_place_for_the_version():
    assert "version" not in PROJECT["project"]
    assert "version:" not in (REPOSITORY / "CITATION.cff").read_text().replace("cff-version:", "")
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{roformer_dist.__version__}]" in changelog


def test_resources_are_found_in_this_installation():
    # The same lookup in an editable installation as from the wheel.
    assert (files("roformer_dist.configs") / "quickstart.toml").is_file()
    assert (files("roformer_dist.launch") / "slurm" / "pretrain.sbatch").is_file()
