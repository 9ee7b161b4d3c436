"""The page of a graph: in headless Chromium from file:// with the network off, and what puts it together."""

import http.client
import json
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cltjax.errors import UserError
from cltjax.replacement.viewer import page as viewer
from cltjax.replacement.viewer.page import GRAPH, PAGE, graph_page, inert_json, make_server, write_page
from pages import HOSTILE, chromium, graph_data, large_graph, node, opened, picture, png, small_graph, words

A, B, C, ERROR, YES, NO = "0_17_6", "0_4_8", "1_9_9", "err_0_8", "2_3_9", "2_4_9"  # of small_graph


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(small_graph(), tmp_path_factory.mktemp("small"))


def written(data: dict[str, Any], folder: Path) -> Path:
    write_page(data, folder)
    return folder / PAGE


def settled(page: Any) -> None:
    """Wait until what the last event asked for is drawn."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def place(page: Any, node_id: str) -> tuple[float, float]:
    """Where a node is in the window."""
    js = """(id) => {
        const item = itemOf(id), box = at("over").getBoundingClientRect();
        return [box.left + view.x[item], box.top + view.y[item]];
    }"""
    return tuple(page.evaluate(js, node_id))


def hover(page: Any, node_id: str) -> None:
    page.mouse.move(*place(page, node_id))
    settled(page)


def click(page: Any, node_id: str, shift: bool = False) -> None:
    if shift:
        page.keyboard.down("Shift")
    page.mouse.click(*place(page, node_id))
    if shift:
        page.keyboard.up("Shift")
    settled(page)


def lit(page: Any) -> dict[int, tuple[str, str]]:
    """Position of each lit patch: strength and sign."""
    found = page.eval_on_selector_all(
        "#patches rect[data-lit]", "(rects) => rects.map((rect) => ({ ...rect.dataset }))"
    )
    return {int(one["position"]): (one["lit"], one["sign"]) for one in found}


def rows(page: Any, where: str) -> list[list[str]]:
    """Id, value and sign of the rows of a list, in order."""
    js = """(rows) => rows.map((row) => [row.dataset.id, row.children[1].textContent, row.children[2].dataset.sign])"""
    return page.eval_on_selector_all(f"{where} button[data-id]", js)


def of_graph(page: Any, name: str) -> str:
    return page.get_attribute("#graph", f"data-{name}")


def slide(page: Any, name: str, value: float) -> None:
    page.eval_on_selector(
        f"#{name}", "(input, value) => { input.value = value; input.dispatchEvent(new Event('input')); }", value
    )
    settled(page)


def test_what_was_asked_and_the_scores_stand_on_top(browser, small):
    with opened(browser, small) as page:
        assert page.inner_text("#answer") == "yes" and "is red?" in page.inner_text("#prompt")
        assert page.inner_text('[data-score="replacement"] dt') == "Replacement 0.830"
        assert "not at errors" in page.inner_text('[data-score="replacement"] dd')
        assert page.inner_text('[data-score="completeness"] dt') == "Completeness 0.910"
        assert page.inner_text("#count") == "15 of 15 nodes, 9 of 9 links"
        assert page.is_hidden("#empty")


def test_positions_run_to_the_right_and_layers_up(browser, small):
    with opened(browser, small) as page:
        x, y = page.evaluate("['x', 'y'].map((axis) => graph.nodes.map((_, i) => view[axis][i]))")
        nodes = small_graph()["nodes"]
        layers = [
            (-1 if one["layer"] == "E" else int(one["layer"]), height) for one, height in zip(nodes, y, strict=True)
        ]
        assert all(low[1] > high[1] for low in layers for high in layers if low[0] < high[0])  # y grows downwards
        places = [(one["ctx_idx"], at) for one, at in zip(nodes, x, strict=True) if one["feature_type"] != "logit"]
        assert all(one[1] < other[1] for one in places for other in places if one[0] < other[0])
        # Output labels do not lie over each other, and their text fits.
        half = page.evaluate(f"['{YES}', '{NO}'].map((id) => view.halfWidth[itemOf(id)])")
        assert x[-1] - x[-2] >= sum(half) and min(half) > 20


def test_hover_lights_the_patches_that_feed_a_node(browser, small):
    with opened(browser, small) as page:
        hover(page, A)
        assert of_graph(page, "focus") == A
        assert lit(page) == {1: ("1.00", "+"), 5: ("0.33", "-")}
        assert "red disc" in page.inner_text("#live") and "activation 2.5" in page.inner_text("#tip")
        hover(page, C)  # by single links no patch feeds it
        assert lit(page) == {} and "No patch feeds" in page.inner_text("#lit")
        page.check("input[value=through]")
        hover(page, C)
        assert lit(page) == {1: ("1.00", "+"), 5: ("0.33", "-")}
        hover(page, NO)  # C lowers it: signs turn round
        assert lit(page) == {1: ("1.00", "-"), 5: ("0.33", "+")}
        # By hand: of C's input 2 / 3.25 comes from A, of A's 3 / 4 from patch 1, of no's 1 / 3 from C.
        assert f"({100 * 2 / 3.25 * 0.75 / 3:.0f}\u00a0%)" in page.inner_text("#lit")
        page.mouse.move(1, 1)
        settled(page)
        assert lit(page) == {} and of_graph(page, "focus") == ""


def test_hover_on_a_patch_shows_what_it_drives(browser, small):
    with opened(browser, small) as page:
        page.hover('#patches rect[data-position="1"]')
        settled(page)
        assert of_graph(page, "driven") == A and of_graph(page, "focus") == "E_32_1"
        page.check("input[value=through]")
        page.hover('#patches rect[data-position="5"]')
        settled(page)
        assert of_graph(page, "driven").split() == [A, C, YES, NO]  # 1/4, .15, .15, .05 of their inputs
        page.hover('#patches rect[data-position="3"]')
        settled(page)
        assert of_graph(page, "driven") == "" and "drives nothing" in page.inner_text("#lit")
        page.click('#patches rect[data-position="5"]')
        page.mouse.move(1, 1)
        settled(page)
        assert of_graph(page, "pinned") == "E_32_5"
        assert (
            page.eval_on_selector_all("[data-pinned]", "(all) => all.map((one) => one.dataset.position)").count("5")
            == 1
        )


def test_a_grouped_patch_node_stands_for_all_its_rectangles(browser, tmp_path):
    data = small_graph()
    grouped = next(one for one in data["nodes"] if one["node_id"] == "E_32_5")
    grouped |= {"members": 2, "member_idx": [5, 6]}
    data["nodes"] = [one for one in data["nodes"] if one["node_id"] != "E_32_6"]
    with opened(browser, written(data, tmp_path)) as page:
        hover(page, A)
        assert lit(page) == {1: ("1.00", "+"), 5: ("0.33", "-"), 6: ("0.33", "-")}
        page.hover('#patches rect[data-position="6"]')
        settled(page)
        assert of_graph(page, "focus") == "E_32_5" and "2 patches" in page.inner_text("#lit")


def test_click_pins_and_lists_inputs_and_outputs(browser, small):
    with opened(browser, small) as page:
        click(page, C)
        assert rows(page, "#inputs") == [[A, "+2", "+"], ["E_5_8", "+1", "+"], [ERROR, "+0.25", "+"]]
        assert rows(page, "#outputs") == [[YES, "+3", "+"], [NO, "−0.5", "-"]]
        shares = [2 / 3.25, 1 / 3.25, 0.25 / 3.25]  # A is all image
        text = page.inner_text("#detail .facts")
        assert all(
            f"{name} {round(100 * share) if share > 0.1 else f'{100 * share:.1f}'}\u00a0%" in text
            for name, share in zip(("image", "words", "errors"), shares, strict=True)
        )
        assert page.locator("#panel").count() == 0
        page.click(f'#inputs [data-id="{A}"]')
        settled(page)
        assert of_graph(page, "pinned") == A and "red disc" in page.inner_text("#detail h2")
        assert "red disc" in page.inner_text("#panel")  # its FeaturePanel
        page.focus("#detail #outputs button")
        page.keyboard.press("Enter")
        assert of_graph(page, "pinned") == C


def test_a_near_feature_that_is_in_the_graph_can_be_chosen(browser, tmp_path):
    data = small_graph()
    next(one for one in data["nodes"] if one["node_id"] == C)["panel"] = "1:9"
    data["features"]["0:17"]["nearest"] = [["0:44", 0.75], ["1:9", 0.5]]
    with opened(browser, written(data, tmp_path)) as page:
        click(page, A)
        assert page.locator("#panel button:has-text('0:44')").count() == 0
        page.click("#panel button:has-text('1:9')")
        assert of_graph(page, "pinned") == C and page.locator("#panel").count() == 0  # that one has no panel here


def test_thresholds_hide_nodes_and_links(browser, small):
    with opened(browser, small) as page:
        slide(page, "nodes", 0.5)  # cumulative influence: B has .75, the error .6; embeddings have more and stay
        assert page.inner_text("#nodes-value") == "0.50"
        assert of_graph(page, "shown") == "13" and of_graph(page, "links") == "6"
        assert page.evaluate("[...view.visible.keys()].filter((i) => !view.visible[i]).map(idOf)") == [B, ERROR]
        click(page, C)
        assert [row[0] for row in rows(page, "#inputs")] == [A, "E_5_8"]
        slide(page, "nodes", 1)
        slide(page, "links", 0.5)  # of 9.05: 3, then 2 passes the half
        assert of_graph(page, "links") == "2" and of_graph(page, "shown") == "15"
        assert [row[0] for row in rows(page, "#inputs")] == [A]
        slide(page, "links", 0.7)  # then 1 and -1: by size, not by sign
        click(page, NO)
        assert [row[0] for row in rows(page, "#inputs")] == [B]
        click(page, C)
        slide(page, "links", 1)
        page.uncheck("input[name=word]")
        assert of_graph(page, "shown") == "12" and [row[0] for row in rows(page, "#inputs")] == [A, ERROR]


def test_search_finds_tokens_labels_and_ids(browser, small):
    with opened(browser, small) as page:
        for query, found in (("disc", [A]), ("0_4", [B]), ("YES", [YES, C])):
            page.keyboard.press("/")
            page.fill("#search", query)
            assert [row[0] for row in rows(page, "#list")] == found
        page.fill("#search", "red")  # a label, and all that is at the word
        assert {row[0] for row in rows(page, "#list")} == {A, B, ERROR, "E_5_8"}
        page.keyboard.press("Enter")
        assert of_graph(page, "pinned") == A
        page.keyboard.press("Escape")
        assert of_graph(page, "pinned") == ""


def test_keyboard(browser, small):
    with opened(browser, small) as page:
        page.focus("#graph")
        keys = "Down Right Right Down Down Right Left Left Down Left Up Up"
        # The first goes to an output; at the end of a layer nothing moves; the error stands above B in their cell.
        there = [YES, NO, NO, C, ERROR, B, ERROR, A, "E_32_6", "E_32_5", A, C]
        for key, expected in zip(keys.split(), there, strict=True):
            page.keyboard.press(f"Arrow{key}")
            settled(page)
            assert of_graph(page, "focus") == expected, key
        assert "answer is yes" in page.inner_text("#live")
        page.keyboard.press("Enter")
        assert of_graph(page, "pinned") == C
        page.keyboard.press("Escape")
        settled(page)
        assert of_graph(page, "pinned") == of_graph(page, "focus") == ""
        page.focus("#patches")
        for key, there in (("ArrowDown", 1), ("ArrowDown", 4), ("ArrowRight", 5), ("ArrowUp", 2), ("ArrowUp", 2)):
            page.keyboard.press(key)
            settled(page)
            assert of_graph(page, "focus") == f"E_32_{there}", key
        page.keyboard.press("?")
        assert page.is_visible("#help")
        page.keyboard.press("Escape")
        assert page.is_hidden("#help")


def test_everything_can_be_reached_by_tab(browser, small):
    with opened(browser, small) as page:
        seen = set()
        for _ in range(40):
            page.keyboard.press("Tab")
            seen.add(
                page.evaluate(
                    "document.activeElement.id || document.activeElement.dataset.id || document.activeElement.name"
                )
            )
        assert {"nodes", "links", "feature", "paths", "search", "copy", "ask", "patches", "graph", A} <= seen


def test_text_of_data_is_shown_as_text(browser, tmp_path):
    data = small_graph()
    for one in data["nodes"]:
        one["clerp"] = HOSTILE
    for position in data["positions"]:
        position["token"] = HOSTILE
    data["metadata"] |= {"slug": HOSTILE, "prompt": HOSTILE, "prompt_tokens": [HOSTILE] * 10}
    data["metadata"]["cltjax"] |= {"answer": HOSTILE, "model": HOSTILE, "scores": {HOSTILE: 0.5}}
    data["qParams"]["supernodes"] = [[HOSTILE, B, ERROR]]
    data["features"]["0:17"]["label"] = HOSTILE
    with opened(browser, written(data, tmp_path)) as page:
        for node_id in (A, C, YES, f"supernode:{HOSTILE}", "E_5_8"):
            hover(page, node_id)
            click(page, node_id)
        assert page.title() == HOSTILE and page.inner_text("#answer") == page.inner_text("h1") == HOSTILE
        assert page.text_content("#detail h2") == HOSTILE
        page.click("#copy")
        assert json.loads(page.input_value("#json"))["supernodes"] == [[HOSTILE, B, ERROR]]
        assert page.evaluate("window.ran") is None
        assert page.locator("script").count() == 5 and page.locator("img[src=x]").count() == 0


def test_no_script_but_the_pages_own_runs(browser, small):
    context = browser.new_context(offline=True)
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.goto(small.as_uri())
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), { textContent: 'window.ran = 1' }))"
    )
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('img'), { src: 'http://127.0.0.1:9/x.png' }))"
    )
    page.wait_for_timeout(50)
    assert page.evaluate("window.ran") is None
    assert any("script-src" in line for line in said) and any("img-src" in line for line in said)
    context.close()


@pytest.mark.parametrize("width, height", [(380, 760), (800, 700), (1360, 850)])
def test_no_window_scrolls_sideways(browser, tmp_path, width, height):
    data = small_graph()
    data["metadata"]["slug"] = data["metadata"]["prompt"] = data["nodes"][9]["clerp"] = "a" * 300
    with opened(browser, written(data, tmp_path), width, height) as page:
        page.click(f'#list [data-id="{A}"]')
        settled(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.is_visible("#graph") and page.is_visible("#image")
        boxes = [page.locator(name).bounding_box() for name in ("#picture", "#field", "#side")]
        stacked = all(one["y"] + one["height"] <= other["y"] + 1 for one, other in pairwise(boxes))
        assert stacked == (width == 380)


def test_five_thousand_nodes_without_stutter(browser, tmp_path, capsys):
    """A hover of the largest nodes: the script's time to find, sum and draw, and the time until the next frame."""
    data = large_graph(5003, 50021)
    assert len(data["nodes"]) == 5003 and len(data["links"]) == 50021
    with opened(browser, written(data, tmp_path)) as page:
        assert of_graph(page, "shown") == "5003" and of_graph(page, "links") == "50021"
        page.check("input[value=through]")  # the dearer way
        measure = """async () => {
            const frame = () => new Promise((done) => requestAnimationFrame(done)), drawn = [], frames = [];
            for (const item of view.items.slice(0, 41)) {
                await frame();
                const start = performance.now(), box = at("over").getBoundingClientRect();
                const place = { clientX: box.left + view.x[item], clientY: box.top + view.y[item] };
                at("graph").dispatchEvent(new PointerEvent("pointermove", place));
                await frame(); await frame();
                frames.push(performance.now() - start);
                drawn.push(Number(at("graph").dataset.redraw));
            }
            return [drawn, frames];
        }"""
        drawn, frames = (float(np.median(values)) for values in page.evaluate(measure))
        slide(page, "nodes", 0.7)
    with capsys.disabled():
        print(f"\n  hover over 5,003 nodes and 50,021 links: script {drawn:.1f} ms, two frames {frames:.0f} ms")
    assert drawn < 50


