"""Tables and pages are made only from records that hold, and say what may be said."""

import dataclasses
import gzip
import json
import pathlib
import re

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
import pytest

from cxr import compare, config, evaluate, records, report


def manifest(n=100, synthetic=True, source="phantom"):
    """A split manifest, as far as records read it."""
    rng, parts = np.random.default_rng(0), []
    for split in ("train", "val", "test", "test_duplicate"):
        size = 5 if split == "test_duplicate" else n
        parts.append(pd.DataFrame({
            "image_id": [f"{split}/{k:04d}.png" for k in range(size)], "sha256": [f"{split}{k}" for k in range(size)],
            "patient_id": rng.integers(2 * n // 3, size=size).astype(str), "split": split,
            "label": np.where(np.arange(size) % 5 < 2, "NORMAL", "PNEUMONIA")}))
    table = pd.concat(parts, ignore_index=True)
    table.attrs = {"source": source, "synthetic": synthetic, "unreadable": []}
    return table


def scores(table, strength, seed, shift=0.5, purpose="classify", shifted=True):
    """A predictions table of a model of given strength: seeds share most of their errors, the test set is harder."""
    rows = table[table["split"] != "train"].assign(y_true=lambda t: (t["label"] != "NORMAL").astype(int))
    if shifted and purpose == "classify":
        more = rows[rows["split"] == "val"]
        rows = pd.concat([rows, more.assign(split="val_shifted", image_id=more["image_id"] + "#0")])
    common, own = (np.random.default_rng(s).normal(size=len(rows)) for s in (7, [int(100 * strength) + 1000, seed]))
    easier = np.where(rows["split"] == "val", 1.0, 0.0)
    logit = (strength + easier) * (2 * rows["y_true"] - 1) + shift + 1.6 * common + 0.6 * own
    return rows.assign(y_score=1 / (1 + np.exp(-logit)) if purpose == "classify" else 40 + 5 * logit)


def fake_run(directory, notebook, data=None, seeds=(0, 1, 2)):
    """A run as a notebook opens it."""
    data, folder = manifest() if data is None else data, pathlib.Path(directory)
    known = {"notebook": notebook, "profile": config.PROFILES["smoke"], "directory": folder, "cache": folder,
             "official": data, "manifest": data}
    return records.Run(**{field.name: known.get(field.name, list(seeds)) for field in dataclasses.fields(records.Run)})


def add(run, variant, strength, *, purpose="classify", split="patient", shift=0.5, **extra):
    """Write the records of one variant, one for each seed of the run."""
    for seed in run.seeds:
        table = scores(run.manifest, strength, seed, shift, purpose)
        run.save(variant, {"split": split, "strength": strength}, seed, table, purpose=purpose, **extra)


def add_baselines(run):
    """Write the three trivial baselines."""
    table = scores(run.manifest, 0.6, 0, purpose="baseline")
    for variant, y_score in (("always pneumonia", 1.0), ("blur score", table["y_score"]),
                             ("mean grey level", table["y_score"].to_numpy()[::-1])):
        run.save(variant, {"split": "patient"}, 0, table.assign(y_score=y_score), purpose="baseline")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A results folder with baselines, two notebooks and anomaly scores, on phantoms."""
    folder = tmp_path_factory.mktemp("runs")
    add_baselines(fake_run(folder, "01_dedup_augment", seeds=(0,)))
    baseline = fake_run(folder, "02_baseline_cnn")
    add(baseline, "seed recipe", 0.9, split="image", shift=2,
        history={"loss": [2, 1], "val_loss": [2, 1], "auc": [0.6, 0.7], "val_auc": [0.6, 0.7]})
    add(baseline, "lab recipe", 2.0)
    strategies = {"none": 1.5, "rotation": 1.5001, "class brightness": 0.1, "<b>tags & such</b>": 1.6}
    for variant, strength in strategies.items():
        add(fake_run(folder, "03_augmented_cnn"), variant, strength)
    add(fake_run(folder, "08_autoencoder", seeds=(0, 1)), "seed recipe", 0.4, purpose="anomaly")
    return folder / "results"


@pytest.fixture
def copied(made, tmp_path):
    """The same folder, free to be changed."""
    for path in made.rglob("*.*"):
        target = tmp_path / path.relative_to(made)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture(scope="module")
def loaded(made):
    return report.load(made)


def first(folder, pattern="02*"):
    return sorted((folder / "records").glob(pattern))[0]


def rewrite(path, change):
    record = json.loads(path.read_text())
    change(record)
    del record["sha256"]  # of the first records, which carry none: recomputing the numbers must notice alone
    path.write_text(json.dumps(record))


def test_table_holds_means_over_seeds_and_the_interval_of_the_averaged_score(loaded):
    rows = report.table(report.cohorts(loaded)[0])
    group = rows.index[rows["variant"] == "lab recipe"][0]
    runs = report.by_group(loaded)[group]
    aucs = [run["metrics"]["test"]["auc"]["value"] for run in runs]
    row = rows.loc[group]
    assert (row["auc"], row["auc_sd"]) == pytest.approx((np.mean(aucs), np.std(aucs, ddof=1))) and row["seeds"] == 3
    average = compare.seed_average(report.frames(runs))
    expected = evaluate.bootstrap_auc(average["y_true"], average["y_score"], average["patient_id"])
    assert (row["averaged"], row["low"], row["high"]) == expected[:3]
    assert row["gap"] == pytest.approx(row["val_auc"] - row["auc"])
    assert list(rows["variant"][:3]) == ["blur score", "always pneumonia", "mean grey level"], "baselines stand on top"
    assert rows.loc[rows["variant"] == "always pneumonia", "accuracy"].item() == pytest.approx(0.6)
    assert rows.loc[rows["purpose"] == "anomaly", "threshold"].item() == "normal_95"


def test_only_the_notebooks_asked_for_are_read(copied):
    (copied / "records" / "99_broken-00000000-s0.json").write_text("{")
    assert {record["notebook"] for record in report.load(copied, notebooks=("08",))} == {"08_autoencoder"}
    with pytest.raises(ValueError, match="99_broken"):
        report.load(copied, notebooks=("08", "99"))


@pytest.mark.parametrize("intervals", [True, False])
def test_a_changed_number_stops_the_report(copied, intervals):
    path = first(copied)
    auc = json.loads(path.read_text())["metrics"]["test"]["auc"]["value"]
    rewrite(path, lambda record: record["metrics"]["test"]["auc"].update(value=auc + 1e-4))
    with pytest.raises(ValueError, match=rf"{path.name}: metrics.test.auc.value"):
        report.load(copied, intervals=intervals)


@pytest.mark.parametrize(("change", "message"), [
    (lambda r: r["metrics"]["test"]["auc"].update(low=0.1), "metrics.test.auc.low"),
    (lambda r: r["metrics"].pop("val"), "absent"), (lambda r: r["thresholds"].update(youden=0.9), "thresholds.youden"),
    (lambda r: r["calibration"].update(temperature=1.0), "calibration"), (lambda r: r.pop("thresholds"), "lacks"),
    (lambda r: r.update(schema=0), "schema 0"), (lambda r: r.update(run_id="x-s0"), "run_id x-s0"),
    (lambda r: r["predictions"].update(sha256="0"), "does not match the hash"),
    (lambda r: r.pop("predictions"), "not a record"),
    (lambda r: r["data"].update(source="another"), "mixes the data sources")])
def test_whatever_does_not_hold_is_named(copied, change, message):
    rewrite(first(copied), change)
    with pytest.raises(ValueError, match=message):
        report.load(copied, notebooks=("02",))


def test_missing_and_changed_predictions_are_named(copied):
    path = copied / json.loads(first(copied).read_text())["predictions"]["path"]
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b",1,0", b",1,1", 1)))
    with pytest.raises(ValueError, match=path.name):
        report.load(copied, notebooks=("02",))
    path.unlink()
    with pytest.raises(ValueError, match=f"{path.name} is missing"):
        report.load(copied, notebooks=("02",))


def test_an_empty_folder_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="make reproduce"):
        report.load(tmp_path)


def test_a_table_does_not_mix_test_sets_but_cohorts_part_them(copied, tmp_path):
    add(fake_run(tmp_path / "more", "07_dcgan", manifest(n=60), seeds=(0,)), "seed recipe", 1.0)
    other = report.load(tmp_path / "more" / "results")
    mixed = report.load(copied, notebooks=("02",)) + other
    with pytest.raises(ValueError, match="manifest"):
        report.table(mixed)
    assert [len(cohort) for cohort in report.cohorts(mixed)] == [6, 1]
    same_manifest = [record | {"data": mixed[0]["data"]} for record in mixed]
    with pytest.raises(ValueError, match="test set"):
        report.table(same_manifest)
    with pytest.raises(ValueError, match="scores no images"):
        report.table([*other, other[0] | {"purpose": "generate"}])


def test_better_is_written_only_where_the_corrected_p_allows_it(loaded):
    strategies = [record for record in loaded if record["notebook"] == "03_augmented_cnn"]
    reference = report.reference_of(report.table(strategies))
    assert report.by_group(strategies)[reference][0]["variant"] == "none"
    found = report.comparisons(strategies, reference).set_index("variant")
    assert found.loc["class brightness", "verdict"] == "worse" and found.loc["class brightness", "high"] < 0
    assert found.loc["rotation", "verdict"] == "not shown"
    raw = compare.compare_groups(*([run["frame"] for run in strategies if run["variant"] == name]
                                   for name in ("rotation", "none")))
    assert found.loc["rotation", "p_bootstrap"] >= raw["difference"].p_value, "corrected upwards"
    two_seeds = [record for record in strategies if record["seed"] < 2]
    assert set(report.comparisons(two_seeds, reference)["verdict"]) == {"too few seeds"}
    with pytest.raises(ValueError, match="no run group 'x'"):
        report.comparisons(strategies, "x")


def test_comparisons_stay_within_one_purpose(loaded):
    group = next(record["group"] for record in loaded if record["variant"] == "lab recipe")
    assert not report.comparisons(loaded, group)["variant"].isin(["blur score"]).any()


def test_reported_numbers_stand_beside_the_same_variant(loaded):
    beside = report.reported_vs_measured(loaded)
    assert set(beside["what"]) == {"CNN"} and set(beside["split"]) == {"image"}
    line = beside.set_index("metric").loc["accuracy"]
    assert line["reported"] == 0.689 and line["low"] < 0.689 < line["high"]
    runs = [record for record in loaded if record["variant"] == "seed recipe" and record["purpose"] == "classify"]
    accuracies = [run["metrics"]["test_official"]["accuracy@half"]["value"] for run in runs]
    assert line["measured"] == pytest.approx(np.mean(accuracies))


def test_published_numbers_are_complete():
    found = report.reported()
    names = set(evaluate.metrics([0, 1], [0.2, 0.7], {"half": 0.5}))
    for study in found["studies"]:
        assert {"study", "what", "notebook", "variant", "n", "numbers", "note"} == set(study) - {"summary_of"}
        assert all(metric in names or f"{metric}@half" in names for metric in study["numbers"])
        assert all(0 < value <= 1 for value in study["numbers"].values())
    assert {study["study"] for study in found["studies"] + found["claims"]} == {"S0", "S1", "S2", "S3", "S4"}


def test_headline_is_chosen_on_validation_or_named(copied):
    loaded = report.load(copied, intervals=False)
    rows = report.table(loaded)
    group, why = report.headline(copied, rows)
    able = rows[(rows["purpose"] == "classify") & (rows["split"] == "patient")]
    assert group == able["shifted_auc"].idxmax() and "validation" in why
    rescored = rows.assign(shifted_auc=rows["shifted_auc"].where(rows.index != rows.index[-1]))
    assert "shifted" in report.headline(copied, rescored)[1], "one without a shifted AUC turns the rule off for none"
    falling = np.linspace(0.9, 0.8, len(rows))
    nameless = rows.assign(variant="x", shifted_auc=falling, auc=falling[::-1])
    assert report.reference_of(nameless.sort_values("auc", ascending=False)) == rows.index[0], "not the best on test"
    painted = rows.assign(variant=rows["variant"].where(rows.index != group, report.PAINTED))
    assert report.headline(copied, painted)[0] != group, "validation images that carry the label choose nothing"
    nameless = able.assign(variant=np.where(able.index == group, report.PAINTED, "x"))
    assert report.reference_of(nameless) != group
    named = rows.index[rows["variant"] == "seed recipe"][0]
    (copied / "headline.json").write_text(json.dumps({"run_group": named, "threshold": "youden"}))
    assert report.headline(copied, rows) == (named, "named in headline.json")
    (copied / "headline.json").write_text(json.dumps({"threshold": "youden"}))
    assert report.headline(copied, rows) == (group, why), "a threshold alone names no group"
    assert "At “youden”" in report.answer(report.table(loaded, threshold="youden"), named, "")
    (copied / "headline.json").write_text(json.dumps({"run_group": "nobody"}))
    with pytest.raises(ValueError, match="nobody"):
        report.headline(copied, rows)


def test_readme_block_is_replaced_and_the_rest_stays(made, loaded, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.MARKERS[0]}\nold\n{report.MARKERS[1]}\nafter \\1\n")
    report.update_readme(readme, {made: loaded})
    once = readme.read_text()
    report.update_readme(readme, {made: loaded})
    assert readme.read_text() == once
    assert once.startswith("before\n") and once.endswith("\nafter \\1\n") and "\nold\n" not in once
    assert report.SYNTHETIC in once and "| lab recipe |" in once and "| always pneumonia |" in once
    tables = [[line.count("|") for line in part.splitlines()] for part in once.split("\n\n") if part.startswith("|")]
    assert len(tables) == 2 and all(len(set(widths)) == 1 for widths in tables), "rows of a table have the same cells"
    assert "| S2 | CNN | ? px, phantoms | image | 3 | accuracy | 0.689 (" in once
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="results:begin"):
        report.update_readme(readme, {made: loaded})


def test_page_is_self_contained_escaped_and_says_that_phantoms_are_phantoms(made, loaded, tmp_path):
    path = report.html(made, tmp_path / "report.html", loaded=loaded)
    page = path.read_text()
    assert not re.search(r"(src|href)=[\"'](?!data:|#)|@import|url\(", page), "nothing is fetched from elsewhere"
    assert "<b>tags &amp; such</b>" not in page and "&lt;b&gt;tags &amp; such&lt;/b&gt;" in page
    assert "Research and teaching, not diagnosis" in page
    sections = re.findall(r"<section.*?</section>", page, re.DOTALL)
    assert len(sections) > 7 and all(report.SYNTHETIC in section for section in sections)
    assert page.count("Synthetic phantom.</b>") == page.count("<figcaption>") > 5
    for words in ("always pneumonia", "class brightness", "no difference shown", "anomaly scores", "0.689"):
        assert words in page
    again = report.html(made, tmp_path / "again.html", loaded=loaded)
    assert again.read_text() == page, "the same records give the same bytes"


def test_page_of_real_images_does_not_call_them_synthetic(tmp_path):
    run = fake_run(tmp_path, "02_baseline_cnn", manifest(n=60, synthetic=False, source="chest_xray"), seeds=(0,))
    add(run, "lab recipe", 1.0)
    page = report.html(run.results, tmp_path / "report.html").read_text()
    assert "ynthetic" not in page and "chest_xray" in page


def test_page_of_baselines_alone_can_be_made(tmp_path):
    run = fake_run(tmp_path, "01_dedup_augment", manifest(n=60), seeds=(0,))
    add_baselines(run)
    assert "blur score" in report.html(run.results, tmp_path / "report.html").read_text()


def test_consequences_add_up_and_screening_misses_less(loaded):
    runs = next(runs for runs in report.by_group(loaded).values() if runs[0]["variant"] == "lab recipe")
    rows = report.consequences(compare.seed_average([run["frame"] for run in runs]))
    counts = rows[[f"{name} of 1,000" for name in ("found", "missed", "false alarms", "cleared")]]
    assert len(rows) == 6 and (counts.sum(axis=1) - 1000).abs().max() <= 2
    support, screening = (rows[rows["scenario"].str.startswith(name)] for name in report.SCENARIOS)
    assert (support["missed of 1,000"].to_numpy() >= screening["missed of 1,000"].to_numpy()).all()
    assert (support["false alarms of 1,000"].to_numpy() < screening["false alarms of 1,000"].to_numpy()).all()


def test_the_points_of_study_s1_stand_only_beside_its_own_test_images():
    found = report.published_points(618)
    assert {name: points.shape for name, points in found.items()} == {
        "study S1, frozen": (6, 2), "study S1, partial": (5, 2), "study S1, full": (4, 2)}
    assert [1.0, 0.372] in found["study S1, full"].tolist() and not report.published_points(624)


def test_strategies_stand_beside_each_other_for_each_network_and_start(tmp_path):
    run = fake_run(tmp_path, "05_transfer_learning", manifest(n=60), seeds=(0, 1))
    for strength, (weights, strategy) in enumerate((("imagenet", "frozen"), ("imagenet", "full"), (None, "full")), 1):
        for seed in run.seeds:
            about = {"backbone": "resnet_50", "strategy": strategy, "weights": weights, "augment": "none"}
            run.save(f"{strategy} {weights}", about, seed, scores(run.manifest, strength / 2, seed))
    run.save("study S1 full", about | {"weights": "imagenet", "schedule": "step"}, 0, scores(run.manifest, 0.8, 0))
    run.save("jittered", about | {"augment": "aspect_jitter"}, 0, scores(run.manifest, 0.9, 0))
    run.save("stretched", about | {"scored_on": "stretched films"}, 0, scores(run.manifest, 0.2, 0))
    add(run, "no transfer", 1.0)
    found = report.load(run.results, intervals=False)
    aucs, texts = report.strategy_grid(report.table(found), found)
    assert list(aucs.columns) == ["frozen", "full"] and list(aucs.index) == [
        "resnet_50\nimagenet", "resnet_50\nimagenet, study S1's recipe", "resnet_50\nrandom",
        "resnet_50\nrandom, aspect jitter"]
    assert np.isnan(aucs.loc["resnet_50\nrandom", "frozen"]), "what was not run stays empty"
    averaged = report.table(found)["averaged"]
    shown = ~report.table(found)["variant"].isin(["no transfer", "stretched"])
    assert sorted(aucs.stack().dropna()) == sorted(averaged[shown])
    assert texts.iloc[0, 1].startswith(f"{aucs.iloc[0, 1]:.3f}")
    run.save("full imagenet, 16 epochs", about | {"weights": "imagenet", "epochs": 16}, 0, scores(run.manifest, 1.0, 0))
    run.save("the same again", about | {"weights": "imagenet", "epochs": 20}, 0, scores(run.manifest, 1.1, 0))
    more = report.load(run.results, intervals=False)
    longer, _ = report.strategy_grid(report.table(more), more)
    assert longer["full"].notna().sum() == aucs["full"].notna().sum() + 2, "no recipe hides another"
    assert "resnet_50\nimagenet, 16 epochs" in longer.index
    page = report.html(run.results, tmp_path / "report.html", loaded=found).read_text()
    assert "Test AUC of the seed-averaged score" in page and "Labels to look at again" in page


def test_the_readme_shows_what_the_published_predictions_give(tmp_path):
    root = pathlib.Path(__file__).parents[1]
    loaded = {folder: report.load(folder, intervals=False) for folder in sorted((root / "results").iterdir())}
    shown = (root / "README.md").read_text()
    (tmp_path / "README.md").write_text(shown)
    report.update_readme(tmp_path / "README.md", loaded)
    assert (tmp_path / "README.md").read_text() == shown, "make report"
