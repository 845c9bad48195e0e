"""The house: what imports what, what no file is called, how long files are, what an import loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "bla"
FILES = sorted(SOURCE.rglob("*.py"))

# What each module may import of ours besides its own folder.
ARROWS: dict[str, set[str]] = {
    "photo": set(),
    "data": {"photo"},
    "datasets": {"cache", "data", "download", "embedded", "huggingface", "photo", "tables"},
    "tables": {"data", "photo"},
    "huggingface": {"data", "explanation", "photo"},
    "download": {"photo"},
    "embedded": set(),
    "explanation": set(),
    "operators": set(),
    "prefetching": set(),
    "processes": set(),
    "progress": set(),
    "attention": {"operators"},
    "joining": {"attention"},
    "tracing": {"attention"},
    "naming": {"tracing"},
    "maps": {"explanation", "tracing"},
    "splitting": {"attention", "joining", "maps", "naming", "photo", "tracing"},
    "votes": {"attention", "explanation"},
    "classifier": {"attention", "explanation", "maps", "naming", "photo", "prefetching", "splitting", "votes"},
    "backbones": {"classifier"},
    "cache": {"classifier", "data", "explanation", "maps", "photo", "prefetching", "processes"},
    "comparison": {"attention", "evaluation"},
    "evaluation": {"explanation", "render"},
    "settings": {"attention", "operators"},
    "pixels": {"cache", "classifier", "data", "photo", "processes"},
    "networks": {"attention", "cache", "pixels", "settings"},
    "finetuning": {"attention", "networks", "pixels", "settings"},
    "sizing": {"networks", "settings"},
    "training": {"attention", "cache", "evaluation", "networks", "operators", "processes", "settings", "sizing"},
    "measuring": {"attention", "cache", "evaluation", "networks", "processes", "settings", "training"},
    "render": {"explanation"},
    "report": {"explanation", "photo"},
    "study": {"explanation", "photo", "render"},
}
ARROWS["record"] = {"training"}
ARROWS["run"] = set(ARROWS) - {"comparison", "report", "study"}
ARROWS |= {
    "comparing": {"cache", "comparison", "data", "datasets", "evaluation", "explanation", "photo", "record", "run"},
    "explaining": {"cache", "classifier", "explanation", "photo", "render", "run"},
    "hub": {"attention", "backbones", "cache", "classifier", "explanation", "photo", "record", "run", "settings"},
    "engine": {"explanation", "photo"},
    "export": {"attention", "classifier", "engine", "explanation", "operators", "photo", "run"},
    "batch": {"data", "engine", "explanation", "photo", "prefetching", "render"},
    "serve": {"engine", "explanation", "photo", "render"},
}
ARROWS["comparing"] |= {"settings"}
ARROWS["__init__"] = ARROWS["cli"] = set(ARROWS)
ARROWS["__main__"] = {"cli"}

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
    assert {"bla.cache", "bla.attention", "bla.evaluation", "bla.networks"} <= IMPORTS["bla.training"]
    assert "bla.operators" in IMPORTS["bla.attention"], "from bla import operators"
    assert "bla.evaluation.size" in IMPORTS["bla.evaluation"]
    assert "bla.run" in IMPORTS["bla"], "under TYPE_CHECKING"


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down_only(module: str) -> None:
    part = part_of(module)
    assert part in ARROWS, f"bla.{part} has no line in ARROWS: say what it may import"
    allowed = ARROWS[part] | {part}
    wrong = sorted(name for name in IMPORTS[module] if part_of(name) not in allowed)
    assert not wrong, f"{module} imports {', '.join(wrong)}; it may import {', '.join(sorted(allowed))}"


def test_nothing_imports_in_a_circle() -> None:
    lazy = "bla"  # the package itself loads its names on first use
    TopologicalSorter({module: names for module, names in IMPORTS.items() if module != lazy}).prepare()


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


def test_operators_load_torch_alone() -> None:
    loaded = modules_after("import bla.operators")
    assert "torch" in loaded
    assert not loaded & {"torchvision", "timm", "PIL", "skimage"}


def test_explanations_and_pictures_load_no_torch() -> None:
    assert not modules_after("import bla.render, bla.engine; bla.Explanation") & {"torch", "torchvision", "timm"}


def test_every_public_name_loads() -> None:
    import bla

    assert sorted(bla.__all__) == bla.__all__
    assert set(bla.__all__) <= set(dir(bla))
    assert all(getattr(bla, name).__name__ == name for name in bla.__all__)
    with pytest.raises(AttributeError, match="module 'bla' has no attribute 'nothing'"):
        bla.nothing  # noqa: B018