def test_supernodes(browser, small):
    with opened(browser, small) as page:
        click(page, A)
        click(page, B, shift=True)
        assert of_graph(page, "pinned") == f"{A} {B}"
        page.fill("#groups input", "colours")
        page.click("#groups form button")
        settled(page)
        assert of_graph(page, "pinned") == "supernode:colours"
        assert page.inner_text("#count").endswith("1 supernode")
        # Sums of its members' links: from patches, the word; to C and to no.
        assert rows(page, "#inputs") == [["E_32_1", "+0.6", "+"], ["E_5_8", "+0.5", "+"], ["E_32_5", "−0.2", "-"]]
        assert rows(page, "#outputs") == [[C, "+2", "+"], [NO, "−1", "-"]]
        click(page, C)
        assert [row[:2] for row in rows(page, "#inputs")] == [
            ["supernode:colours", "+2"],
            ["E_5_8", "+1"],
            [ERROR, "+0.25"],
        ]
        page.click("#copy")
        asked = json.loads(page.input_value("#json"))
        assert asked["supernodes"] == [["colours", A, B]] and asked["clickedId"] == C
        assert asked["pinnedIds"] == [C, A, B] and asked["linkType"] == "both"
        page.keyboard.press("Escape")
        page.click("#groups button:text('Open')")
        assert [row[0] for row in rows(page, "#inputs")] == [A, "E_5_8", ERROR]
        click(page, A)
        click(page, C, shift=True)
        page.fill("#groups input", "colours")
        page.click("#groups form button")
        settled(page)
        assert page.evaluate("writtenGroups()") == [["colours", B], ["colours 2", A, C]]  # a node is in one only
        for _ in range(2):
            page.click("#groups button:text('Ungroup') >> nth=0")
        page.keyboard.press("Escape")
        assert page.is_hidden("#groups")


