"""Make the folder of a Hugging Face Space, which serves an explainer: upload it as it is.

    python examples/space/make.py space --explainer tf_efficientnet_lite0
    hf upload USER/NAME space --repo-type space

The Space builds the project's Containerfile, in which huggingface.co may frame the page. Needs the extra export.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from bla.deploy.engine import open_engine
from bla.files import whole_folder

HERE = Path(__file__).parent
PROJECT = HERE.parents[1]
FRAMED = "ENV BLA_FRAMED_BY=https://huggingface.co\n"


def main() -> None:
    """Copy what the image is built from, and export the explainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--explainer", default="tf_efficientnet_lite0", help="a run, a shipped explainer or a graph")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"expected a folder to make, got {arguments.out}, which exists: move it away")
    graph = open_engine(arguments.explainer, report=lambda what, *_: print(what)).path
    with whole_folder(arguments.out) as folder:
        for name in ("pyproject.toml", "LICENSE"):
            shutil.copy(PROJECT / name, folder)
        shutil.copytree(PROJECT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(HERE / "README.md", folder)
        shutil.copy(graph, folder / "explainer.onnx")
        container = (PROJECT / "Containerfile").read_text(encoding="utf-8")
        (folder / "Dockerfile").write_text(container + FRAMED, encoding="utf-8")
    print(f"{arguments.out}: ready to upload")


if __name__ == "__main__":
    main()
