"""The demo data and its questions: examples/shapes."""

import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaForConditionalGeneration

from examples.shapes import asking, benchmark_files, train_vlm
from examples.shapes.dataset import samples
from examples.shapes.questions import (
    CORNERS,
    FOOD,
    KINDS,
    MATERIAL,
    MATERIALS,
    ONE_WORD_KINDS,
    UNASKED,
    USE_OF,
    USES,
    Question,
    ask,
    is_unasked,
    material_of,
)
from examples.shapes.scenes import COLORS, SHAPES, Scene, Thing, random_scene, render
from examples.shapes.vlm import IMAGE_TOKENS, TEMPLATE, build_config, build_processor

ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
SEEDS = st.integers(0, 2**32 - 1)


# Scenes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "bucket", "split"),
    [
        ("1:red circle", 0, "test"),
        ("8:red square", 1, "test"),
        ("0:red circle", 2, "val"),
        ("3:red square", 3, "train"),
        ("4:blue square;8:green cross", 14, "train"),
        ("6:red square", 15, "train"),
    ],
)
def test_split_rule_is_fixed_for_ever(layout: str, bucket: int, split: str) -> None:
    assert int(hashlib.sha256(layout.encode()).hexdigest(), 16) % 16 == bucket
    things = [re.fullmatch(r"(\d):(\w+) (\w+)", part) for part in layout.split(";")]
    scene = Scene(tuple(Thing(int(m[1]), m[2], m[3]) for m in things if m))
    assert scene.layout == layout
    assert scene.split == split


@given(SEEDS)
@settings(max_examples=200, deadline=None)
def test_scenes_are_well_formed(seed: int) -> None:
    scene = random_scene(random.Random(seed))
    assert 1 <= len(scene.things) <= 4
    assert len({t.cell for t in scene.things}) == len(scene.things)
    assert len({(t.color, t.shape) for t in scene.things}) == len(scene.things)
    assert list(scene.things) == sorted(scene.things, key=lambda t: t.cell)


def test_rendering_depends_on_scene_and_rng_only() -> None:
    scene = random_scene(random.Random(5))
    twice = [render(scene, random.Random(7)).tobytes() for _ in range(2)]
    random.seed(11)
    assert twice[0] == twice[1] == render(scene, random.Random(7)).tobytes()
    assert render(scene, random.Random(8)).tobytes() != twice[0]  # jittered