def test_supernodes_of_the_file_are_shown(browser, tmp_path):
    data = small_graph()
    # One node twice, one that is not there, an output: what cannot be is left out.
    data["qParams"]["supernodes"] = [["one", A, ERROR, "gone"], ["one", A, B, YES], ["none", "gone"]]
    data["qParams"]["pinnedIds"] = [C, A]
    with opened(browser, written(data, tmp_path)) as page:
        assert page.evaluate("writtenGroups()") == [["one", A, ERROR], ["one 2", B]]
        assert of_graph(page, "pinned") == C
        assert [row[:2] for row in rows(page, "#inputs")] == [["supernode:one", "+2.25"], ["E_5_8", "+1"]]


def test_a_link_keeps_the_state(browser, small):
    with opened(browser, small) as page:
        click(page, A)
        click(page, B, shift=True)
        page.fill("#groups input", "a & b = #1 %")
        page.click("#groups form button")
        click(page, C)
        slide(page, "nodes", 0.7)
        slide(page, "links", 0.95)
        page.uncheck("input[name=patch]")
        page.check("input[value=through]")
        page.fill("#search", "re")
        page.wait_for_timeout(250)
        kept, shown = page.evaluate("location.hash"), page.inner_text("#count")
    with opened(browser, small, after=kept) as page:
        assert page.inner_text("#count") == shown and of_graph(page, "pinned") == C
        assert page.evaluate("writtenGroups()") == [["a & b = #1 %", A, B]]
        assert page.inner_text("#nodes-value") == "0.70" and page.inner_text("#links-value") == "0.95"
        assert page.is_checked("input[value=through]") and not page.is_checked("input[name=patch]")
        assert page.input_value("#search") == "re"
        page.wait_for_timeout(250)
        assert page.evaluate("location.hash") == kept
    with opened(browser, small, after="#nodes=x&links=-3&pin=gone&supernodes=[[&hide=logit&open=none") as page:
        assert page.inner_text("#count") == "15 of 15 nodes, 9 of 9 links"  # a link that was cut or made up


