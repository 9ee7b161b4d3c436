"""`cltjax dashboard`: the page it writes, in a browser without network, and what it says of wrong options."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from capture.config import CaptureConfig
from capture.recorder import capture
from capture.vlm import load
from cltjax.cli import Dashboard, execute
from cltjax.errors import UserError
from cltjax.replacement.dashboard import write, write_dashboard
from pages import HOSTILE, chromium, opened, picture, png
from test_replacement import random_clt

DEMO = "examples/shapes/model"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


def panel(layer: int, feature: int, **changes: Any) -> dict[str, Any]:
    """A panel made up."""
    example = {
        "sample": f"sample-{feature}",
        "image": "i0",
        "tokens": [" Is", " it", " red", "?", " yes", "."],
        "values": [0.0, 0.0, 2.0, 0.5, 0.0, 1.0],
        "patches": [[0.0, 0.0, 0.5, 0.5, 1.0], [0.5, 0.5, 0.5, 0.5, 2.0]],
        "unplaced": 0,
        "peak": 2.0,
        "generated": 4,
    }
    made = {"layer": layer, "feature": feature, "label": None, "score": None, "rows": 1009, "density": 0.01 * feature}
    made |= {"modality": {"text": 0.25, "image": 0.75, "special": 0.0}, "max": 2.0}
    made |= {"histogram": {"edges": [0.0, 0.5, 1.0, 1.5, 2.0], "counts": [7, 5, 0, 2]}}
    made |= {"decoder_norms": [[layer, 1.5], [layer + 1, 0.5]], "nearest": [[f"{layer}:2", 0.5], ["9:9", 0.25]]}
    made |= {"promoted": [[" red", 1.5]], "suppressed": [[" blue", -0.5]], "top": [example], "random": [example] * 2}
    return made | changes


def page_of(folder: Path, panels: list[dict[str, Any]], **changes: Any) -> Path:
    features = {f"{one['layer']}:{one['feature']}": one for one in panels}
    data = {"title": "Made up", "about": "for a test", "order": list(features), "features": features}
    write(data | {"images": {"i0": png(picture(48))}} | changes, folder)
    assert json.loads((folder / "dashboard.json").read_text())["order"] == list(features)
    return folder / "index.html"


def ids(page: Any) -> list[str]:
    return page.locator("article").evaluate_all("all => all.map(one => one.dataset.key)")


def test_a_panel_shows_what_it_is_given(browser: Any, tmp_path: Path) -> None:
    with opened(browser, page_of(tmp_path, [panel(3, 17, label="red patches", score=0.875)])) as page:
        one = page.locator("article")
        assert one.locator("h3").text_content().split() == ["3:17", "red", "patches", "0.875"]
        facts = one.locator(".panel-facts").text_content()
        assert "17%" in facts and "75% image, 25% text" in facts and "largest2" in facts
        bars = one.locator(".panel-chart").nth(0).locator(".panel-bar")
        heights = bars.evaluate_all("all => all.map(bar => +bar.getAttribute('height'))")
        assert heights[0] == 42 and heights[1] == 30 and heights[2] == 0 and heights[3] == 12
        example = one.locator(".panel-example").first
        assert example.locator(".panel-text").text_content() == "Is it red? yes."
        assert example.locator(".panel-answer").text_content() == "yes."
        marked = example.locator(".panel-token")
        assert marked.all_text_contents() == [" red", "?", "."]
        strengths = marked.evaluate_all("all => all.map(one => parseFloat(one.style.getPropertyValue('--strength')))")
        assert strengths[0] > strengths[2] > strengths[1] > 0
        assert marked.first.get_attribute("title") == "2"
        patches = example.locator(".panel-patch")
        assert patches.count() == 2 and patches.nth(1).get_attribute("x") == "0.5"
        assert patches.evaluate_all("all => all.map(one => +one.getAttribute('stroke-opacity'))") == [0.56, 1]
        assert example.locator(".panel-veil").get_attribute("opacity") == "1"
        image, box = example.locator("img"), example.locator("svg")
        assert image.evaluate("one => getComputedStyle(one).imageRendering") == "pixelated"
        assert image.bounding_box() == box.bounding_box()
        assert [row.split() for row in one.locator(".panel-near .panel-tokens").all_text_contents()] == [
            ["near,", "layer", "33:20.5"],
            ["near,", "others9:90.25"],
        ]
        assert one.locator("details li").count() == 0  # not before it is opened
        one.locator("summary").click()
        page.wait_for_selector("details li")
        assert one.locator("details li").count() == 2


def test_search_filters_and_order(browser: Any, tmp_path: Path) -> None:
    text = {"text": 1.0, "image": 0.0, "special": 0.0}
    made = [
        panel(3, 17, label="red patches", promoted=[[" wool", 1.0]]),
        panel(0, 2, max=9.0, modality=text, promoted=[[" Red", 1.0]]),
        panel(3, 5, max=4.0, promoted=[["ered", 1.0]]),
    ]
    with opened(browser, page_of(tmp_path, made)) as page:
        search = page.locator("#search")
        assert ids(page) == ["3:17", "0:2", "3:5"]
        for query, expected in {"red": ["3:17", "0:2"], "3:5": ["3:5"], "3:": ["3:17", "3:5"], "zzz": []}.items():
            search.fill(query)
            assert ids(page) == expected
        assert page.locator("#nothing").is_visible() and page.locator("#count").text_content() == "0 of 3 features"
        page.keyboard.press("Escape")
        assert ids(page) == ["3:17", "0:2", "3:5"] and search.input_value() == ""
        for order, expected in {
            "density": ["3:17", "3:5", "0:2"],
            "rare": ["0:2", "3:5", "3:17"],
            "max": ["0:2", "3:5", "3:17"],
            "image": ["3:17", "3:5", "0:2"],
            "id": ["0:2", "3:5", "3:17"],
        }.items():
            page.select_option("#sort", order)
            assert ids(page) == expected
        page.select_option("#layer", "3")
        assert ids(page) == ["3:5", "3:17"]
        page.select_option("#modality", "text")
        assert ids(page) == []
        page.select_option("#layer", "")
        assert ids(page) == ["0:2"]
        page.select_option("#modality", "")
        page.check("#labelled")
        assert ids(page) == ["3:17"]


def test_keys_and_links(browser: Any, tmp_path: Path) -> None:
    made = [panel(0, number) for number in range(1, 8)]
    with opened(browser, page_of(tmp_path, made), after="#0:6") as page:
        focused = "document.activeElement.dataset.key"
        page.wait_for_function(f"{focused} === '0:6'")
        page.keyboard.press("k")
        assert page.evaluate(focused) == "0:5"
        page.keyboard.press("j")
        page.keyboard.press("j")
        assert page.evaluate(focused) == "0:7"
        page.wait_for_selector("article[data-key='0:7'] .panel")
        page.keyboard.press("r")
        assert page.locator("article[data-key='0:7'] details").get_attribute("open") is not None
        chips = page.locator("article[data-key='0:7'] .panel-near .panel-chip")
        assert chips.evaluate_all("all => all.map(one => one.tagName)") == ["BUTTON", "SPAN"]  # 9:9 is not on this page
        chips.first.click()
        assert page.evaluate(focused) == "0:2" and page.url.endswith("#0:2")
        page.keyboard.press("/")
        page.keyboard.type("0:3")
        assert ids(page) == ["0:3"]
        page.keyboard.press("Enter")
        assert page.evaluate(focused) == "0:3"


def test_hundreds_of_panels_are_drawn_when_they_are_near(browser: Any, tmp_path: Path) -> None:
    with opened(browser, page_of(tmp_path, [panel(i % 7, i) for i in range(1, 401)])) as page:
        page.wait_for_selector(".panel")
        assert page.locator("article").count() == 400 and page.locator(".panel").count() < 20
        page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
        page.wait_for_selector("article:last-child .panel")
        assert page.locator(".panel").count() < 40


def test_text_of_data_sets_is_text(browser: Any, tmp_path: Path) -> None:
    example = panel(0, 1)["top"][0] | {"sample": HOSTILE, "tokens": [HOSTILE] * 2, "values": [1.0, 0.0], "generated": 1}
    strange = [example, example | {"image": "__proto__"}, example | {"image": None}]
    made = panel(0, 1, label=HOSTILE, promoted=[[HOSTILE, 1.0]], suppressed=[[HOSTILE, -1.0]], top=strange)
    path = page_of(tmp_path, [made], title=HOSTILE, about=HOSTILE)
    with opened(browser, path) as page:
        page.wait_for_selector(".panel")
        assert page.evaluate("window.ran") is None
        assert page.locator("#title").text_content() == page.locator(".panel-label").text_content() == HOSTILE
        assert page.title().startswith("<img src=x")
        assert page.locator(".panel-token").first.text_content() == HOSTILE
        assert page.locator(".panel-image").count() == 1 and page.locator("img").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_window(browser: Any, tmp_path: Path, scheme: str) -> None:
    words = ["supercalifragilisticexpialidocious" * 5, *(f" word{i}" for i in range(99))]
    example = panel(0, 1)["top"][0] | {"tokens": words, "values": [1.0] * 100}
    path = page_of(tmp_path, [panel(0, 1, label="long " * 30, top=[example], promoted=[["x" * 200, 1.0]])])
    with opened(browser, path, width=380, color_scheme=scheme) as page:
        page.wait_for_selector(".panel")
        assert page.evaluate("document.documentElement.scrollWidth") == 380
        colours = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        assert [int(one[4:].split(",")[0]) > 128 for one in colours] == (
            [True, False] if scheme == "light" else [False, True]
        )


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store and a CLT of the demo."""
    folder = tmp_path_factory.mktemp("made")
    store = folder / "activations"
    capture(CaptureConfig(model=DEMO, out=store, max_samples=23, dtype="float32", shard_rows=301))
    random_clt(folder / "clt", load(DEMO))
    return folder