def test_a_thing_stays_in_its_cell() -> None:
    rng = random.Random(3)
    for cell, color, shape in product(range(9), COLORS, SHAPES):
        image = render(Scene((Thing(cell, color, shape),)), rng)
        drawn = np.argwhere((np.asarray(image) != 40).any(-1))
        (top, left), (bottom, right) = drawn.min(0), drawn.max(0)
        x, y = 16 * (cell % 3), 16 * (cell // 3)
        assert x <= left < right < x + 16, (cell, color, shape)
        assert y <= top < bottom < y + 16, (cell, color, shape)


# Questions ---------------------------------------------------------------------------------------------------


def answer_by_reading(scene: Scene, text: str) -> str:
    """The answer, from the words of the question alone; written without looking at questions.py."""
    things = [(t.cell // 3, t.cell % 3, t.color, t.shape) for t in scene.things]
    uses: dict[str, str] = {**USE_OF}
    corners: dict[str, str] = {**CORNERS}

    def named(words: str) -> tuple[int, int, str, str]:
        """The one thing that `the <words>` fits."""
        tokens = [w for w in words.split() if w not in ("the", "thing")]
        found = [t for t in things if set(tokens) <= {ROWS[t[0]], COLUMNS[t[1]], t[2], t[3]}]
        assert len(found) == 1, f"`{words}` fits {len(found)} things of {scene.layout}"
        return found[0]

    def grouped(word: str) -> int:
        for name in (*COLORS, *SHAPES):
            if name in word:
                return sum(name in (t[2], t[3]) for t in things)
        assert word == "things"
        return len(things)

    def match(pattern: str) -> re.Match[str] | None:
        return re.fullmatch(pattern, text)

    if m := match(r"What color is just (left of|right of|above|below) (the .*)\?"):
        row, column, *_ = named(m[2])
        dy, dx = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}[m[1]]
        return next(t[2] for t in things if t[:2] == (row + dy, column + dx))
    if m := match(r"What color is (the .*)\?"):
        return named(m[1])[2]
    if m := match(r"What shape is (the .*)\?"):
        return named(m[1])[3]
    if m := match(r"Is there a (\w+) (\w+)\?"):
        return "yes" if any(t[2:] == (m[1], m[2]) for t in things) else "no"
    if m := match(r"How many (.*) are there\?"):
        return str(grouped(m[1]))
    if m := match(r"Is the number of (.*) even or odd\?"):
        return ("even", "odd")[grouped(m[1]) % 2]
    if m := match(r"Which row is (.*) in\?"):
        return ROWS[named(m[1])[0]]
    if m := match(r"Which column is (.*) in\?"):
        return COLUMNS[named(m[1])[1]]
    if m := match(r"Where is (the .*) from (the .*)\?"):
        (y, x, *_), (v, u, *_) = named(m[1]), named(m[2])
        assert (y == v) != (x == u), "neither a row nor a column is shared"
        return ("left" if x < u else "right") if y == v else ("above" if y < v else "below")
    if m := match(r"Do two things have the same (color|shape)\?"):
        at = {"color": 2, "shape": 3}[m[1]]
        return "yes" if any(a[at] == b[at] for a, b in combinations(things, 2)) else "no"
    if m := match(r"What food has the color of (the .*)\?"):
        return FOOD[named(m[1])[2]]
    if m := match(r"How many corners does (the .*) have\?"):
        return corners[named(m[1])[3]]
    if m := match(r"What is (the .*) made of\?"):
        _, _, color, shape = named(m[1])
        return MATERIAL[color, shape]
    if m := match(r"What is (the .*) used for\?"):
        _, _, color, shape = named(m[1])
        return uses[MATERIAL[color, shape]]
    if m := match(r"What is (\w+) used for\?"):
        return uses[m[1]]
    assert text == "Describe the image."
    return f"There is {', '.join(f'a {c} {s} at the {ROWS[y]} {COLUMNS[x]}' for y, x, c, s in things)}."


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_right(kind: str) -> None:
    rng = random.Random(f"answers {kind}")
    asked = 0
    while asked < 300:
        scene = random_scene(rng)
        question = ask(scene, kind, rng)
        if question is not None:
            asked += 1
            assert question.kind == kind
            assert question.answer == answer_by_reading(scene, question.text), (scene.layout, question)
            assert question.phrase in question.text


def test_exist_is_balanced_and_has_hard_negatives() -> None:
    rng = random.Random(13)
    seen: Counter[str] = Counter()
    for _ in range(2000):
        scene = random_scene(rng)
        question = ask(scene, "exist", rng)
        assert question is not None
        *_, color, shape = question.text.rstrip("?").split()
        hard = any(t.color == color for t in scene.things) and any(t.shape == shape for t in scene.things)
        seen[question.answer + (" hard" if question.answer == "no" and hard else "")] += 1
    assert abs(seen["yes"] / 2000 - 0.5) < 0.05
    # Most scenes have a color and a shape that do not come together.
    assert seen["no hard"] > 0.4 * (seen["no"] + seen["no hard"])


@pytest.mark.parametrize("kind", ["color", "shape", "food", "corners"])
def test_the_question_does_not_give_the_answer_away(kind: str) -> None:
    rng = random.Random(17)
    for _ in range(200):
        question = ask(random_scene(rng), kind, rng)
        assert question is not None
        assert question.subject is not None
        given_away = question.subject.color if kind in ("color", "food") else question.subject.shape
        assert given_away not in question.phrase.split()


def test_no_word_is_unknown_and_answers_survive_decoding() -> None:
    tokenizer = build_processor().tokenizer
    rng = random.Random(19)
    texts = {q.text: q.answer for _ in range(700) for kind in KINDS if (q := ask(random_scene(rng), kind, rng))}
    assert len(texts) > 500
    for text, answer in texts.items():
        assert tokenizer.unk_token_id not in tokenizer(TEMPLATE.format(text)).input_ids, text
        ids = tokenizer(answer, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids, answer
        assert tokenizer.decode(ids) == answer


def test_one_word_answers_are_one_token() -> None:
    tokenizer = build_processor().tokenizer
    rng = random.Random(23)
    for kind in ONE_WORD_KINDS:
        found = [q for _ in range(100) if (q := ask(random_scene(rng), kind, rng))]
        assert found
        assert all(len(tokenizer(q.answer, add_special_tokens=False).input_ids) == 1 for q in found)


def test_training_tokenizes_as_the_processor_does() -> None:
    tokenizer = build_processor().tokenizer
    rng = random.Random(29)
    for question in train_vlm.training_questions(random_scene(rng), rng):
        _, _, after = f"{TEMPLATE.format(question.text)} {question.answer}".partition("<image>")
        assert tokenizer(after, add_special_tokens=False).input_ids == train_vlm.tokens(after)


# The chain ---------------------------------------------------------------------------------------------------


def test_material_needs_both_keys_and_use_joins_materials() -> None:
    assert set(MATERIAL) == set(product(COLORS, SHAPES))
    for shape in SHAPES:
        assert len({MATERIAL[color, shape] for color in COLORS}) == len(MATERIALS)
    for color in COLORS:
        assert len({MATERIAL[color, shape] for shape in SHAPES}) == len(SHAPES)
    assert Counter(USE_OF.values()) == dict.fromkeys(USES, 2)


def test_a_third_is_unasked_and_all_keep_asked_pairs() -> None:
    assert set(MATERIAL) >= UNASKED
    assert 3 * len(UNASKED) == len(MATERIAL)
    asked = set(MATERIAL) - UNASKED
    for values, key in ((COLORS, lambda p: p[0]), (SHAPES, lambda p: p[1]), (MATERIALS, lambda p: MATERIAL[p])):
        kept = Counter(key(pair) for pair in asked)
        assert all(kept[value] >= 2 for value in values), kept
    uses: dict[str, str] = {**USE_OF}
    assert {uses[MATERIAL[pair]] for pair in UNASKED} == set(USES)


def test_training_never_asks_the_end_about_an_unasked_pair() -> None:
    rng = random.Random(31)
    asked: Counter[tuple[str, bool]] = Counter()
    for _ in range(2000):
        scene = random_scene(rng)
        for question in train_vlm.training_questions(scene, rng):
            if question.kind in ("use", "made"):
                thing = question.subject
                assert thing is not None
                asked[question.kind, (thing.color, thing.shape) in UNASKED] += 1
            if question.kind == "use":
                assert answer_by_reading(scene, question.text) == question.answer
    assert asked["use", True] == 0
    assert min(asked["use", False], asked["made", True], asked["made", False]) > 300  # the links are asked about all


def test_is_unasked_is_about_the_end_only() -> None:
    color, shape = min(UNASKED)
    thing = Thing(4, color, shape)
    assert is_unasked(Question("use", f"What is the {shape} used for?", "?", thing, f"the {shape}"))
    assert not is_unasked(Question("made", f"What is the {shape} made of?", "?", thing, f"the {shape}"))
    assert not is_unasked(Question("fact", "What is wood used for?", "building"))


# Training's packing ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    config = build_config()
    for part, depth in ((config.text_config, 3), (config.vision_config, 1)):
        assert part is not None
        part.num_hidden_layers = depth  # pyright: ignore[reportAttributeAccessIssue]
    built = LlavaForConditionalGeneration(config)
    train_vlm.fan_in_init(built.model.language_model, 3)
    return built.eval()


@torch.no_grad()
def test_packed_questions_equal_single_prompts(model: LlavaForConditionalGeneration) -> None:
    """Logits and the material's position, for every question of two packs of unequal length."""
    rng = random.Random(37)
    processor = build_processor()
    scenes = [random_scene(rng) for _ in range(2)]
    images = [render(scene, rng) for scene in scenes]
    asked = [train_vlm.training_questions(scenes[0], rng), train_vlm.training_questions(scenes[1], rng)[:5]]
    rows = [train_vlm.pack(questions) for questions in asked]
    ids, positions, mask, weight = train_vlm.collate(rows)
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    decoder = model.model.language_model
    embeds = decoder.embed_tokens(ids)
    is_image = (ids == train_vlm.IDS["<image>"])[..., None]
    assert is_image.sum() == 2 * IMAGE_TOKENS
    embeds = embeds.masked_scatter(is_image, train_vlm.projected(model, pixels))
    hidden = decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).last_hidden_state
    packed = model.lm_head(hidden)
    compared = 0
    for row, (questions, image) in enumerate(zip(asked, images, strict=True)):
        segment = torch.tensor(rows[row].segment)
        for number, question in enumerate(questions, start=1):
            picture = asking.Picture(scenes[row], image)
            alone = asking.encode(processor, [asking.Item(picture, question)])
            logits = asking.forward(model, alone)[0]
            here = torch.nonzero(segment == number)[:, 0]
            length = len(here)
            assert torch.equal(ids[row, here], alone.ids[0, -length:])
            assert positions[row, here].tolist() == list(range(len(alone.ids[0]) - length, len(alone.ids[0])))
            torch.testing.assert_close(packed[row, here], logits[-length:], atol=1e-4, rtol=0)
            # Loss is on the answer and `</s>` only, predicted from one token before.
            weighed = torch.nonzero(weight[row, here])[:, 0] + len(alone.ids[0]) - length
            assert weighed.tolist() == list(range(int(alone.start) - 1, int(alone.end) - 1))
            offset = int(here[0]) - (len(alone.ids[0]) - length)
            links = [link for link in rows[row].links if link.subject in here]
            if question.kind in ("made", "use"):
                (link,) = links
                assert link.kind == question.kind
                assert (link.subject - offset, link.answer - offset) == (int(alone.subject), int(alone.start) - 1)
                thing = question.subject
                assert thing is not None
                assert MATERIALS[link.material] == material_of(thing)
                assert link.asked == ((thing.color, thing.shape) not in UNASKED)
            else:
                assert not links
            compared += 1
    assert compared == len(asked[0]) + len(asked[1])


def test_exchanges_are_of_asked_pairs_and_change_what_they_say(model: LlavaForConditionalGeneration) -> None:
    rng = random.Random(53)
    scenes = [random_scene(rng) for _ in range(29)]
    rows = [train_vlm.pack(train_vlm.training_questions(scene, rng)) for scene in scenes]
    links = [(row, link) for row, packed in enumerate(rows) for link in packed.links]
    assert any(not link.asked for _, link in links)
    pairs = train_vlm.draw_exchanges(links, 1.0, rng)
    assert len(pairs) > 20
    assert all(receiver.asked and donor.asked for (_, receiver), (_, donor) in pairs)
    assert all(receiver.material != donor.material for (_, receiver), (_, donor) in pairs)
    uses: dict[str, str] = {**USE_OF}
    for (_, receiver), (_, donor) in pairs:
        material = MATERIALS[donor.material]
        answer = material if receiver.kind == "made" else uses[material]
        assert train_vlm.answer_after(receiver, donor) == train_vlm.IDS[answer]

    ids, positions, mask, _ = train_vlm.collate(rows)
    probe = torch.nn.Linear(model.lm_head.in_features, len(MATERIALS))
    decoder = model.model.language_model
    seen: list[torch.Tensor] = []
    streams = []
    with torch.no_grad():
        embeds = decoder.embed_tokens(ids)
        # The norm is the first to read what enters the layer, after the exchange.
        handle = decoder.layers[2].input_layernorm.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
        with asking.hooks([handle]):
            for some in ([], pairs):
                with train_vlm.exchanged(decoder.layers[2], probe, some):
                    decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
                streams.append(seen[-1])
        before, after = streams
        changed = {(row, at) for row, at in torch.nonzero((before != after).any(-1)).tolist()}
        assert changed == {(row, link.subject) for (row, link), _ in pairs}
        for (row, link), (donor_row, donor) in pairs:
            got, given = after[row, link.subject], before[donor_row, donor.subject]
            weight = probe.weight
            torch.testing.assert_close(weight @ got, weight @ given, atol=1e-4, rtol=0)
            change = got - before[row, link.subject]
            rest = change - torch.linalg.pinv(weight) @ (weight @ change)
            assert rest.abs().max() < 1e-4  # nothing changes that the probe does not read


def test_teacher_forced_grading_equals_generation(model: LlavaForConditionalGeneration) -> None:
    """A random model talks nonsense; graded against its own nonsense it is exact, against any other it is not."""
    rng = random.Random(41)
    processor = build_processor()
    with torch.no_grad():
        model.lm_head.weight[:5] = 0  # special tokens are never the likeliest
    stream = asking.pictures("test", rng)
    pool = [next(stream) for _ in range(5)]
    for kind in ("exist", "describe", "where"):
        (item,) = asking.ask_evenly(pool, kind, 1, 2, rng)
        (said,) = asking.generate(model, processor, [item], 3)
        words = said.split()
        assert len(words) == 3
        for heard, right in ((words, True), ([*words[:2], "wood" if words[2] != "wood" else "wool"], False)):
            echoed = replace(item, question=replace(item.question, answer=" ".join(heard)))
            encoded = asking.encode(processor, [echoed])
            without_stop = replace(encoded, end=encoded.end - 1)
            assert bool(asking.answers(model, without_stop).exact) == right
            assert not asking.answers(model, encoded).exact  # it never stops
            first = asking.answers(model, encoded).first
            assert processor.tokenizer.decode(first) == words[0]


def test_replaced_mlps_and_patched_streams_do_what_they_say(model: LlavaForConditionalGeneration) -> None:
    rng = random.Random(43)
    processor = build_processor()
    stream = asking.pictures("train", rng)
    items = asking.ask_evenly([next(stream) for _ in range(7)], "use", 7, 0, rng)
    encoded = asking.encode(processor, items)
    before = asking.residuals(model, encoded, encoded.subject[:, None])
    means = asking.mlp_means(model, encoded)
    with asking.mlps_give(model, dict(enumerate(means))):
        given = asking.mlp_means(model, encoded)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(given, means, strict=True))
        assert not torch.allclose(asking.residuals(model, encoded, encoded.subject[:, None])[-1], before[-1])
    assert torch.equal(asking.residuals(model, encoded, encoded.subject[:, None]), before)  # hooks are gone
    own = asking.answers(model, encoded).first
    assert torch.equal(asking.patched_answers(model, encoded, 2, before[2, :, 0]), own)
    # What is put in after the last layer at the subject is read by no later token.
    assert torch.equal(asking.patched_answers(model, encoded, 3, torch.randn_like(before[3, :, 0])), own)


# Files and streams -------------------------------------------------------------------------------------------


def test_a_longer_stream_begins_with_a_shorter_one() -> None:
    short, long = list(samples(23)), list(samples(61))
    for a, b in zip(short, long, strict=False):
        assert (a.id, a.layout, a.prompt, a.answer) == (b.id, b.layout, b.prompt, b.answer)
        assert a.image.tobytes() == b.image.tobytes()
    assert [s.id for s in long] == [f"shapes-{i:06d}" for i in range(61)]
    assert [s.prompt for s in samples(23, seed=1)] != [s.prompt for s in short]


def test_the_stream_has_all_splits_and_kinds() -> None:
    stream = list(samples(1500))
    kinds = Counter(s.kind for s in stream)
    assert set(kinds) == set(KINDS)
    assert sum(kinds[kind] for kind in ONE_WORD_KINDS) > 0.8 * len(stream)
    splits = Counter(s.split for s in stream)
    assert abs(splits["test"] / len(stream) - 2 / 16) < 0.03
    assert abs(splits["val"] / len(stream) - 1 / 16) < 0.03
    for s in stream[:200]:
        things = [re.fullmatch(r"(\d):(\w+) (\w+)", part) for part in s.layout.split(";")]
        scene = Scene(tuple(Thing(int(m[1]), m[2], m[3]) for m in things if m))
        assert scene.split == s.split
        assert answer_by_reading(scene, s.prompt) == s.answer
        assert s.image.size == (48, 48)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("files")
    benchmark_files.write(folder, 31)
    return folder


def test_amber_files(files) -> None:
    amber = files / "amber"
    read = {f.stem: json.loads(f.read_text()) for f in (amber / "data" / "query").iterdir()}
    parts = ["query_discriminative-attribute", "query_discriminative-existence", "query_discriminative-relation"]
    assert set(read) == {"query_all", "query_generative", "query_discriminative", *parts}
    assert all(len(rows) > 0 for rows in read.values())
    assert read["query_discriminative"] == [row for part in parts for row in read[part]]
    assert read["query_all"] == read["query_generative"] + read["query_discriminative"]
    assert [row["id"] for row in read["query_all"]] == list(range(1, len(read["query_all"]) + 1))
    assert all(set(row) == {"id", "image", "query"} for row in read["query_all"])
    assert len(read["query_generative"]) == 31

    annotations = json.loads((amber / "data" / "annotations.json").read_text())
    assert len(annotations) == len(read["query_all"])
    association = json.loads((amber / "data" / "relation.json").read_text())
    shapes_in = {}
    for row in read["query_all"]:
        truth = annotations[row["id"] - 1]
        assert truth["id"] == row["id"]
        assert Image.open(amber / "image" / row["image"]).size == (48, 48)
        if truth["type"] == "generative":
            assert sorted(truth["truth"] + truth["hallu"]) == sorted(SHAPES) == sorted(association)
            shapes_in[row["image"]] = truth["truth"]
        else:
            assert truth["truth"] in ("yes", "no")
    of = {name: [annotations[row["id"] - 1] for row in rows] for name, rows in read.items()}
    existence = of["query_discriminative-existence"]
    assert {(a["type"], a["truth"]) for a in existence} == {("discriminative-hallucination", "no")}
    for row in read["query_discriminative-existence"]:
        assert row["query"].rstrip("?").split()[-1] not in shapes_in[row["image"]]
    kinds = {a["type"] for a in of["query_discriminative-attribute"]}
    assert kinds == {"discriminative-attribute-state", "discriminative-attribute-number"}
    relation = {(a["type"], a["truth"]) for a in of["query_discriminative-relation"]}
    assert relation == {("discriminative-relation", "yes"), ("relation", "no")}


def test_amber_and_pope_tell_the_truth(files) -> None:
    """Every yes/no question, answered from the layouts."""
    scenes = benchmark_files.different_scenes(31, "test", random.Random("scenes 0"))
    assert {scene.split for scene in scenes} == {"test"}
    by_image = {f"shapes_{i}.png": scene for i, scene in enumerate(scenes, start=1)}
    annotations = json.loads((files / "amber" / "data" / "annotations.json").read_text())
    for row in json.loads((files / "amber" / "data" / "query" / "query_discriminative.json").read_text()):
        assert annotations[row["id"] - 1]["truth"] == answer_by_reading(by_image[row["image"]], row["query"]), row
    for way in ("random", "popular", "adversarial"):
        lines = (files / "pope" / f"shapes_pope_{way}.json").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["question_id"] for row in rows] == list(range(len(rows)))
        assert Counter(row["label"] for row in rows)["yes"] * 2 == len(rows)
        for row in rows:
            assert set(row) == {"question_id", "image", "text", "label"}
            assert row["label"] == answer_by_reading(by_image[row["image"]], row["text"])
            assert (files / "pope" / "image" / row["image"]).is_file()


def test_pope_adversarial_is_harder_than_random(files) -> None:
    scenes = benchmark_files.different_scenes(31, "test", random.Random("scenes 0"))

    def crossed(way: str) -> float:
        hard = []
        for line in (files / "pope" / f"shapes_pope_{way}.json").read_text().splitlines():
            row = json.loads(line)
            things = scenes[int(re.findall(r"\d+", row["image"])[0]) - 1].things
            *_, color, shape = row["text"].rstrip("?").split()
            if row["label"] == "no":
                hard.append(any(t.color == color for t in things) and any(t.shape == shape for t in things))
        return sum(hard) / len(hard)

    assert crossed("adversarial") > 2 * crossed("random")


def test_files_are_the_same_every_time(files, tmp_path) -> None:
    benchmark_files.write(tmp_path, 31)
    for file in sorted(f for f in files.rglob("*") if f.is_file()):
        assert (tmp_path / file.relative_to(files)).read_bytes() == file.read_bytes(), file
