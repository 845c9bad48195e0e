"""The wheel holds the package and nothing else, its metadata is complete, and the tested versions fit it."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCE = {
    str(path.relative_to(ROOT / "src"))
    for path in (ROOT / "src/bla").rglob("*")
    if path.is_file() and path.suffix != ".pyc"
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("wheel")))
    return zipfile.ZipFile(path)


def test_the_wheel_is_the_package(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == SOURCE
    assert {"bla/py.typed", "bla/deploy/page/page.html", "bla/study/texts.toml"} <= names
    assert sum(file.file_size for file in wheel.filelist) < 10e6


def test_the_metadata_is_complete(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("dist-info/METADATA"))
    about = Parser().parsestr(wheel.read(name).decode())
    assert about["Version"] == PROJECT["version"]
    assert all(about[field] for field in ("Author", "Summary", "License-Expression", "Project-URL", "Requires-Python"))
    assert "Programming Language :: Python :: 3.14" in about.get_all("Classifier", [])
    assert set(about.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    assert b"bla = bla.cli:main" in wheel.read(name.replace("METADATA", "entry_points.txt"))


def test_the_source_distribution_can_run_its_tests(tmp_path: Path) -> None:
    (path,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path))
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"src/{name}" for name in SOURCE} <= names
    assert {"Makefile", "constraints.txt", "tests/conftest.py", "docs/conf.py", "CITATION.cff"} <= names


def test_the_tested_versions_fit_the_requirements() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    for text in itertools.chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        needed = Requirement(text)
        if needed.name != PROJECT["name"]:
            assert needed.specifier.contains(tested[canonicalize_name(needed.name)]), text
    extras = PROJECT["optional-dependencies"]
    shared = {Requirement(text).name: text for text in PROJECT["dependencies"] + extras["export"]}
    for text in extras["serve-onnx"]:
        assert shared.get(Requirement(text).name, text) == text, "one bound in all places"


CONTAINERFILE = (ROOT / "Containerfile").read_text()


def test_the_container_installs_what_serving_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The extra is the one list: the file names no package, and its own program prints the extra."""
    installed = re.findall(r"pip install (?:--\S+ )*(--\S+ \S+)", CONTAINERFILE)
    assert installed == ["--requirement /wheels/needed.txt", "--no-deps /wheels/*.whl"]
    monkeypatch.chdir(ROOT)
    (program,) = re.findall(r'python -c "(.*)" > /wheels/needed.txt', CONTAINERFILE)
    exec(program)
    assert capsys.readouterr().out.splitlines() == PROJECT["optional-dependencies"]["serve-onnx"]


def test_the_container_is_built(tmp_path: Path) -> None:
    engines = filter(shutil.which, ("docker", "podman", "buildah"))
    runs = (name for name in engines if not subprocess.run([name, "info"], capture_output=True, check=False).returncode)
    if (engine := next(runs, None)) is None:
        pytest.skip("needs docker, podman or buildah")
    for name in ("pyproject.toml", "README.md", "LICENSE", "Containerfile"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "explainer.onnx").touch()
    (tmp_path / "Check").write_text("FROM bla-serve-test\nRUN bla serve --help && ! python -c 'import torch'\n")
    for file, tag in (("Containerfile", "bla-serve-test"), ("Check", "bla-serve-check")):
        subprocess.run([engine, "build", "--file", file, "--tag", tag, "."], cwd=tmp_path, check=True)


def test_extras_are_named_by_the_packages_own_name() -> None:
    """On the index, `bla` is a stranger's package."""
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *(ROOT / "src").rglob("*.py")]:
        assert not re.search(r"\bbla\[|pip install bla\b", path.read_text()), path
