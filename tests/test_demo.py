"""The demo: what its page says of a file, and the page itself where Gradio is installed."""

import pathlib

import cv2
import pytest

from cxr import demo, deploy, phantom

MODEL = next((pathlib.Path(__file__).parents[1] / "results").glob("*/models/*.keras"))


@pytest.fixture(scope="module")
def loaded():
    return deploy.load(MODEL)


def test_a_film_gives_picture_decision_and_threshold_and_a_hand_of_noise_a_warning(loaded, tmp_path):
    film = phantom.render(0, "bacterial").image
    cv2.imwrite(str(tmp_path / "film.png"), film)
    cv2.imwrite(str(tmp_path / "inverted.png"), 255 - film)
    picture, text = demo.score(tmp_path / "film.png", *loaded)
    assert picture.ndim == 3 and picture.shape[1] == 2 * picture.shape[0] and "called" in text and "threshold" in text
    assert "⚠" in demo.score(tmp_path / "inverted.png", *loaded)[1]


def test_a_file_that_is_no_image_gives_the_reason(loaded, tmp_path):
    (tmp_path / "notes.txt").write_text("words")
    picture, text = demo.score(tmp_path / "notes.txt", *loaded)
    assert picture is None and "Not read" in text


def test_the_page_is_built_where_gradio_is_installed():
    pytest.importorskip("gradio", reason="the page is an extra: pip install -r requirements-demo.txt")
    assert "not diagnosis" in demo.page(str(MODEL)).description