def test_the_command(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], browser: Any) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"0:3": "named", "1:4": {"label": "scored", "score": 0.5}, "2:2": "not shown"}))
    paths: dict[str, Any] = {
        "clt": made / "clt",
        "store": made / "activations",
        "out": tmp_path / "out",
        "labels": labels,
    }
    execute(Dashboard("0:3,1:4,0:3", **paths, split="train", examples=2))
    assert f"{tmp_path / 'out' / 'index.html'}: 2 features" in capsys.readouterr().out
    data = json.loads((tmp_path / "out/dashboard.json").read_text())
    assert data["order"] == list(data["features"]) == ["0:3", "1:4"]
    assert [one["label"] for one in data["features"].values()] == ["named", "scored"]
    assert all(len(one["top"]) == 2 for one in data["features"].values())
    execute(Dashboard("top:9", **paths, split="train", max_rows=300))
    data = json.loads((tmp_path / "out/dashboard.json").read_text())
    assert len(data["features"]) == 9 and data["features"][data["order"][0]]["rows"] <= 300
    with opened(browser, tmp_path / "out/index.html") as page:
        page.wait_for_selector(".panel-example img.panel-pixels")
        assert page.locator("article").count() == 9


def test_wrong_options_are_named(made: Path, tmp_path: Path) -> None:
    def fails(match: str, features: str = "0:3", **options: Any) -> None:
        paths: dict[str, Any] = {"clt": made / "clt", "store": made / "activations", "out": tmp_path / "out"}
        with pytest.raises(UserError, match=match):
            write_dashboard(features=features, **(paths | options))
        assert not (tmp_path / "out").exists()

    fails("write top:200 for the 200 strongest", "top:0")
    fails("write top:200 for the 200 strongest", "top:many")
    fails("'x' is no feature", "x")
    fails("features 0 to 30", "0:31")
    fails("--examples 0: must be at least 1", examples=0)
    fails("--max-rows 0: must be at least 1", max_rows=0)
    fails("no activation store", store=tmp_path)
    fails("--labels .*: No such file", labels=tmp_path / "none.json")
    for content, said in (
        ("{", "not JSON"),
        ("[1]", "not of the form"),
        ('{"0:3": {"name": "x"}}', "not of the form"),
    ):
        (tmp_path / "labels.json").write_text(content)
        fails(said, labels=tmp_path / "labels.json")
