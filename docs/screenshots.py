"""The pictures of README.md, taken anew: python docs/screenshots.py [REPORT] [EXPLORER]

By default of the newest answer of the emoji benchmark and of the explorer over all answers; needs
Playwright and Chromium (apt-get install chromium).
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "experiments"
REPORT = RESULTS / "emoji/results/qual/free_query/latest/report.html"
EXPLORER = RESULTS / "explorer/results/explorer.html"
SIZES = {"": (1280, 900, "light"), "-dark": (1280, 900, "dark"), "-phone": (400, 860, "light")}


def main(report: Path = REPORT, explorer: Path = EXPLORER) -> None:
    """report.png; explorer.png, explorer-dark.png and explorer-phone.png, two methods compared."""
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1290})
        page.goto(report.resolve().as_uri())
        page.screenshot(path=DOCS / "report.png")
        for name, (width, height, scheme) in SIZES.items():
            size = {"width": width, "height": height}
            page = browser.new_page(viewport=size, color_scheme=scheme)
            page.goto(explorer.resolve().as_uri())
            page.wait_for_selector(".card")
            most = "Math.max(...data.answers.map((a) => Object.keys(a.concepts[0].methods).length))"
            page.evaluate(
                f"state.a = data.answers.find((a) => Object.keys(a.concepts[0].methods).length"
                f" === {most}).id; change(); compare();"
            )
            page.wait_for_timeout(500)
            page.screenshot(path=DOCS / f"explorer{name}.png")
        browser.close()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
