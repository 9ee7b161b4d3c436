import json
from pathlib import Path

import pytest
from PIL import Image

from capture.prompts import load_dataset, resolve_template
from cltjax.errors import UserError
from cltjax.splits import split_of
from examples.shapes.benchmark_files import write as write_benchmarks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images and a fourth that is cut short."""
    (tmp_path / "image").mkdir()
    for i in range(3):
        Image.new("RGB", (7, 5), (40 * i, 11, 13)).save(tmp_path / "image" / f"{i}.png")
    whole = (tmp_path / "image" / "0.png").read_bytes()
    (tmp_path / "image" / "cut.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path


def write(folder: Path, rows: list, name: str = "query.json", *, lines: bool = False) -> Path:
    path = folder / name
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return path


GOOD = [
    {"id": 1, "image": "0.png", "query": "Is there a\ncat?"},
    {"question_id": 7, "image": "1.png", "text": "What now?", "label": "no"},
    {"image": "2.png", "prompt": "Describe."},
]


@pytest.mark.parametrize("lines", [False, True])
def test_rows_of_every_kind_are_read(folder: Path, lines: bool):
    data = load_dataset(str(write(folder, GOOD, lines=lines)))
    assert [(s.id, s.prompt, s.answer) for s in data.samples] == [
        ("1", "Is there a\ncat?", None),
        ("7", "What now?", "no"),
        ("3", "Describe.", None),
    ]
    for i, sample in enumerate(data.samples):
        content = (folder / "image" / f"{i}.png").read_bytes()
        assert sample.split == split_of(content)
        assert sample.load is not None
        assert sample.load().getpixel((0, 0)) == (40 * i, 11, 13)
    assert data.skipped == []


def test_a_line_separator_inside_a_string_is_text(folder: Path):
    path = folder / "query.jsonl"
    rows = [{"image": "0.png", "query": "one\u2028two"}, {"image": "1.png", "query": "three"}]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert [s.prompt for s in load_dataset(str(path)).samples] == ["one\u2028two", "three"]


def test_the_fingerprint_covers_prompts_images_and_order(folder: Path):
    def fingerprint(rows: list) -> str:
        return load_dataset(str(write(folder, rows))).fingerprint

    base = fingerprint(GOOD)
    assert base == fingerprint(GOOD)
    assert base != fingerprint(GOOD[::-1])
    assert base != fingerprint([{**GOOD[0], "query": "Is there a dog?"}, *GOOD[1:]])
    Image.new("RGB", (7, 5), (1, 2, 3)).save(folder / "image" / "0.png")
    assert base != fingerprint(GOOD)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "gone.png", "query": "Why?"}, "gone.png cannot be read"),
        ({"image": "cut.png", "query": "Why?"}, "cut.png is broken"),
        ({"image": "0.png", "query": "  "}, "has no prompt"),
        ({"image": "0.png", "caption": "Why?"}, "has no prompt"),
        ({"image": "", "query": "Why?"}, "has no image"),
        ({"query": "Why?"}, "has no image"),
        (["0.png", "Why?"], "not a JSON object"),
    ],
)
def test_a_bad_row_stops_the_run_or_is_listed(folder: Path, row: object, reason: str):
    path = write(folder, [*GOOD, row, GOOD[0]])
    with pytest.raises(UserError, match=f"row 4 of .*query.json.*{reason}"):
        load_dataset(str(path), folder / "image")
    data = load_dataset(str(path), folder / "image", skip_bad=True)
    assert len(data.samples) == 4
    (skipped,) = data.skipped
    assert skipped["row"] == 4
    assert skipped["file"] == str(path)
    assert reason in skipped["reason"]


def test_prompts_without_images(folder: Path):
    data = load_dataset(str(write(folder, [{"prompt": "One"}, {"prompt": "Two"}])))
    assert [s.load for s in data.samples] == [None, None]
    assert data.samples[0].split == split_of(b"One")
    mixed = load_dataset(str(write(folder, [GOOD[0], {"image": None, "prompt": "Two"}])))
    assert [s.image is None for s in mixed.samples] == [False, True]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('[{"query": "a"},', "line 1: not JSON"),
        ('{"query": "a"}\n{"query": \n', "line 2: not JSON"),
        ("[]", "has no rows"),
        ("", "has no rows"),
    ],
)
def test_a_file_that_is_no_data_set(tmp_path: Path, content: str, reason: str):
    path = tmp_path / "query.json"
    path.write_text(content)
    with pytest.raises(UserError, match=reason):
        load_dataset(str(path))


def test_a_missing_file_or_folder(folder: Path):
    with pytest.raises(UserError, match="no such file"):
        load_dataset("nowhere.json")
    with pytest.raises(UserError, match="--image-dir nowhere: no such folder"):
        load_dataset(str(write(folder, GOOD)), Path("nowhere"))


def test_ambers_folders_are_found_from_the_query_file(folder: Path):
    query = folder / "data" / "query"
    query.mkdir(parents=True)
    assert len(load_dataset(str(write(query, GOOD))).samples) == 3


def test_shapes_are_all_splits_and_a_longer_stream_begins_with_a_shorter_one():
    data = load_dataset("shapes", max_samples=211)
    assert {s.split for s in data.samples} == {"train", "val", "test"}
    assert all(s.generated_image for s in data.samples)
    longer = load_dataset("shapes", max_samples=223)
    assert [s.prompt for s in longer.samples[:211]] == [s.prompt for s in data.samples]
    assert longer.fingerprint != data.fingerprint


class Processor:
    image_token = "<img>"
    chat_template = "yes"

    def apply_chat_template(self, messages: list, add_generation_prompt: bool) -> str:
        parts = [p["text"] if p["type"] == "text" else "<img>" for p in messages[0]["content"]]
        return "[" + "".join(parts) + "]" + "A:" * add_generation_prompt


def test_templates():
    chat = resolve_template("chat", Processor())
    assert chat.render("a {b}", image=True) == "[<img>a {b}]A:"
    assert chat.render("hi", image=False) == "[hi]A:"
    llava = resolve_template("llava-1.5", Processor())
    assert llava.render("hi", image=True) == "USER: <img>\nhi ASSISTANT:"
    assert llava.render("hi", image=False) == "USER: hi ASSISTANT:"
    own = resolve_template(r"{image}\n\n{prompt}", Processor())
    assert own.render(r"a\nb", image=True) == "<img>\n\na\\nb"  # only the template's own escapes are newlines


def test_templates_that_cannot_be():
    class Plain(Processor):
        chat_template = None

    with pytest.raises(UserError, match="no chat template"):
        resolve_template("chat", Plain())
    with pytest.raises(UserError, match="has no {prompt}"):
        resolve_template("{image} Describe.", Processor())
    with pytest.raises(UserError, match="has no {image} and no {prompt}"):
        resolve_template("lava", Processor())


def test_ambers_and_popes_own_layouts(tmp_path: Path):
    write_benchmarks(tmp_path, images=7)
    queries = sorted(tmp_path.glob("**/query_*.json"))
    pope = sorted(tmp_path.glob("**/*.json*"))
    pope = [path for path in pope if "question_id" in path.read_text()[:99]]
    assert len(queries) == 6
    assert len(pope) == 3
    for path in queries + pope:
        data = load_dataset(str(path))
        assert data.skipped == []
        assert data.samples
        assert all(sample.load is not None and sample.load().size == (48, 48) for sample in data.samples)
    assert {sample.answer for sample in load_dataset(str(pope[0])).samples} == {"yes", "no"}