def test_pixels_are_laid_over_the_image(browser, tmp_path):
    with opened(
        browser, written(small_graph(pixels={C: png(picture(24)), B: "http://127.0.0.1:9/x.png"}), tmp_path)
    ) as page:
        assert page.is_hidden("#heat")
        hover(page, C)
        assert page.is_visible("#heat") and page.get_attribute("#heat", "src").startswith("data:image/png;base64,")
        hover(page, B)  # nothing is fetched
        assert page.is_hidden("#heat")


def test_graphs_without_image_and_without_nodes(browser, tmp_path):
    text = graph_data([node("E_1_0", "embedding", "E", 0, 1.0, 1.0)], [], words("hi"), 3, image=None)
    with opened(browser, written(text, tmp_path / "text")) as page:
        assert page.is_hidden("#picture") and page.is_visible("#graph")
    empty = graph_data([], [], words("hi"), 3, image=None)
    with opened(browser, written(empty, tmp_path / "empty")) as page:
        assert "no nodes" in page.inner_text("#empty") and page.is_hidden("#graph")


def test_a_graph_of_circuit_tracer_is_shown(browser, tmp_path):
    """Its file has no positions, panels or scores."""
    data = small_graph()
    for key in ("positions", "image", "features", "images"):
        del data[key]
    del data["metadata"]["cltjax"]
    for one in data["nodes"]:
        del one["share"]
        one.pop("panel", None)
    data["nodes"][9]["clerp"] = ""
    with opened(browser, written(data, tmp_path)) as page:
        assert of_graph(page, "shown") == "15" and page.is_hidden("#picture")
        click(page, A)
        assert page.inner_text("#detail h2") == "feature 0:17"


