"""The report and the prediction page in a real browser: nothing broken, no sideways scrolling, a print that holds all.

Skips where no Chromium or Chrome is installed; the browser is no requirement of the lab.
"""

import html
import json
import os
import pathlib
import re
import shutil
import subprocess

import cv2
import pytest

from cxr import phantom, report

ROOT = pathlib.Path(__file__).parents[1]
BROWSER = os.environ.get("CXR_BROWSER") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome on PATH (or in CXR_BROWSER)")

# The page stands in a frame of the width asked for: a window cannot be narrower than 500 px.
LOOK = """<!doctype html><iframe id="page" src="%s" style="width:%dpx;height:3000px;border:0"></iframe><script>
const found = document.createElement("pre");
document.getElementById("page").onload = (event) => {
  const page = event.target.contentDocument, root = page.documentElement, images = [...page.images];
  const seen = (image) => image.getClientRects().length > 0;
  found.textContent = JSON.stringify({width: root.clientWidth, scroll: root.scrollWidth, images: images.length,
    shown: images.filter(seen).length, broken: images.filter((image) => !image.naturalWidth).length,
    unnamed: images.filter((image) => !image.alt).length, text: page.body.innerText.length});
  document.body.append(found);
};
</script>"""


@pytest.fixture(scope="module", params=["report", "predictions"])
def page(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "report":
        source = ROOT / "results" / "pneumoniamnist"
        real = ROOT / "results" / "chest_xray"
        source = real if os.environ.get("CXR_BROWSER_ALL") else source  # minutes of bootstrap
        return report.html(source, folder / "index.html", loaded=report.load(source, intervals=False))
    from cxr import deploy, predict

    model = next(ROOT.glob("results/*/models/*.keras"))
    for seed, kind in enumerate(("normal", "bacterial", "viral")):
        name = f"{kind}-{'a-very-long-name-without-a-space' * 3}.png"
        cv2.imwrite(str(folder / name), phantom.render(seed, kind).image)
    (folder / "broken.png").write_bytes(b"not an image")
    network, about = deploy.load(model)
    return predict.write_page(predict.score_files(predict.find_files([folder]), network, about, folder / "out"), about,
                              folder / "out")


def browse(tmp_path, *options):
    done = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
                           f"--user-data-dir={tmp_path / 'profile'}", *options], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_broken_and_nothing_scrolls_sideways(page, width, tmp_path):
    eager = tmp_path / "page.html"  # lazy images are fetched after the page counts as loaded
    eager.write_text(page.read_text().replace('loading="lazy"', ""))
    (tmp_path / "look.html").write_text(LOOK % (eager.as_uri(), width))
    seen = browse(tmp_path, "--window-size=1400,3000", "--dump-dom", (tmp_path / "look.html").as_uri())
    found = json.loads(html.unescape(re.search("<pre>(.*?)</pre>", seen, re.DOTALL)[1]))
    assert found["scroll"] <= found["width"] and width - 20 < found["width"] <= width, found  # less the scroll bar
    assert found["shown"] >= 3 and found["broken"] == found["unnamed"] == 0 and found["text"] > 500, found


def test_print_holds_the_page(page, tmp_path):
    browse(tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer", page.as_uri())
    pdf = (tmp_path / "page.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 1 and len(pdf) > 20_000
    assert "@media print" in page.read_text()
