"""The house: what imports what, what no file is called, how long files are, what an import loads."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from PIL import Image

from forked import Starter

SOURCE = Path(__file__).parents[1] / "src" / "bla"
FILES = sorted(SOURCE.rglob("*.py"))

# What each folder may import of ours, besides itself and the package's own BlaError. Arrows point down only.
ARROWS: dict[str, set[str]] = {
    "__init__": set(),
    "files": set(),
    "progress": set(),
    "web": set(),
    "operators": set(),
    "data": {"files", "progress"},
    "explanations": {"data", "files"},
    "metrics": {"data", "operators"},
    "model": {"data", "explanations", "operators", "progress"},
    "study": {"data", "explanations", "files", "metrics", "progress", "web"},
    "training": {"data", "explanations", "files", "metrics", "model", "operators", "progress"},
    "runs": {"data", "files", "metrics", "model", "progress", "training"},
    "comparison": {"data", "explanations", "files", "metrics", "model", "progress", "runs", "training"},
    "deploy": {"data", "explanations", "files", "model", "progress", "runs", "web"},
    "cli": {"comparison", "data", "deploy", "explanations", "files", "progress", "runs", "study", "training"},
    "__main__": {"cli"},
}

NOT_CONCEPTS = {"utils", "util", "helpers", "helper", "common", "core", "base", "manager", "managers", "misc"}
LONGEST = 600
"""A file is split along a concept at about 600 lines."""


def module_of(path: Path) -> str:
    return ".".join(("bla", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


def part_of(module: str) -> str:
    """Which line of ARROWS a module belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


MODULES = {module_of(path): path for path in FILES}


def imported(module: str, tree: ast.AST) -> set[str]:
    """Our own modules that a file imports, wherever in it: also inside of functions and for type checking alone."""
    inside = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            home = node.module or ""
            if node.level:
                home = ".".join(filter(None, (*inside.split(".")[: len(inside.split(".")) - node.level + 1], home)))
            # "from bla import operators" imports a module, "from bla.operators import bound" a name of one
            names = [
                f"{home}.{alias.name}" if f"{home}.{alias.name}" in MODULES else home for alias in node.names
            ]  # fmt: skip
        else:
            continue
        found |= {name for name in names if name == "bla" or name.startswith("bla.")}
    return found


IMPORTS = {module: imported(module, ast.parse(path.read_text(encoding="utf-8"))) for module, path in MODULES.items()}


def test_the_parser_sees_what_is_there() -> None:
    expected = {"bla.training.checkpoint", "bla.progress", "bla.metrics", "bla.training.networks"}
    assert expected <= IMPORTS["bla.training.loop"]
    assert "bla.operators" in IMPORTS["bla.model.attention"], "from bla import operators"
    assert "bla.operators.bounded" in IMPORTS["bla.operators"], "from inside of a package"


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down_only(module: str) -> None:
    part = part_of(module)
    assert part in ARROWS, f"bla.{part} has no line in ARROWS: say what it may import"
    allowed = ARROWS[part] | {part, "__init__"}
    wrong = sorted(name for name in IMPORTS[module] if part_of(name) not in allowed)
    assert not wrong, f"{module} imports {', '.join(wrong)}; it may import {', '.join(sorted(allowed))}"


def test_nothing_imports_in_a_circle() -> None:
    TopologicalSorter(IMPORTS).prepare()


def test_the_map_has_at_most_nine_floors_and_lists_what_is_imported() -> None:
    floors: dict[str, int] = {}
    for part in TopologicalSorter(ARROWS).static_order():
        floors[part] = 1 + max((floors[lower] for lower in ARROWS[part]), default=0)
    assert max(floors.values()) <= 9
    used = {(part_of(module), part_of(name)) for module, names in IMPORTS.items() for name in names}
    unused = {(part, lower) for part, below in ARROWS.items() for lower in below} - used
    assert not unused, f"nothing imports along {sorted(unused)}: remove the arrows from the map"


def test_few_things_stand_at_the_top() -> None:
    files = {path.name for path in SOURCE.glob("*.py")}
    assert len(files) <= 4
    assert len(files) + len({path.relative_to(SOURCE).parts[0] for path in FILES} - files) <= 16


def test_files_are_named_after_concepts() -> None:
    found = [path for path in FILES if path.stem.strip("_") in NOT_CONCEPTS or path.parent.name in NOT_CONCEPTS]
    assert not found


