"""Write docs/page.png: a screenshot of the server's page with a photograph from scikit-image. Needs Chromium."""

from __future__ import annotations

import argparse
import io
import shutil
import socket
import threading
from pathlib import Path

import skimage.data
import uvicorn
from PIL import Image
from playwright.sync_api import sync_playwright

from bla.deploy.engine import open_engine
from bla.deploy.serve import application


def main() -> None:
    """Serve the page, explain the photograph, save a screenshot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/page.png"))
    parser.add_argument("--explainer", default="tf_efficientnet_lite0")
    arguments = parser.parse_args()
    photo = io.BytesIO()
    Image.fromarray(skimage.data.chelsea()).save(photo, "PNG")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    app = application(open_engine(arguments.explainer))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1160, "height": 960})
        page.goto(f"http://127.0.0.1:{port}/")
        page.set_input_files("#choose", {"name": "cat.png", "mimeType": "image/png", "buffer": photo.getvalue()})
        page.wait_for_selector("#curve path", state="attached")
        page.evaluate("document.activeElement.blur()")
        page.screenshot(path=arguments.out)
        browser.close()
    server.should_exit = True
    thread.join()


if __name__ == "__main__":
    main()
