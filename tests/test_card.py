"""The model card's numbers are those of the records, and the words around them stay."""

import pathlib
import shutil

import pytest

from cxr import __main__ as cli
from cxr import card, report

ROOT = pathlib.Path(__file__).parents[1]
PUBLISHED = sorted(path.parent for path in ROOT.glob("results/*/records"))


def test_card_is_up_to_date_with_the_records(tmp_path):
    copy = tmp_path / "MODEL_CARD.md"
    shutil.copy(ROOT / "MODEL_CARD.md", copy)
    card.update(copy, *PUBLISHED)
    assert copy.read_text() == (ROOT / "MODEL_CARD.md").read_text(), "make report"


def test_every_published_model_stands_in_the_card_with_what_it_needs():
    text = (ROOT / "MODEL_CARD.md").read_text()
    for path in ROOT.glob("results/*/models/*.keras"):
        assert f"### {path.stem}" in text
    for words in ("not for diagnosis", "Calibration on test", "Probes", "sensitivity 95 shifted", "children"):
        assert words in text


def test_a_card_without_markers_is_left_alone(tmp_path, capsys):
    (tmp_path / "card.md").write_text("words")
    assert cli.main(["report", *map(str, PUBLISHED), "--card", str(tmp_path / "card.md")]) == 2
    assert (tmp_path / "card.md").read_text() == "words" and "markers" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="once each"):
        report.rewrite(tmp_path / "card.md", "numbers")
