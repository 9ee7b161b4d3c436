"""The plots of a run directory: those that its files allow, showing what the files say."""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from cltjax.errors import UserError
from cltjax.plots import draw, plot_density, plot_features, plot_fvu, plot_loss


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


GROUPS = ("all", "text", "image", "special", "outlier")


def records(n: int = 40, targets: int = 5) -> list[dict]:
    """A run whose loss falls and whose dead features become more, then fewer."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(1, n + 1):
        fvu = 0.02 * np.arange(1, targets + 1) + 0.9 * np.exp(-i / 6) + 0.002 * rng.random(targets)
        found.append(
            {"step": 50 * i, "tokens": 25600 * i, "loss": float(fvu.sum()), "fvu": float(fvu.mean())}
            | {"fvu_by_target": fvu.tolist(), "l0": 16 - 5 * np.exp(-i / 9), "dead": 0.03 * np.sin(i / 13) ** 2}
        )
    return found


def summary(targets: int = 5, ridge: bool = False) -> dict:
    """Figures that differ by target and by group; special and outlier tokens are left out."""

    def by_target(factor: float) -> dict:
        return {
            str(t): {
                name: {"rows": 997, "fvu": factor * 0.02 * (t + 1) * (g + 1), "slope": None if g == 3 else 1 + 0.01 * g}
                for g, name in enumerate(GROUPS)
            }
            for t in range(1, targets + 1)
        }

    found = {"split": "test", "rows": 997, "rows_by_group": {"text": 500, "image": 497}}
    found |= {"left_out": {"special": 31, "outlier": 2}, "fvu": dict.fromkeys(GROUPS, 0.1), "targets": by_target(1)}
    return found | ({"ridge": {"fvu": {}, "targets": by_target(3)}} if ridge else {})


def source(layer: int, features: int = 1009) -> dict:
    """A source whose features fire the more often, the deeper it lies."""
    rng = np.random.default_rng(layer)
    rates = np.clip(rng.normal(-2.5 + 0.02 * layer, 0.6, features - 50), -4.4, -0.05)
    counts = np.histogram(rates, 70, (-7, 0))[0].tolist()
    density = {"log10_from": -7, "log10_to": 0, "counts": counts}
    head = {"source": layer, "split": "test", "rows": 997, "settings": {"features": features, "k": 16}}
    return head | {"l0": 15.7, "dead": 50 / features, "density": density}


def write(run: Path, lines: list[dict], whole: dict | None, sources: list[dict]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    if lines:
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if whole:
        (run / "metrics.json").write_text(json.dumps(whole))
    for by in sources:
        (run / f"metrics_L{by['source']}.json").write_text(json.dumps(by))


def lines_of(axes: Axes) -> dict[str, list[float]]:
    """What is drawn, by label."""
    return {str(line.get_label()): [float(y) for y in np.asarray(line.get_ydata())] for line in axes.lines}


def test_what_the_files_allow(tmp_path: Path):
    cases = {
        "all": ((records(), summary(), [source(0), source(10)]), ["loss", "features", "fvu", "density"]),
        "training": ((records(3), None, []), ["loss", "features"]),
        "one": ((records(1, 1), summary(1, ridge=True), []), ["loss", "features", "fvu"]),
        "deep": ((records(9, 33), summary(33, ridge=True), [source(n) for n in range(33)]), ["loss", "fvu", "density"]),
    }
    for name, (files, expected) in cases.items():
        run = tmp_path / name
        write(run, *files)
        paths = draw(run)
        assert set(expected) <= {path.stem for path in paths}
        assert sorted(paths) == sorted((run / "plots").iterdir())
        assert all(path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10_000 for path in paths)
    assert [path.stem for path in draw(tmp_path / "all")] == ["loss", "features", "fvu", "density"]


def test_training_curves_are_the_records():
    lines = records(7)
    left, right = plot_loss(lines).axes
    assert next(iter(lines_of(left).values())) == [line["loss"] for line in lines]
    assert lines_of(right)["mean over targets"] == [line["fvu"] for line in lines]
    drawn = [np.asarray(line.get_ydata()).tolist() for line in right.lines]
    for t in range(5):
        assert [line["fvu_by_target"][t] for line in lines] in drawn
    dead, l0 = plot_features(lines).axes
    assert next(iter(lines_of(dead).values())) == [line["dead"] for line in lines]
    assert next(iter(lines_of(l0).values())) == [line["l0"] for line in lines]
    for axes in (left, right, dead, l0):
        assert isinstance(axes.lines[0], Line2D) and axes.lines[0].get_xdata()[0] == 50  # type: ignore[index]


def test_what_was_measured_on_val_rows_is_drawn_beside_the_training_batches(tmp_path: Path):
    measured = [{"step": 70, "val_fvu": 0.41}, {"step": 140, "val_fvu": 0.23}]
    lines = records(3)
    write(tmp_path, [lines[0], measured[0], *lines[1:], measured[1]], None, [])
    assert [path.stem for path in draw(tmp_path)] == ["loss", "features"]
    _, right = plot_loss(lines, measured).axes
    (line,) = (line for line in right.lines if "val rows" in str(line.get_label()))
    assert np.asarray(line.get_xdata()).tolist() == [70, 140] and np.asarray(line.get_ydata()).tolist() == [0.41, 0.23]
    assert not any("val rows" in label for label in lines_of(plot_loss(lines).axes[1]))


def test_fvu_of_the_groups_that_are_trained_on():
    found = summary(3, ridge=True)
    upper, lower = plot_fvu(found).axes
    drawn = lines_of(upper)
    assert drawn.keys() == {"all", "text", "image", "all: ridge", "text: ridge", "image: ridge", "mean only"}
    assert drawn["image"] == [found["targets"][t]["image"]["fvu"] for t in "123"]
    assert drawn["image: ridge"] == [found["ridge"]["targets"][t]["image"]["fvu"] for t in "123"]
    assert [text.get_text() for text in lower.get_xticklabels()] == ["1", "2", "3"]
    low, high = upper.get_ylim()
    assert 0 < low < min(drawn["all"]) < 1 < high < 2


def test_density_is_a_share_of_all_features():
    figure = plot_density([source(10), source(2)])
    (axes,) = figure.axes
    first, second = axes.patches
    assert first.get_data().values.sum() == pytest.approx((1009 - 50) / 1009)  # type: ignore[attr-defined]
    np.testing.assert_allclose(second.get_data().values * 1009, source(10)["density"]["counts"])  # type: ignore[attr-defined]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["layer 2: 5.0% dead", "layer 10: 5.0% dead"]
    many, bars, _ = plot_density([source(n) for n in reversed(range(33))]).axes
    shares = np.asarray(many.collections[0].get_array())
    np.testing.assert_allclose(shares[32] * 1009, source(32)["density"]["counts"])
    assert [bar.get_width() for bar in bars.patches] == [50 / 1009] * 33  # type: ignore[attr-defined]
    silent = source(0) | {"dead": 1.0, "density": {"log10_from": -7, "log10_to": 0, "counts": [0] * 70}}
    plot_density([silent])


def test_files_that_cannot_be_used(tmp_path: Path):
    for run in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match="nothing to plot"):
            draw(run)
    write(tmp_path, records(3), None, [])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 200, "lo')  # a run that is going on
    assert len(draw(tmp_path)) == 2
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match="metrics.jsonl is damaged"):
        draw(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    write(tmp_path, [], {name: value for name, value in summary().items() if name != "left_out"}, [])
    with pytest.raises(UserError, match=r"fvu.png needs 'left_out', .*evaluate.py"):
        draw(tmp_path)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        draw(tmp_path)


def test_plots_import_no_jax():
    code = "import sys, cltjax.plots; assert not {'jax', 'torch', 'orbax'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