def test_files_are_short_enough_to_read() -> None:
    lengths = {str(path.relative_to(SOURCE)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {name: length for name, length in lengths.items() if length > LONGEST}


def modules_after(statement: str) -> set[str]:
    """What a fresh process has loaded after a statement."""
    program = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


HEAVY = {"torch", "torchvision", "timm", "PIL", "numpy", "skimage"}


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = modules_after("import bla; dir(bla); bla.__all__")
    assert "bla" in loaded
    assert not loaded & HEAVY


def test_operators_and_the_evaluator_load_torch_alone() -> None:
    loaded = modules_after("import bla.operators; from bla.metrics import mask_probe, train_evaluator")
    assert "torch" in loaded
    assert not loaded & {"torchvision", "timm", "PIL", "skimage", "bla.model.classifier"}


def test_photos_explanations_and_pictures_load_no_torch() -> None:
    loaded = modules_after("import bla.data.image_sets, bla.explanations.render, bla.deploy.engine; bla.Explanation")
    assert not loaded & {"torch", "torchvision", "timm", "skimage"}


def test_statistics_load_no_torch() -> None:
    assert "torch" not in modules_after("import bla.metrics.statistics")


def test_every_public_name_loads() -> None:
    import bla

    assert sorted(bla.__all__) == bla.__all__
    assert set(bla.__all__) <= set(dir(bla))
    assert all(getattr(bla, name).__name__ == name for name in bla.__all__)
    with pytest.raises(AttributeError, match="module 'bla' has no attribute 'nothing'"):
        bla.nothing  # noqa: B018


WITHOUT_EXTRAS = """
import os, sys

os.chdir({place!r})
os.environ["HOME"] = {place!r}
for stream, name in ((1, "out"), (2, "err")):
    os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY), stream)
extras = (
    "alembic captum cv2 datasets entmax fastapi jinja2 matplotlib onnx onnxruntime onnxscript pandas psycopg pyarrow "
    "pytorch_grad_cam ray scipy skimage sklearn sqlalchemy statsmodels transformers uvicorn".split()
)
assert not set(extras) & set(sys.modules), "training and the model load no extra"
sys.modules |= dict.fromkeys(extras)
from bla.cli import run_command
for code, commands in {commands!r}.items():
    for command in commands:
        os.write(2, b"$ " + command.encode() + b"\\n")
        assert run_command(command.split()) == code, command
"""
CORE = ["explain photo.png --json", "compare lite0 . --methods random --out c --json", "cache list", "cache check"]
CORE += ["completion --shell bash", "--version", "--help", "train --help"]
NEEDED = {
    "train embedded --out run": "demo",
    "train hf:beans --out run": "datasets",
    "explain photo.png --run x.onnx": "export",
    "compare lite0 .": "compare",
    "report run": "compare",
    "export lite0 --out x.onnx": "export",
    "batch . out": "batch,export",
    "batch . out --engine ray": "batch,export,ray",
    "serve lite0": "serve",
    **dict.fromkeys(("study --help", "study results run", "study power", "study serve run"), "study"),
}
OTHERS = ["train nowhere --out run", "evaluate run", "calibrate lite0 . --for agreement", "cache remove x"]


def test_without_extras_every_command_works_or_names_its_extra(start: Starter, tmp_path: Path) -> None:
    Image.new("RGB", (60, 40), "red").save(tmp_path / "photo.png")
    (tmp_path / "x.onnx").write_text("mine")
    commands = {
        code: [one.replace("lite0", "tf_efficientnet_lite0") for one in some]
        for code, some in {2: [*NEEDED, *OTHERS], 0: CORE}.items()
    }
    done = start(1, WITHOUT_EXTRAS.format(place=str(tmp_path), commands=commands))
    out, err = ((tmp_path / name).read_text() for name in ("out", "err"))
    assert done == [0], err
    assert "Traceback" not in err
    assert json.loads(out.splitlines()[0])["method"]
    said = dict(part.split("\n", 1) for part in err.split("$ ")[1:])
    for command, extra in NEEDED.items():
        (line,) = said[command.replace("lite0", "tf_efficientnet_lite0")].splitlines()
        assert line.startswith("bla: expected the package")
        assert line.endswith(f"got none: pip install 'bounded-logit-attention[{extra}]'")
    assert (tmp_path / "x.onnx").read_text() == "mine"
    assert not {"run", "comparison"} & {path.name for path in tmp_path.iterdir()}