def test_an_output_that_is_no_token_has_no_probability(browser, tmp_path):
    data = small_graph()
    data["nodes"][-2]["clerp"] = "Output yes - no"
    with opened(browser, written(data, tmp_path)) as page:
        assert page.evaluate(f"['{YES}', '{NO}'].map((id) => view.text[itemOf(id)])") == ["yes - no", "no .20"]
        click(page, YES)
        assert page.inner_text("#detail h2") == "yes - no" and page.inner_text("#detail > p") == "output"


# ---- page.py


def test_json_stays_inside_its_element():
    text = inert_json({HOSTILE: [HOSTILE, 1.5, None, "é\ud800"]})
    assert text.isascii() and not set("<>&") & set(text)
    assert json.loads(text) == {HOSTILE: [HOSTILE, 1.5, None, "é\ud800"]}
    with pytest.raises(ValueError, match="Out of range"):
        inert_json([float("nan")])


def test_a_page_needs_nothing_from_elsewhere():
    page = graph_page(small_graph())
    assert page.count("<script") == 5 and '<link rel="icon" href="data:,">' in page
    assert "src=" not in page.split("<body>")[0] and "https:" not in page
    assert "default-src 'none'" in page and page.count("'sha256-") == 4 and "unsafe-eval" not in page
    assert page.index("Content-Security-Policy") < page.index("<style") < page.index("<script")


def test_a_page_is_whole_or_not_there(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="Out of range"):
        write_page(small_graph(extra=float("inf")), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()

    folder = tmp_path / "good"
    write_page(small_graph(), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) == {GRAPH, PAGE} and json.loads(before[GRAPH]) == small_graph()
    whole = Path.write_text

    def fails(path: Path, text: str, **options: Any) -> int:
        whole(path, text[:100], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fails)
    with pytest.raises(OSError, match="No space"):
        write_page(large_graph(200, 300), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Any]:
    """Answers of a server for a folder with two graphs, beside a secret."""
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "graphs"
    odd = small_graph()
    odd["metadata"] |= {"slug": HOSTILE, "prompt": HOSTILE}
    write_page(small_graph(), folder / "first")
    write_page(odd, folder / "a & b?")
    (folder / "first" / "notes.txt").write_text("secret")
    (folder / "empty").mkdir()
    server = make_server(folder, 0)
    assert server.server_address[0] == "127.0.0.1"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def get(path: str, method: str = "GET", host: str | None = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        connection.request(method, path, headers={} if host is None else {"Host": host})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    get.folder, get.port = folder, server.server_port  # type: ignore[attr-defined]
    yield get
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_folder_of_graphs_is_listed_and_served(served):
    status, text = served("/")
    assert (
        status == 200
        and "&lt;image&gt;×6 is red?" in text
        and "replacement 0.830, completeness 0.910" in text
        and "<td>yes</td>" in text
    )
    assert '<a href="/first/">made-up</a>' in text and "/a%20%26%20b%3F/" in text and "/empty/" not in text
    assert "<img" not in text and "</script" not in text and "&lt;img" in text
    assert served("/first/") == (200, (served.folder / "first" / PAGE).read_text())
    assert served("/a%20%26%20b%3F/graph.json")[0] == 200 and served("/first")[0] == 301
    assert served("/first/", "HEAD") == (200, "")
    (served.folder / "first" / GRAPH).write_text("{")
    assert "graph.json is damaged" in served("/")[1]


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt", "/first/../../secret.txt", "/%2e%2e/secret.txt", "/first/%2e%2e/%2e%2e/secret.txt",
        "//etc/passwd", "/first/notes.txt", "/first//graph.json", "/..%2fsecret.txt", "/empty/", "/first/graph.json/",
        "/graphs/index.html",
    ],
)  # fmt: skip
def test_nothing_else_is_served(served, path):
    status, text = served(path)
    assert status == 404 and "secret" not in text.replace("secret.txt", "")


def test_nothing_is_written_and_no_other_site_reads(served):
    for method in ("POST", "PUT", "DELETE"):
        assert served("/first/graph.json", method)[0] == 501
    assert served("/", host="evil.example")[0] == served("/first/", host="evil.example:80")[0] == 403
    assert served("/", host=f"localhost:{served.port}")[0] == 200


def test_what_cannot_be_served_is_one_line(served, tmp_path):
    with pytest.raises(UserError, match=r"port \d+ cannot be used .*--port"):
        make_server(served.folder, served.port)
    with pytest.raises(UserError, match="port 99999 cannot be used"):
        make_server(served.folder, 99999)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no graphs: write one with cltjax graph"):
        make_server(tmp_path / "none", 0)
    with pytest.raises(UserError, match="not a folder"):
        make_server(tmp_path / "nowhere", 0)


def test_one_graph_is_served_by_its_own_folder(tmp_path):
    write_page(small_graph(), tmp_path / "one")
    assert list(viewer.graph_folders(tmp_path / "one")) == ["one"]
