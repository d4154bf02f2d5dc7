"""The tests of the miniature: world, tasks, pre-training stages, judge, scores and studies."""
import io
import json
import math
import re
import shutil
import zlib
from collections import Counter
from dataclasses import astuple, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.random import default_rng
from PIL import Image
from safetensors.torch import load_file
from scipy import ndimage
from tokenizers import Tokenizer as Tokenizers

import data
import eval as evaluation
import sample
import train
from clip_decoder import PRESETS, VAE, EvaConfig
from conftest import TINY_DECODER, gap, randomise, tiny_tokenizer
from data import Tokenizer, load_image
from evals.understanding import read_questions, tabulate
from miniature import judge as rules
from miniature import pretrain, scores, studies, tasks, world
from miniature.judge import PHRASE, SENTENCE, caption_truth, judge, scene_for
from miniature.pretrain import CLIP, VaeStage, image_blocks, train_tokenizer
from miniature.tasks import World, WorldTask
from miniature.world import Object, Scene, make_scene, make_word, parse_caption, render
from model import BLIP3o

ROOT = Path(__file__).parent.parent
NANO = str(ROOT / "weights" / "nano")
CIRCLE, STAR = Object("circle", "red", "small", 0.2, 0.5), Object("star", "blue", "small", 0.7, 0.52)
SCENES = [make_scene(0, i) for i in range(300)]
COLOURS, SHAPES = "|".join(world.COLOURS), "|".join(world.SHAPES)


# ---- The world --------------------------------------------------------------------------------------------
def test_world_draws_what_it_has_always_drawn():
    """Recorded numbers and shipped weights rely on it; scenes depend on seed, index and novelty alone."""
    texts = [*world.world_texts(20), *world.skill_prompts(20), *world.word_prompts(20)]
    for i in range(20):
        rng = default_rng(i)
        for scene in (make_scene(1, i), make_scene(1, i, novel=True, most=2), make_word(1, i)):
            text, objects = world.paraphrase(world.caption(scene, rng), rng)
            instruction, after = world.edit(scene, rng)
            texts += [text, objects, instruction, astuple(scene), astuple(after),
                      world.match_question(scene, rng)]
    assert zlib.crc32(repr(texts).encode()) == 1015801400
    scenes, item = [make_scene(3, i) for i in (999_999_999, 5, 6)], World(3)[5]
    np.random.seed(1)
    assert scenes == [make_scene(3, i) for i in (999_999_999, 5, 6)] and item["scene"] == scenes[1]
    assert len({*scenes, make_scene(4, 5), make_scene(3, 5, novel=True)}) == 5
    assert (item["image"] == render(scenes[1])).all() and item["image"].shape == (64, 64, 3)


def test_held_out_pairs_are_kept_for_novel_scenes():
    """Training scenes of at most N objects have all other pairs, every novel one has a held-out pair."""
    for most in (1, 2, 3, 4):
        scenes = [World(0, 16, objects=most)[i]["scene"].objects for i in range(300)]
        assert max(map(len, scenes)) == most
        assert {(obj.colour, obj.shape) for obj in sum(scenes, ())} == set(world.PAIRS) - world.HELD_OUT
    novel = [{(obj.colour, obj.shape) for obj in make_scene(0, i, novel=True).objects} for i in range(300)]
    assert set().union(*novel) == set(world.PAIRS) and all(shown & world.HELD_OUT for shown in novel)


def test_images_show_objects_where_the_scene_says():
    """To 1/4 pixel of 128, two pixels apart, away from the border; halved, it is the image at 64 px."""
    for scene in [make_scene(2, i) for i in range(60)]:
        small, large = render(scene, 64), render(scene, 128)
        halved = large.reshape(64, 2, 64, 2, 3).astype(float).mean((1, 3))
        shifted = min(np.abs(np.roll(halved, 1, axis) - small).mean() for axis in (0, 1))
        assert np.abs(halved - small).mean() < min(1, shifted / 3)    # grey levels; only edges differ
        background, taken = np.array(world.BACKGROUNDS[scene.background]), np.zeros((128, 128), bool)
        for obj in scene.objects:
            weight = np.abs(render(Scene(scene.background, (obj,)), 128) - background).sum(2)
            x, y = (weight.sum(axis) @ (np.arange(128) + 0.5) / 128 / weight.sum() for axis in (0, 1))
            assert abs(x - obj.x) < 0.25 / 128 and abs(y - obj.y) < 0.25 / 128
            mask = weight > 0
            assert mask.sum() > 400 and not mask[[0, -1]].any() and not mask[:, [0, -1]].any()
            assert not (taken & ndimage.binary_dilation(mask, np.ones((3, 3)))).any()
            taken |= mask
        assert ((large != background).any(2) == taken).all()


def test_chimera_mixes_two_renders_of_one_object():
    """Visibly not the scene's image, but only within the reach of one of its objects."""
    reach = {size: max(world.REACH.values()) * radius + 0.02 for size, radius in world.SIZES.items()}
    for i, scene in enumerate(SCENES[:20]):
        changed = world.chimera(scene, default_rng(i))
        y, x = (np.array(np.nonzero((changed != render(scene)).any(2))) + 0.5) / 64
        assert changed.shape == (64, 64, 3) and changed.dtype == np.uint8 and len(y) > 64 * 64 / 120
        assert any((np.hypot(x - obj.x, y - obj.y) < reach[obj.size]).all() for obj in scene.objects)


def test_words():
    """A fraction of the scenes, inside the image, none held out; all that is said of them is true."""
    scenes, again = ([World(words=0.5)[i]["scene"] for i in range(60)] for _ in range(2))
    assert 15 < sum(scene.word is not None for scene in scenes) < 45 and scenes == again
    assert World()[3]["scene"] == make_scene(0, 3)
    assert len(world.HELD_OUT_WORDS) == 22 and "AI" in world.HELD_OUT_WORDS
    rng = default_rng(0)
    for i in range(60):
        scene, novel = make_word(0, i), make_word(0, i, novel=True).word
        word, text = scene.word, world.caption(scene, rng)
        points = np.concatenate(list(world.strokes(word)))
        assert word.text not in world.HELD_OUT_WORDS and novel.text in world.HELD_OUT_WORDS
        assert points.min() > world.STROKE / 2 and points.max() < 1 - world.STROKE / 2
        named = set(re.findall("|".join((*world.COLOURS, *world.BACKGROUNDS)), text))
        parsed, letters = parse_caption(text), [f"first {word.text[0]}", f"second {word.text[1]}"]
        assert f"'{word.text}'" in text and [name for name, *_ in parsed] == letters
        assert all(set(words) == named for _, *words in parsed)
        assert world.paraphrase(text, rng) == (text, parsed)
        parsed = parse_caption(world.describe(scene))
        assert parsed == [[name, word.colour, scene.background] for name in letters]
        question, answer = world.ask(scene, rng)
        assert answer == {"What word is there?": word.text, "What colour is the word?": word.colour,
                          "What colour is the background?": scene.background}[question]
        instruction, after = world.edit(scene, rng)
        assert after.word == word and after.background != scene.background
        assert instruction == f"make the background {after.background}"
    covered = (render(Scene("white", (), replace(word, text="II", colour="red")), 128)[..., 2] < 150).mean()
    assert covered == pytest.approx(2 * (0.38 * 0.08 + np.pi * 0.04 ** 2), rel=0.1)    # round ends
    for i, asked in enumerate(world.word_prompts(40)):
        (word,) = asked["include"]
        assert asked["tag"] == ("word", "new word")[i % 2]
        assert (word["word"] in world.HELD_OUT_WORDS) == (i % 2 == 1)
        assert asked["prompt"] == f"the word '{word['word']}' in {word['color']}"


def test_captions_are_true_and_grammatical():
    """And false of a scene with another colour or one object more; descriptions name everything in order."""
    phrase = rf"(?=\b(an?|two|three|four) (?:(?!of|with)\w+ ){{0,2}}((?:{SHAPES})s?)\b)"
    length = Counter()
    for i in range(300):
        scene = make_scene(1, i, novel=i % 2 == 1)
        first, *others = scene.objects
        colours = [obj.colour for obj in sorted(scene.objects, key=lambda obj: obj.x)]
        absent = next(name for name in world.COLOURS if name not in colours)
        recoloured = replace(scene, objects=(replace(first, colour=absent), *others))
        for long in (False, True, None):
            text = world.caption(scene, default_rng((i, 5)), long)
            low, no_colour = text.lower(), not re.search(COLOURS, text)
            assert caption_truth(text, scene) == (True, True), text
            assert caption_truth(text, recoloured) == (no_colour, no_colour), text
            assert caption_truth(text, replace(scene, objects=(*scene.objects, first))) == (False, False)
            assert all((a == "an") == bool(vowel) for a, vowel in re.findall(r"\b(an?) ([aeiou]?)", low))
            assert all((n in world.NUMBERS) == (noun[-1] == "s") for n, noun in re.findall(phrase, low))
            verb = re.match(r"there (is|are) (an? )?", low)
            assert verb is None or (verb[1] == "is") == bool(verb[2]), text
            assert not long or all(word in low for word in (scene.background, *colours)), text
            assert 1 <= len(parse_caption(text)) <= len(scene.objects)
            length[long] += len(text)
        text = world.describe(scene)
        assert caption_truth(text, scene) == (True, True) and re.findall(COLOURS, text) == colours
        for words in ("small|large", " (in|at|on) the "):
            assert len(re.findall(words, text)) == len(colours)
        assert text.endswith(f" {scene.background} background")
    assert length[True] > 1.25 * length[False]
    assert world.relation(CIRCLE, STAR) == "left of" and world.relation(STAR, CIRCLE) == "right of"
    assert world.relation(CIRCLE, replace(STAR, y=0.95)) is None    # diagonal: nothing is said
    assert world.relation(STAR, replace(STAR, x=0.72, y=0.2)) == "below"
    for at, places in ((0.35, ["on the left", "at the top"]), (0.65, ["on the right", "at the bottom"]),
                       (0.37, ["in the middle"] * 2), (0.63, ["in the middle"] * 2)):
        assert [world.region(replace(STAR, x=x, y=y)) for x, y in ((at, 0.5), (0.5, at))] == places
    texts = [world.caption(Scene("grey", (CIRCLE, STAR)), default_rng(i)).lower() for i in range(200)]
    counts = Counter(re.findall(f"({SHAPES}).* (above|below|under|left of|right of) .*({SHAPES})",
                                "\n".join(texts)))
    assert set(counts) == {("circle", "left of", "star"), ("star", "right of", "circle")}
    assert min(counts.values()) > 15
    assert [world.join(list(names)) for names in ("x", "xy", "xyz")] == ["x", "x and y", "x, y and z"]


def test_captions_are_parsed_and_their_colours_swapped():
    """Swapping two colours is its own inverse and touches nothing else; other captions have no swap."""
    for text, parsed in {
            "A tiny red circle to the left of two stars on grey.":
            "circle small red left grey; star two right grey",
            "a black background with an orange star at the top, a square and a big circle":
            "star orange top black; square black; circle large black",
            "a star right of a circle": "star right; circle left", "a photograph of Paris": "",
            "a star above a circle": "star above; circle below",
            "a star under a circle": "star below; circle above"}.items():
        assert "; ".join(map(" ".join, parse_caption(text))) == parsed
    assert world.swap_colours("An orange star above a red circle") == "A red star above an orange circle"
    assert world.swap_colours("two red stars") is world.swap_colours("a red star and a red circle") is None
    texts = [world.caption(scene, default_rng(i)) for i, scene in enumerate(SCENES)]
    swapped = [(text, world.swap_colours(text)) for text in texts if world.swap_colours(text)]
    for text, other in swapped:
        assert other != text and world.swap_colours(other) == text
        assert sorted(other.replace("an ", "a ")) == sorted(text.replace("an ", "a "))
    assert len(swapped) > 20


def test_paraphrases_say_the_same():
    """The objects returned are the caption's, in the order of the new text, whose words mean the same."""
    rng, turned, changed = default_rng(0), 0, 0
    meaning = {synonym: word for word, synonyms in world.SYNONYMS.items() for synonym in synonyms}
    for scene in SCENES:
        text = world.caption(scene, rng)
        parsed, (new, objects) = parse_caption(text), world.paraphrase(text, rng)
        assert sorted(map(sorted, objects)) == sorted(map(sorted, parsed))
        assert new != text or objects == parsed
        changed, turned = changed + (new != text), turned + (objects != parsed)
        plain = new.lower().replace("boxes", "squares")
        for synonym in sorted(meaning, key=len, reverse=True):
            plain = re.sub(rf"\b{synonym}(s?)\b", rf"{meaning[synonym]}\1", plain)
        assert re.findall(SHAPES, plain) == [shape for shape, *_ in objects], (text, new)
        colours = [name for words in objects for name in world.COLOURS if name in words]
        assert re.findall(COLOURS, plain) == colours and "boxs" not in plain, (text, new)
    assert changed > 150 and turned > 10
    for relation, axis, first in (("left of", "left", "star"), ("right of", "left", "circle"),
                                  ("above", "above", "star"), ("below", "above", "circle")):
        patterns, used = [form.format("(?P<first>.+)", ".+") for form in world.SIDE_FORMS[axis]], set()
        for i in range(60):
            text = world.paraphrase(f"a star {relation} a circle", default_rng(i))[0].lower()
            match = next(filter(None, (re.search(pattern, text) for pattern in reversed(patterns))))
            assert ("star" in match["first"]) == (first == "star"), text
            used.add(match.re.pattern)
        assert used == set(patterns)


def test_upsampled_captions_name_the_scene():
    """In the caption's order, with its relation, which a paraphrase that turns the order (-1) turns, too."""
    def upsample(scene, text, order=1):
        return world.upsample_caption(scene, text, parse_caption(text)[::order])
    two, star, circle = Scene("grey", (CIRCLE, STAR)), "a small blue star", "a small red circle"
    three = Scene("white", tuple(replace(STAR, colour=colour, x=x, y=x)
                                 for colour, x in (("red", 0.2), ("blue", 0.5), ("red", 0.8))))
    ground = " on a grey background"
    assert upsample(two, "a star and a circle") == f"{star} on the right and {circle} on the left{ground}"
    assert upsample(two, "A tiny circle to the left of a star.") == f"{circle} left of {star}{ground}"
    assert upsample(two, "a circle left of a star", -1) == f"{star} right of {circle}{ground}"
    assert upsample(three, "a blue star and two red stars").startswith(
        "a small blue star in the middle, a small red star in the top left")
    assert upsample(make_word(0, 1), "the word 'HI'") == world.describe(make_word(0, 1))
    rng, attributes = default_rng(0), (*world.COLOURS, *world.SIZES)
    for scene in SCENES:
        text = world.caption(scene, rng)
        parsed = parse_caption(world.upsample_caption(scene, text, world.paraphrase(text, rng)[1]))
        named = [(shape, *(word for word in words if word in attributes)) for shape, *words in parsed]
        assert sorted(named) == sorted((obj.shape, obj.size, obj.colour) for obj in scene.objects), text


def test_query_targets_are_sums_of_the_shipped_codes():
    tables, names = world.target_tables(), world.CAPTION_WORDS
    words = default_rng(0).standard_normal((5, len(names), 128), dtype=np.float32)[-1]
    letters = default_rng(1).standard_normal((2, len(world.GLYPHS), 128), dtype=np.float32)
    assert np.array_equal(tables["words"], words) and np.array_equal(tables["letters"], letters)

    def code(name):
        place, _, letter = name.partition(":")
        return letters[int(place), list(world.GLYPHS).index(letter)] if letter else words[names.index(name)]
    for dim, parsed, *expected in (
            (128, [["circle", "blue"]], "circle,blue,of one"), (32, [["star", "red"]], "star,red,of one"),
            (128, parse_caption("a red circle and a blue star"), "circle,red,of two", "star,blue,of two"),
            (128, [["circle", "blue"], ["star", "two"]], "circle,blue,of three", "star,two,of three"),
            (128, [["star", "two"], ["circle", "three"]], "star,two,of four"),
            (128, [["first H", "red"], ["second I", "red"]], "0:H,red", "1:I,red")):
        targets = world.query_targets(parsed, 4, dim)
        assert targets.shape == (4, dim) and targets.dtype == np.float32
        assert (targets[:2] == targets[2:]).all()
        for target, said in zip(targets, expected):
            total = sum(map(code, said.split(",")))[:dim]
            assert target == pytest.approx(total / np.sqrt(np.square(total).mean()), abs=1e-5), parsed
    assert not world.query_targets([], 4, 64).any()
    with pytest.raises(ValueError, match="128 dimensions at most"):
        world.query_targets([["circle"]], 1, 129)


def test_edits_do_what_they_say():
    """To an object that is the only one of its shape; without a kind, what is not possible is replaced."""
    rng, verbs = default_rng(0), Counter()
    for scene in SCENES:
        text, after = world.edit(scene, rng)
        gone, new = set(scene.objects) - set(after.objects), set(after.objects) - set(scene.objects)
        verb, rest = text.split(" the ", 1)
        verbs[verb] += 1
        if "background" in rest:
            assert not gone and not new and after.background == rest.split()[-1] != scene.background
            continue
        (old,) = gone
        assert scene.background == after.background and old.shape == rest.split()[0]
        assert [obj.shape for obj in scene.objects].count(old.shape) == 1 and len(new) == (verb != "remove")
        if verb == "make":
            assert new == {replace(old, colour=rest.split()[-1])}
        for moved in new if verb == "move" else ():
            assert replace(moved, x=old.x, y=old.y) == old
            assert world.region(moved).endswith(rest.split(" to ", 1)[1])
            assert all(np.hypot(moved.x - obj.x, moved.y - obj.y) > moved.reach + obj.reach
                       for obj in after.objects if obj is not moved)
    assert set(verbs) == {"make", "move", "remove"} and min(verbs.values()) > 20
    full, single = make_scene(11, 1347), Scene("white", (CIRCLE,))    # there is no room for its triangle
    assert world.edit(full, rng, "place") is world.edit(single, rng, "remove") is None
    assert all(world.edit(full, rng)[1] != full for _ in range(9))
    assert world.edit(single, rng, "colour")[1].objects[0].colour != "red"


def test_match_questions_are_labelled_right():
    """"yes" where an independent reading finds every detail of the caption in the scene, else "no"."""
    labels, checked, wrong = Counter(), 0, 0
    for i in range(600):
        scene, rng = make_scene(0, i), default_rng((1, i))
        question, label = world.match_question(scene, rng)
        labels[label] += 1
        text = re.fullmatch(r'Does this image show "(.+)"\? Answer yes or no\.', question)[1]
        if SENTENCE.fullmatch(PHRASE.sub("#", text.lower().removesuffix("."))):    # not paraphrased
            checked += 1
            wrong += caption_truth(text, scene)[1] != (label == "yes")
        assert not any(f"{colour} {shape}" in text for colour, shape in world.HELD_OUT)
        assert 1 <= len(world.perturb(scene, rng).objects) <= 4
    assert checked > 250 and wrong <= 2 and 0.4 < labels["yes"] / 600 < 0.7
    assert {world.match_question(make_word(0, i), default_rng(i))[1] for i in range(20)} == {"yes", "no"}


def answer_anew(text, scene):
    """The answer to a question of world.question, worked out anew from its words."""
    words = text.rstrip("?").split()

    def those(word):
        return [obj for obj in scene.objects if word in ("objects", obj.shape, f"{obj.shape}s", obj.colour)]
    if text == "What colour is the background?":
        return scene.background
    if words[0] == "How":
        return world.NUMBERS[len(those(words[2]))]
    if words[1] == "there":
        return "yes" if any([obj.colour, obj.shape] == words[-2:] for obj in scene.objects) else "no"
    if words[0] == "What":
        (obj,) = those(words[-1] if words[1] == "colour" else words[-2])
        return getattr(obj, words[1])
    (a,), (b,) = those(words[3] if words[0] == "Where" else words[2]), those(words[-1])
    true = world.relation(a, b)
    return true if words[0] == "Where" else "yes" if words[3] == true.split()[0] else "no"


@pytest.mark.parametrize("kind", world.QUESTIONS)
def test_questions_have_true_answers(kind):
    """None only where a scene leaves no answer. "yes" is right half of the time, within three sigmas."""
    asked = [world.question(scene, default_rng((i, 1)), kind) for i, scene in enumerate(SCENES)]
    assert all(one is None or one[::2] == (kind, answer_anew(one[1], s)) for one, s in zip(asked, SCENES))
    answers = Counter(one[2] for one in asked if one)
    assert kind in ("colour", "shape", "position") or None not in asked
    assert answers.total() > 45 and len(answers) >= (2 if kind == "existence" else 3)
    if kind in ("existence", "position"):
        asked = [world.question(make_scene(0, i), default_rng((i, 2)), kind) for i in range(2000)]
        yes, no = (sum(one is not None and one[2] == word for one in asked) for word in ("yes", "no"))
        assert yes + no > 200 and abs(yes / (yes + no) - 0.5) < 3 * 0.5 / np.sqrt(yes + no)


def test_questions_of_training_are_those_that_a_scene_can_answer():
    """world.ask: about two objects all six kinds, about one all but position."""
    kinds = "Where is|Is the |What shape|How many|Is there|What colour is the background|What colour is the"
    one, two = ({re.match(kinds, world.ask(Scene("grey", objects), default_rng(i))[0])[0]
                 for i in range(120)} for objects in ((CIRCLE,), (CIRCLE, STAR)))
    assert len(one) == 5 and two == one | {"Where is", "Is the "}


@pytest.mark.parametrize("novel", [False, True])
def test_skill_prompts_say_what_their_clauses_ask_for(novel):
    """553 are GenEval's 80, 99, 80, 94, 100 and 100; colours are held-out pairs alone, or none of them."""
    prompts = world.skill_prompts(novel=novel)
    assert Counter(asked["tag"] for asked in prompts) == {
        "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100,
        "color_attr": 100}
    assert prompts == world.skill_prompts(553, 0, novel) != world.skill_prompts(553, 1, novel)
    assert novel or len({asked["prompt"] for asked in prompts}) > 150
    assert Counter(asked["tag"] for asked in world.skill_prompts(6)) == dict.fromkeys(world.SKILLS, 1)
    assert {asked["tag"] for asked in world.skill_prompts(60, most=1)} == {"single_object", "colors"}
    for asked in prompts:
        tag, (a, *others) = asked["tag"], asked["include"]
        coloured = [(one["color"], one["class"]) for one in asked["include"] if "color" in one]
        assert len(coloured) == {"colors": 1, "color_attr": 2}.get(tag, 0)
        assert all((pair in world.HELD_OUT) == novel for pair in coloured)
        is_pair = tag in ("two_object", "position", "color_attr")
        assert len(others) == len({one["class"] for one in others} - {a["class"]}) == is_pair
        if tag == "counting":
            assert a["count"] > 1
            text = f"{world.NUMBERS[a['count']]} {a['class']}s"
        elif tag == "position":
            relation, index = others[0]["position"]
            assert index == 0 and relation in world.RELATIONS
            text = f"a {others[0]['class']} {relation} a {a['class']}"
        else:
            names = [" ".join(filter(None, (one.get("color"), one["class"]))) for one in asked["include"]]
            text = " and ".join(("an " if name[0] == "o" else "a ") + name for name in names)
        assert asked["prompt"] == f"a photo of {text}"


# ---- The judge --------------------------------------------------------------------------------------------
BLANK = np.full((64, 64, 3), 250, np.uint8)


def render_objects(*objects, background="white"):
    return render(Scene(background, tuple(Object(*obj) for obj in objects)))


def seen(*objects):
    """What the judge would say of small, perfectly seen objects given as (shape, colour, x, y)."""
    return rules.Seen("white", tuple(rules.SeenObject(shape, colour, "small", x, y, 0.05, 0.95)
                                     for shape, colour, x, y in objects))


def clause(shape, count=1, **more):
    return {"class": shape, "count": count, **more}


def entry(tag, *include):
    return {"tag": tag, "include": list(include)}


@pytest.mark.parametrize("background", world.BACKGROUNDS)
@pytest.mark.parametrize("size", world.SIZES)
def test_judge_sees_every_kind_of_object(size, background):
    for colour, shape in world.PAIRS:
        image = render_objects((shape, colour, size, 0.5, 0.47), background=background)
        for down, right in ((0, 0), (-1, 1)):
            verdict = judge(np.roll(image, (down, right), (0, 1)))
            (only,) = verdict.objects
            assert (only.shape, only.colour, only.size) == (shape, colour, size)
            assert verdict.background == background
            assert abs(only.x - 0.5 - right / 64) < 0.005 and abs(only.y - 0.47 - down / 64) < 0.005


def test_judge_rejects_what_is_no_object_of_the_world():
    y, x = (np.mgrid[:64, :64] - 31.5) / 64
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    diamond, ellipse = abs(x) + abs(y) < 0.2, x ** 2 * 2 + y ** 2 / 2 < 0.03
    inverted = (y > -0.12) & (y - 0.18 < -1.73 * abs(x))
    blob = radius < 0.17 * (1 + 0.3 * np.cos(2 * angle + 1) + 0.2 * np.cos(3 * angle))
    red, pink = world.COLOURS["red"], (235, 110, 110)
    cases = [(mask, red, ("unknown", "red")) for mask in (diamond, inverted, ellipse, blob)]
    for mask, colour, expected in (*cases, (radius < 0.18, pink, ("circle", "unknown"))):
        objects = judge(np.where(mask[..., None], colour, BLANK).astype(np.uint8)).objects
        assert [(obj.shape, obj.colour) for obj in objects] == [expected]
    speck = BLANK.copy()
    speck[20:23, 20:23] = red
    assert judge(BLANK).objects == judge(speck).objects == ()
    assert judge(np.full((64, 64, 3), (0, 200, 200), np.uint8)).background == "unknown"
    for wrong in (BLANK[:, :32], BLANK.astype(np.float32), BLANK[..., 0]):
        with pytest.raises(ValueError, match="square uint8"):
            judge(wrong)


@pytest.mark.parametrize("distort", scores.DISTORTIONS.values())
def test_judge_reads_words(distort):
    """Each prompt's own image passes, clean or distorted; another's, blanks and images of objects don't."""
    rng, entries = default_rng(0), world.word_prompts(12)
    images = [distort(render(scene_for(asked, rng))) for asked in entries]
    judged = rules.judge_images([*images, BLANK, render(SCENES[5])], entries)
    for shown, expected in ((judged[:12], {True}), (judged[1:-1], {False}), (judged[2:], {False})):
        assert {verdict.hit for verdict in rules.judge_all(entries, shown)} == expected


def test_components_are_found_however_they_wind():
    """Pieces equal scipy's on random masks; corners don't connect."""
    random = [default_rng(i).random((30, 37)) < 0.6 for i in range(20)]    # clusters that percolate
    for mask in (np.eye(5, dtype=bool), np.zeros((4, 4), bool), *random):
        labels, count = ndimage.label(mask)
        pieces = {(labels == label).tobytes() for label in range(1, count + 1)}
        for least in (1, 4):
            found = [piece.tobytes() for piece in rules.components(mask, least)]
            assert sorted(found) == sorted(piece for piece in pieces if sum(piece) >= least)


RED, BLUE, BLOB = ("circle", "red", 0.25, 0.5), ("square", "blue", 0.75, 0.5), ("unknown", "red", 0.5, 0.1)
SINGLE, TWO = (entry("two_object", *map(clause, shapes)) for shapes in (["circle"], ["circle", "square"]))
THREE = entry("counting", clause("circle", 3))
RED_CIRCLE, GREEN_CIRCLE = (entry("colors", clause("circle", color=colour)) for colour in ("red", "green"))
RED_BLUE, BLUE_RED = (entry("color_attr", clause("circle", color=a), clause("square", color=b))
                      for a, b in (("red", "blue"), ("blue", "red")))
LEFT, RIGHT, ABOVE = (entry("position", clause("square"), clause("circle", position=[link, 0]))
                      for link in ("left of", "right of", "above"))
TWO_RED = entry("colors", clause("circle", 2, color="red"))
ODD, RED_STAR = ("circle", "unknown", 0.5, 0.5), ("star", "red", 0.25, 0.5)


@pytest.mark.parametrize("verdict, cases", [
    ((True, True), [(SINGLE, RED), (TWO, RED, BLUE), (THREE, RED, RED, RED), (RED_CIRCLE, RED),
                    (RED_BLUE, RED, BLUE), (LEFT, RED, BLUE)]),
    ((True, False), [(SINGLE, RED, BLUE), (SINGLE, RED, RED), (TWO, RED, BLUE, BLOB),
                     (THREE, RED, RED, RED, BLUE)]),
    ((False, False), [(SINGLE, BLUE), (SINGLE, BLOB), (SINGLE,), (TWO, RED), (THREE, RED, RED),
                      (THREE, RED, RED, RED, RED), (GREEN_CIRCLE, RED), (RED_CIRCLE, ODD), (LEFT, RED),
                      (BLUE_RED, RED, BLUE), (RED_BLUE, RED_STAR, BLUE), (RIGHT, RED, BLUE),
                      (ABOVE, RED, BLUE), (TWO_RED, RED, ODD)])])
def test_hits_follow_geneval(verdict, cases):
    """Each skill by hand: what counts, what doesn't, and what only the strict score refuses."""
    for asked, *shown in cases:
        assert (rules.hits(asked, seen(*shown)), rules.hits_strictly(asked, seen(*shown))) == verdict, asked


@pytest.mark.parametrize("dx, dy, expected", [      # diameters of 0.252: the margin is 0.0505
    (0, 0, set()), (0.04, 0.0, set()), (0.08, 0.0, set()), (-0.3, 0, {"left of"}), (0.3, 0.1, {"right of"}),
    (0, -0.3, {"above"}), (0.05, 0.3, {"below"}), (0.4, 0.4, {"right of", "below"})])
def test_relations_have_a_margin_and_know_diagonals(dx, dy, expected):
    pair = seen(("circle", "red", 0.5 + dx, 0.5 + dy), ("square", "blue", 0.5, 0.5)).objects
    assert rules.relations(*pair) == expected


def test_colours_fit_whatever_the_shapes_and_skills_weigh_the_same():
    asked = entry("x", clause("star", 2, color="red"), clause("circle"))
    for colours, expected in {"red red blue": True, "red red red": True, "red blue blue": False,
                              "red red": False, "red red red blue": False}.items():
        shown = seen(*(("square", colour, 0.5, 0.5) for colour in colours.split()))
        assert rules.colours_fit(asked, shown) == expected, colours
    table = rules.score_renders([TWO] + [RED_CIRCLE] * 3, [render(Scene("white", (CIRCLE,)))] * 4)
    assert [table[skill]["score"] for skill in ("two_object", "colors", "overall")] == [0, 1, 0.5]
    assert table["colors"]["n"] == 3 and table["overall"]["low"] < 0.5 < table["overall"]["high"]


GREEN, LARGE = ("square", "green", "small", 0.2, 0.2), ("square", "blue", "large", 0.7, 0.7)
UNLIKE = entry("two", clause("square", color="green"), clause("square", color="blue"))
ON_WHITE = {**entry("size", clause("square", size="large")), "background": "white", "prompt": "large"}


def test_free_prompts_must_fit_exactly(tmp_path):
    """People's hundred are no training captions and fit their own images; impossible ones are refused."""
    for objects, unlike, large in (
            ([GREEN, LARGE], True, False), ([GREEN], False, False), ([LARGE], False, True),
            ([GREEN, ("square", "green", "large", 0.7, 0.7)], False, False),
            ([GREEN, LARGE, ("square", "green", "small", 0.2, 0.8)], False, False),
            ([GREEN, LARGE, ("star", "red", "small", 0.2, 0.8)], False, False)):
        judged = judge(render_objects(*objects))
        assert (rules.fits(UNLIKE, judged), rules.fits(ON_WHITE, judged)) == (unlike, large), objects
    assert not rules.fits(ON_WHITE, judge(render_objects(LARGE, background="black")))
    entries, rng = rules.read_entries(ROOT / "assets" / "free_prompts.jsonl"), default_rng(0)
    texts = {asked["prompt"] for asked in entries}
    captions = {world.caption(make_scene(0, i), rng).lower().rstrip(".") for i in range(3000)}
    judged = [judge(render(scene_for(asked, rng))) for asked in entries]
    assert len(texts) == 100 and not texts & captions and all(map(rules.fits, entries, judged))
    assert sum(map(rules.fits, entries, judged[50:] + judged[:50])) < 10
    for wrong in ({"tag": "counting"}, {"background": "pink"}, {"include": [clause("cat")]},
                  {"include": [clause("star"), clause("star", position=["above", 1])]},
                  {"include": [clause("star", position=["above", 0])]}):
        (tmp_path / "p.jsonl").write_text(json.dumps({**ON_WHITE, **wrong}) + "\n")
        with pytest.raises(ValueError, match="entry 1 of .* asks for what"):
            rules.read_entries(tmp_path / "p.jsonl")


BOTH, DISC = "a red circle and a blue star", Object("circle", "red", "small", 0.2, 0.2)
UNEQUAL = Scene("grey", (DISC, Object("star", "blue", "large", 0.75, 0.3)))
ALIKE = Scene("grey", (DISC, replace(DISC, x=0.7, y=0.7)))


@pytest.mark.parametrize("scene, truth, texts", [
    (UNEQUAL, (True, True), [
        BOTH, "A blue star and a circle.", f"a grey background with {BOTH}", "a star right of a circle",
        "a tiny red circle and a big blue star on grey", "a photo of a circle to the left of a blue star",
        "a red circle in the top left corner and a blue star"]),
    (UNEQUAL, (True, False), [
        "a large circle and a blue star", f"{BOTH} on a white background", "a red circle above a blue star",
        "a red circle in the middle and a blue star"]),
    (UNEQUAL, (False, False), [
        "a red circle", "two red circles and a blue star", "a blue circle and a red star", "", f"{BOTH} and",
        f"{BOTH} and a blob", f"{BOTH}, a star"]),
    (ALIKE, (True, True), ["two red circles", "two small circles", "a circle and a red circle"])])
def test_caption_truth_by_hand(scene, truth, texts):
    """Objects and details apart; what isn't the world's grammar isn't true."""
    assert {text: caption_truth(text, scene) for text in texts} == dict.fromkeys(texts, truth)


# ---- The scores -------------------------------------------------------------------------------------------
def run(tmp_path, *line):
    """Run a command of eval.py into tmp_path, expect success, return its results."""
    assert evaluation.main([*map(str, line), "--out", str(tmp_path)]) == 0
    return json.loads((tmp_path / f"{line[0]}.json").read_text())


def to_pixels(scenes):
    """Renders as a Pipeline returns images, (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.stack(list(map(render, scenes)))).permute(0, 3, 1, 2) / 255


class Oracle:
    """In the Pipeline's place: generates what is asked, and says yes to every question."""
    def __init__(self, *_, **__):
        self.upsampled = {}

    def images(self, prompts, seeds, upsample=None):
        if upsample:
            self.upsampled |= {key: key[0] + ", upsampled" for key in zip(prompts, seeds)}
        entries = {e["prompt"]: e for most in (1, 4) for e in world.skill_prompts(12, 0, most=most)}
        return to_pixels(scene_for(entries[p], default_rng(s)) for p, s in zip(prompts, seeds))

    def best_of(self, prompts, seeds, k, **sampling):
        seeds = [k * seed for seed in seeds]
        return self.images(prompts, seeds, **sampling), seeds

    def answers(self, images, questions):
        return ["Yes."] * len(questions)


@pytest.mark.parametrize("size", [64, 128])
def test_judge_command(size, tmp_path, monkeypatch):
    """True images get full marks, strictly too, in four conditions; other prompts' and blanks score low."""
    monkeypatch.setattr(world, "skill_prompts", partial(world.skill_prompts, 60))
    results = run(tmp_path, "judge", "--n", 30, "--size", size)
    assert len(results["scenes"]) == 8 and all(row["score"] == 1 for row in results["scenes"].values())
    clean, *_ = tables = list(results["skills"].values())
    assert set(clean) == {*world.SKILLS, "overall"} and clean["overall"]["n"] == 120
    assert all(row["score"] == row["strict"] == row["colours"] == 1 for row in clean.values())
    *true, other, empty = (table["overall"]["score"] for table in tables)
    assert len(true) == 4 and min(true) > 0.99 and other < 0.3 and empty == 0


def test_alignment_command_writes_scores_and_images(tmp_path, monkeypatch, capsys):
    """The truth gets 100 %, other prompts' images don't. Of many images, whole prompts are on the sheet."""
    monkeypatch.setattr(scores, "Pipeline", Oracle)
    line = ("alignment", "--n-prompts", 12, "--images")
    results = run(tmp_path, *line, 3)
    assert results["model"]["overall"]["score"] == results["real"]["overall"]["score"] == 1
    assert results["shuffled"]["overall"]["score"] < 0.4 and "upsampled" not in results
    assert len(results["images"]) == len({image["seed"] for image in results["images"]}) == 36
    assert all(image["generated_from"] == image["prompt"] for image in results["images"])
    assert load_image(tmp_path / "alignment.png").width == 12 * (128 + 16)
    monkeypatch.setattr(scores, "SHEET", 12)            # prompts 0, 3, 6, 9: twelve cells, one row
    assert len(run(tmp_path, *line, 3)["images"]) == 36
    assert load_image(tmp_path / "alignment.png").size == (12 * 144, 180)
    results = run(tmp_path, *line, 1, "--upsample", "--best-of", 3)
    assert results["upsampled"]["overall"]["score"] == 1 and "100.0 %" in capsys.readouterr().out
    assert all(image["generated_from"].endswith(", upsampled") for image in results["images"])
    assert [image["seed"] for image in results["images"]] == list(range(0, 36, 3))
    tags = {image["tag"] for image in run(tmp_path, *line, 1, "--objects", 1)["images"]}
    assert tags == {"single_object", "colors"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps({**UNLIKE, "prompt": "two squares"}))
    line = f"alignment --objects 1 --prompts {tmp_path / 'pairs.jsonl'} --out {tmp_path}".split()
    assert evaluation.main(line) == 2 and "asks for 1 objects or fewer" in capsys.readouterr().err


def test_the_first_prompts_of_a_file():
    """--n-prompts takes so many from the file's beginning, all without it; 553 are the world's own."""
    file = ROOT / "assets" / "free_prompts.jsonl"
    for words, n in (("--n-prompts 6", 6), ("", 100), ("--n-prompts 600", 100)):
        args = evaluation.parse(f"alignment --prompts {file} {words}".split())
        assert scores.choose_prompts(args)[0] == rules.read_entries(file)[:n]
    for words in ("", "--words"):
        assert len(scores.choose_prompts(evaluation.parse(f"alignment {words}".split()))[0]) == 553


@pytest.mark.parametrize("n", [1, 2, 7])
def test_few_questions(n, tmp_path, monkeypatch):
    """Kinds of scenes that don't occur among few are left out of the table."""
    monkeypatch.setattr(scores, "Pipeline", Oracle)
    table = run(tmp_path, "understanding", "--n", n)["table"]
    assert sum(row["n"] for name, row in table.items() if name.startswith("match")) == n


def test_upsampled_prompts_state_what_was_asked():
    """Objects, numbers and colours of an entry in an upsampled prompt; descriptions of its scenes always."""
    asked = entry("x", clause("star", 2), clause("circle", color="red"))
    for text, expected in {
            "a small red star on the left, a red circle at the top and a blue star below on grey": True,
            "two small stars and a red circle on grey": True, "a star and a red circle": False, "": False,
            "two stars and a blue circle": False, "a star and two red circles": False,
            "two stars, a red circle and a red circle": False}.items():
        assert scores.states_what_was_asked(asked, text) == expected, text
    rng, entries = default_rng(0), world.skill_prompts(60, 3)
    texts = [world.describe(scene_for(asked, rng)) for asked in entries]
    assert all(map(scores.states_what_was_asked, entries, texts))
    assert sum(map(scores.states_what_was_asked, entries, texts[1:] + texts[:1])) < 20


def test_understanding_command_compares_with_the_commonest_answer(tmp_path, monkeypatch):
    """Who always says yes scores the rate of yes; --write, read back: who knows all gets 100 %."""
    monkeypatch.setattr(scores, "Pipeline", Oracle)
    table = run(tmp_path, "understanding", "--n", 120)["table"]
    yes, ground = table["existence"], table["background"]
    assert yes["answer"] == "yes" and yes["score"] == yes["baseline"] > 0.3
    assert ground["score"] == table["caption, objects"]["score"] == 0 < ground["baseline"]
    asked = scores.draw_questions(1, 120)
    answers = [world.match_question(q.scene, default_rng((1, i)))[1] for i, q in enumerate(asked)]
    one, several = table["match, one object"], table["match, several"]
    assert one["n"] == sum(len(q.scene.objects) == 1 for q in asked) and one["n"] + several["n"] == 120
    assert one["score"] * one["n"] + several["score"] * several["n"] == pytest.approx(answers.count("yes"))
    file = tmp_path / "w.tsv"
    assert evaluation.main(f"understanding --write {file} --n 120 --out {tmp_path}".split()) == 0
    task, questions = read_questions(file)
    assert [q.kind for q in asked] == list(world.QUESTIONS) * 20
    for question, q in zip(questions, asked, strict=True):
        (image,) = question["images"]
        assert (np.asarray(load_image(io.BytesIO(image))) == render(q.scene)).all()
        assert question["question"] == q.question and q.answer == answer_anew(q.question, q.scene)
    table = tabulate(task, questions, [q.answer.capitalize() + "." for q in asked])
    assert list(table) == [*world.QUESTIONS, "overall"] and all(row["score"] == 1 for row in table.values())
    answers = [[q.answer for q in asked if q.kind == kind] for kind in world.QUESTIONS]
    commonest = sum(Counter(of_kind).most_common(1)[0][1] for of_kind in answers)
    assert table["overall"]["baseline"] == pytest.approx(commonest / 120)


def test_editing_command(monkeypatch, tmp_path):
    """Each kind of edit has its rate, beside that of the image as it was; only "again" leaves it right."""
    edits = {(e.instruction, render(e.before).tobytes()): e for e in scores.draw_edits(1, 10)}

    def images(self, prompts, seeds, images):    # who never removes anything
        chosen = [edits[prompt, image.tobytes()] for prompt, image in zip(prompts, images)]
        return to_pixels(e.before if e.kind == "remove" else e.after for e in chosen)
    monkeypatch.setattr(Oracle, "images", images)
    monkeypatch.setattr(scores, "Pipeline", Oracle)
    results = run(tmp_path, "editing", "--n", 10)
    for kind in scores.EDITS:
        assert (results[kind]["score"], results[kind]["unchanged"]) == (kind != "remove", kind == "again")
    assert load_image(tmp_path / "editing.png").width == 8 * 144 and len(results["images"]) == 10


def test_reconstruction_command(tiny_folder, tmp_path):
    """PSNR is that of Pipeline.reconstruct's images, with the scenes' numbers as seeds."""
    table = run(tmp_path, "reconstruction", "--ckpt", tiny_folder, "--n", 3)["table"]
    renders = np.stack([render(make_scene(1, i), 32) for i in range(3)])
    made = scores.Pipeline(tiny_folder).reconstruct(list(map(Image.fromarray, renders)), range(3))
    error = (made - torch.from_numpy(renders).permute(0, 3, 1, 2) / 255).square().mean((1, 2, 3))
    assert table["features and decoder"]["dB"] == pytest.approx(float(-10 * error.log10().mean()), rel=1e-4)
    assert table["VAE alone"]["n"] == 3 and load_image(tmp_path / "reconstruction.png").size == (96, 96)


def test_binding_of_the_shipped_model(tmp_path, capsys):
    """True captions fit better than another image's; without a DiT the condition alone is measured."""
    results = run(tmp_path, "binding", "--n", 6)
    assert 0 < results["moved"] < 1 and "| 0.15 |" in capsys.readouterr().out
    assert results["table"]["0.05"]["true"] < results["table"]["0.05"]["another's"]
    BLIP3o.from_pretrained(NANO, parts={"llm", "queries"}).save_pretrained(tmp_path / "bare")
    Tokenizer.from_pretrained(NANO).save(tmp_path / "bare")
    bare = run(tmp_path, "binding", "--ckpt", tmp_path / "bare", "--n", 6)
    assert bare["moved"] == pytest.approx(results["moved"], rel=1e-3) and "table" not in bare


def test_binding_measures_the_flow_matching_loss(tiny_folder, tmp_path, monkeypatch):
    """A DiT that is off by 0.1 under true captions and by 0.3 under all others: losses 0.01 and 0.09."""
    x1, x0 = (torch.randn(6, 16, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (5, 1))
    conditions = []

    def velocity(self, x, t, cond):
        assert torch.allclose(x, t.view(-1, 1, 1, 1) * (x1 - x0) + x0, atol=1e-6)    # x0 of --seed 1
        conditions.append(cond)
        return x1 - x0 + (0.1 if len(conditions) % 4 == 1 else 0.3)
    monkeypatch.setattr(scores, "encode_scenes", lambda pipe, scenes: x1)
    monkeypatch.setattr("dit.NextDiT.forward", velocity)
    table = run(tmp_path, "binding", "--ckpt", tiny_folder, "--n", 6)["table"]
    assert len(conditions) == 24
    for row in table.values():
        assert row["true"] == pytest.approx(0.01, rel=1e-3) and row["gain"] == pytest.approx(0.08, rel=1e-3)
    true, exchanged, another, none = conditions[:4]
    assert torch.equal(another, true.roll(1, 0)) and not none.any() and not torch.equal(true, exchanged)


# ---- The studies ------------------------------------------------------------------------------------------
def test_studies_train_what_they_say(monkeypatch):
    """Their queries are those of stage 0, frozen unless all is trained, or fresh ones that are trained."""
    for part in train.EvaClip, train.PixelDecoder:               # loaded once
        monkeypatch.setattr(part, "from_pretrained", cache(part.from_pretrained))
    made = {}
    taught = load_file(Path(NANO) / "model.safetensors")["model.latent_queries"].float()
    runs = [(study, *run) for study, spec in studies.STUDIES.items() for run in spec.get("runs", {}).items()]
    for study, name, own in runs:
        line = f"--device cpu --stage 1 --fresh --init {NANO} --eva {NANO} {own} "
        args = train.arguments((line + studies.STUDIES[study].get("flags", "")).split())
        model = train.build_stage(args).trained
        made.setdefault(study, []).append((args, model.config))
        is_fresh, queries = study in ("figure4", "queries"), model.latent_queries
        assert model.config.n_query == (64 if study == "figure4" or name == "64 queries" else 16)
        assert (queries.shape != taught.shape or not torch.equal(queries.detach(), taught)) == is_fresh
        assert queries.requires_grad == (is_fresh or args.joint > 0)
        assert model.config.shift == (float(name.split()[1]) if study == "shift" else 5)
    assert [train.design_of(config) for _, config in made["figure4"]] == ["clip-mse", "clip-fm", "vae-fm"]
    assert [config.dit.rope for _, config in made["rope"]] == ["2d", "3d"]
    assert [(c.dit.dim, c.dit.n_layers) for _, c in made["size"]] == [(64, 4), (128, 4), (192, 6)]
    assert made["size"][1][1].dit == made["rope"][1][1].dit          # the size of all studies is one
    assert [args.ema for args, _ in made["ema"]] == [0.999, 0]
    assert [args.joint for args, _ in made["figure5"]] == [0, 0.5]


def test_numbers_of_a_run_by_hand(tmp_path):
    """What a crash undid and was done again counts once; equal images of a prompt have no spread."""
    log = tmp_path / "log.jsonl"
    assert studies.read_log(tmp_path) == {}
    log.touch()
    assert studies.read_log(tmp_path) == {}
    rows = [{"step": 2, "samples": 20, "per_s": 10.0},
            {"step": 2, "_true@0.02": 0.5, "_shuffled@0.02": 0.75},
            {"step": 4, "samples": 40, "per_s": 999.0}, {"step": 4, "samples": 40, "per_s": 5.0},
            {"step": 4, "_true@0.02": 0.5, "_shuffled@0.02": 1.0, "_true@0.05": 0.25, "_shuffled@0.05": 0.5}]
    log.write_text("\n".join(map(json.dumps, rows)) + "\n")
    first = {"step": 2, "samples": 20, "seconds": 2.0, "gap, t = 0.02": 0.25}
    second = {"step": 4, "samples": 40, "seconds": 6.0, "gap, t = 0.02": 0.5, "gap, t = 0.05": 0.25}
    assert [studies.read_run(tmp_path, step) for step in (2, 4)] == [first, second]
    x = torch.randn(4, 3, 35)
    pairs = [(x[p, i] - x[p, j]).pow(2).mean().sqrt() for p in range(4) for i in range(3) for j in range(i)]
    assert studies.spread(x.flatten(0, 1), 3) == pytest.approx(float(sum(pairs)) / len(pairs), rel=1e-6)
    assert studies.spread(x[:, :1].expand(-1, 3, -1).flatten(0, 1), 3) == 0


LOG = {"step": 2, "samples": 20, "per_s": 10.0}
MEASURED = {"asked": {"n_prompts": 6, "images": 2, "seed": 0, "n": 12}, "numbers": {
    "alignment": 0, "colours": 1, "Frechet": 2.5, "feature spread": 1e-3}}


@pytest.mark.parametrize("name, content, sentence", [
    *(("log.jsonl", json.dumps(LOG | wrong), f"log.jsonl.*{next(iter(wrong))}") for wrong in (
        {"step": "2"}, {"step": None}, {"samples": []}, {"per_s": 0}, {"per_s": "x"}, {"per_s": True},
        {"_true@0.02": {}}, {"_shuffled@0.05": None})),
    ("log.jsonl", "[]", "no entries"), ("log.jsonl", '{"step": 3}', "lacks step 2: delete"),
    ("log.jsonl", json.dumps(LOG) + '\n{"st', "line 2 isn't valid JSON"), ("log.jsonl", "3", "no object"),
    ("log.jsonl", '{"step": 2, "per_s": NaN}', "line 1 isn't valid JSON"),
    *(("model-000002/measured.json", json.dumps(wrong), "measured.json") for wrong in (
        [], 3, MEASURED | {"numbers": 3}, MEASURED | {"numbers": {}}, MEASURED | {"numbers": None},
        MEASURED | {"numbers": MEASURED["numbers"] | {"colours": "x"}}, {"asked": MEASURED["asked"]})),
    ("model-000002/measured.json", "{", "measured.json isn't valid JSON"),
    ("command.json", "{}", "command.json must hold a list"),
    ("command.json", "[", "command.json isn't valid JSON"),
    ("command.json", "[3]", "holds a run of other settings")])
def test_what_a_study_reads_again(tmp_path, monkeypatch, name, content, sentence):
    """Logs, measurements and settings of an earlier start that are broken: one sentence that names them."""
    line = f"figure4 --quick --runs {tmp_path} --steps 2 --points 1".split()
    args, study = evaluation.parse(line), studies.STUDIES["figure4"]
    studies.fill_settings(args, study)
    trainer = studies.Trainer(args, study, tmp_path)
    monkeypatch.setattr(studies, "measure", lambda *_, **__: pytest.fail("it was measured again"))
    monkeypatch.setattr(studies.subprocess, "Popen", lambda *_, **__: pytest.fail("it was trained again"))
    (job, run), = list(trainer.jobs.items())[:1]
    (run / "model-000002").mkdir(parents=True)
    for file, text in (("log.jsonl", json.dumps(LOG)), ("model-000002/config.json", "{}"),
                       ("model-000002/measured.json", json.dumps(MEASURED)),
                       ("command.json", json.dumps(trainer.command(*job, run)))):
        (run / file).write_text(text)
    trainer.train(*job, run)
    assert trainer.measure_point(run, 2) == {"step": 2, "samples": 20, "seconds": 2.0, **MEASURED["numbers"]}
    (run / name).write_text(content)
    with pytest.raises(ValueError, match=sentence):
        trainer.train(*job, run)
        trainer.measure_point(run, 2)


def test_training_free_ablation_equals_images_made_by_hand(tiny_folder, tmp_path, monkeypatch, capsys):
    """Over Euler steps: the spread of the second seed's images of 8 steps, made once more."""
    assert studies.STUDIES["steps"]["values"] == (4, 8, 15, 30, 60)
    monkeypatch.setitem(studies.STUDIES["steps"], "values", (2, 8))
    line = ["ablation", "--what", "steps", "--ckpt", tiny_folder, "--quick", "--seeds", "2"]
    assert evaluation.main([*line, "--out", str(tmp_path)]) == 0
    folder = tmp_path / "ablation-steps-quick"
    (seeds,) = json.loads((folder / "results.json").read_text())["runs"].values()
    assert Image.open(folder / "figure.png").width == 2 * 560 and "true images" in capsys.readouterr().out
    assert [[row["steps"] for row in rows] for rows in seeds] == 2 * [[2, 8]]
    prompts, pipe = [asked["prompt"] for asked in world.skill_prompts(6, 1)], scores.Pipeline(tiny_folder)
    prompts = np.repeat(prompts, 2).tolist()
    images = scores.to_uint8(pipe.images(prompts, range(10 ** 6, 10 ** 6 + 12), steps=8, decoder_steps=2))
    images = np.float32(images).reshape(12, -1) / 255
    spread = np.sqrt(np.square(images[::2] - images[1::2]).mean(1)).mean()
    assert seeds[1][1]["pixel spread"] == pytest.approx(float(spread), rel=1e-4)
    points = [row for rows in seeds for row in rows]
    assert len({row["pixel spread"] for row in points}) == 4         # steps and seeds matter
    for row in points:
        assert 0 <= row["alignment"] <= 1 and row["Frechet"] > 0 and row["feature spread"] > 0


@pytest.mark.slow
def test_figure4_from_training_to_figure(tmp_path, capsys):
    """Train, measure, chart; what is done is kept, what was cut goes on to equal weights."""
    line = ["figure4", "--quick", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    folder, runs = tmp_path / "out" / "figure4-quick", tmp_path / "runs" / "figure4-quick"

    def figure4():
        assert evaluation.main(line) == 0
        return json.loads((folder / "results.json").read_text())
    first = figure4()
    assert list(first["runs"]) == ["CLIP + MSE", "CLIP + flow matching", "VAE + flow matching"]
    for name, (points,) in first["runs"].items():
        run_folder = runs / (name.lower().replace(" + ", "-").replace(" ", "-") + "-0")
        assert (folder / f"{run_folder.name}.jsonl").read_text() == (run_folder / "log.jsonl").read_text()
        assert [(point["step"], point["samples"]) for point in points] == [(2, 16), (4, 32)]
        for point in points:
            assert point.items() >= studies.read_run(run_folder, point["step"]).items()
            assert ("gap, t = 0.02" in point) == ("gap, t = 0.05" in point) == (name != "CLIP + MSE")
            assert point["seconds"] > 0 and point["Frechet"] > 0 and point["feature spread"] > 0
    assert first["true images"]["alignment"] == 1 and Image.open(folder / "figure.png").size == (1120, 760)
    cut, last = runs / "clip-mse-0", runs / "clip-mse-0" / "model-000004"
    weights, log = load_file(last / "model.safetensors"), run_folder / "log.jsonl"
    written = log.stat().st_mtime_ns
    shutil.rmtree(last)
    shutil.rmtree(cut / "step-000004")
    (cut / "latest").write_text("step-000002")
    second, again = figure4(), load_file(last / "model.safetensors")
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    assert log.stat().st_mtime_ns == written                         # of the last run, which was done
    assert second["runs"]["VAE + flow matching"] == first["runs"]["VAE + flow matching"]
    assert second["runs"]["CLIP + MSE"][0][1]["Frechet"] == first["runs"]["CLIP + MSE"][0][1]["Frechet"]
    capsys.readouterr()
    assert evaluation.main([*line, "--steps", "6"]) == 2 and "other settings" in capsys.readouterr().err
    assert evaluation.main([*line, "--runs", str(tmp_path / "b"), "--init", str(tmp_path)]) == 2
    assert "failed" in capsys.readouterr().err


# ==== tasks and stages ===================================================================================

CPU = torch.device("cpu")
TINY_EVA = EvaConfig(image_size=12, patch_size=4, width=24, layers=3, heads=3, mlp_hidden=40, n_query=9)


def build(*args):
    """(stage, its training samples, its held-out samples, args) of a command line of train.py."""
    args = train.arguments(["--device", "cpu", *map(str, args)])
    torch.manual_seed(args.seed)
    stage = train.build_stage(args)
    return stage, *train.open_samples(args, stage, CPU), args


def examples(task, n=60, size=16, **options):
    """[(Scene, Example)] of a WorldTask on the first n scenes."""
    source = World(0, size, **options)
    samples = data.Samples(source, task)
    return [(source[i]["scene"], samples[i]) for i in range(n)]


def noise(*shape, seed=0):
    """Unit normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- The world as a source --------------------------------------------------------------------------------
def test_world_is_a_source_without_an_end():
    """Item p at position p; a fraction of words, which the others don't move; at most so many objects."""
    plain, words = World(0, 16), World(0, 16, words=0.3)
    assert [plain.index(5), plain.index(5, 2, seed=9), plain.index(10 ** 9, 1)] == [5, 7, 1]
    assert len(plain) == 10 ** 9 and plain.name(7) == "scene 7 of world 0"
    scenes = [(plain[i]["scene"], words[i]["scene"]) for i in range(300)]
    assert all(a == b for a, b in scenes if b.word is None) and all(a.word is None for a, _ in scenes)
    assert 60 < sum(b.word is not None for _, b in scenes) < 120
    item = plain[3]
    assert item["scene"] == world.make_scene(0, 3)
    assert (item["image"] == world.render(item["scene"], 16)).all()
    assert World(1, 16)[3]["scene"] != item["scene"]
    assert max(len(World(0, 16, objects=2)[i]["scene"].objects) for i in range(100)) == 2
    assert isinstance(data.open_source(None, 32, 4), World) and data.open_source(None, 32, 4).size == 32


def test_samples_of_the_world_are_pure_functions():
    """A sample depends on seed and position alone; captions are long, short, or short with a probability."""
    first, again = (data.Samples(World(0, 32), WorldTask(long=True))[41] for _ in range(2))
    assert first.prompt == again.prompt and first.rng.random() == again.rng.random() and first.skipped == []
    assert world.make_scene(0, 41).background in first.prompt.lower()  # long captions name all
    for p in range(20):
        for short in (0, 1):
            rng = np.random.default_rng((0, p, 1))
            rng.random()
            expected = world.caption(world.make_scene(0, p), rng, not short)
            assert data.Samples(World(0, 16), WorldTask(short_caption=short))[p].prompt == expected
    short = [example.prompt for _, example in examples(WorldTask(long=False), 40)]
    long = [example.prompt for _, example in examples(WorldTask(long=True), 40)]
    assert sum(map(len, short)) < 0.7 * sum(map(len, long))


# ---- Tasks ------------------------------------------------------------------------------------------------
def test_generation_prompts_and_their_hard_negatives():
    """The target is the scene's image; prompts with two colours have themselves with these exchanged."""
    negatives = 0
    for scene, example in examples(WorldTask(hard_negatives=True)):
        assert (example.image == world.render(scene, 16)).all() and example.prompt_image is None
        assert example.hard_negative == world.swap_colours(example.prompt) and not example.turns
        negatives += example.hard_negative is not None
    assert 5 < negatives < 40
    assert all(e.hard_negative is None for _, e in examples(WorldTask(), 20))


def test_edits_show_one_image_and_ask_for_another():
    """reconstruct: the image is prompt and target. edit: the prompt holds the image as it is and the change;
    the target is the image after it. The others are captions as ever."""
    kinds = Counter()
    for scene, example in examples(WorldTask(reconstruct=0.2, edit=0.5), 200):
        shown = world.render(scene, 16)
        if example.prompt_image is None:
            kinds["caption"] += 1
            assert world.parse_caption(example.prompt) and (example.image == shown).all()
            continue
        kinds["reconstruct" if example.prompt == data.RECONSTRUCT else "edit"] += 1
        assert (example.prompt_image == shown).all()
        assert (example.image != shown).any() == (example.prompt != data.RECONSTRUCT)
    assert 20 < kinds["reconstruct"] < 60 and 70 < kinds["edit"] < 130 and 30 < kinds["caption"] < 90


def check_chimera(scene, example):
    """A chimera is only asked whether it shows a caption; it doesn't."""
    assert (example.turns_image != world.render(scene, 16)).any() and len(example.turns) == tasks.QUESTIONS
    assert all(question.startswith("Does this image show") for question, _ in example.turns)
    assert {answer for _, answer in example.turns} == {"no"}


def test_descriptions_are_asked_for_anywhere():
    """Half of the conversations are about an image: one turn is the description, at every place among the
    questions, of which half ask for a match. Chimeras are asked about only."""
    places, chimeras, plain = set(), 0, 0
    for scene, example in examples(WorldTask(converse=1), 160):
        if example.turns_image is None:
            continue
        questions = [question for question, _ in example.turns]
        if data.DESCRIBE not in questions:
            chimeras += 1
            check_chimera(scene, example)
            continue
        plain += 1
        assert (example.turns_image == world.render(scene, 16)).all()
        assert len(questions) == tasks.QUESTIONS + 1 and questions.count(data.DESCRIBE) == 1
        assert sum(question.startswith("Does this image show") for question in questions) == 2
        places.add(questions.index(data.DESCRIBE))
        assert example.turns[questions.index(data.DESCRIBE)][1] == world.describe(scene)
    assert places == set(range(tasks.QUESTIONS + 1)) and 60 < plain < 100 and 5 <= chimeras <= 30


def bag(text):
    """The objects of a caption in any order, without where they are."""
    places = {"left", "right", "above", "below", "top", "bottom", "middle"}
    return Counter(frozenset(words) - places for words in world.parse_caption(text))


def test_conversations_upsample_prompts():
    """The other half answer UPSAMPLE, to a caption or a paraphrase of it, with the description of the scene;
    two more prompts are of scenes never seen, some with a pair of colour and shape of no image."""
    verbatim, novel, n = 0, 0, 0
    for scene, example in examples(WorldTask(converse=1), 80):
        if example.turns_image is not None:
            continue
        n += 1
        assert len(example.turns) == 3
        assert all(question.startswith(data.UPSAMPLE[:-2]) for question, _ in example.turns)
        assert bag(example.turns[0][1]) == bag(world.describe(scene))
        prompt = example.turns[0][0][len(data.UPSAMPLE) - 2:]
        rng = np.random.default_rng(0)
        verbatim += prompt in {world.caption(scene, rng) for _ in range(300)}
        answers = " ".join(answer for _, answer in example.turns)
        novel += any(f"{colour} {shape}" in answers for colour, shape in world.HELD_OUT)
    assert 25 < n < 55 and 0 < verbatim < n and 0 < novel < n


def test_joint_training_mixes_conversations_in():
    """converse: that fraction of the samples are conversations, without a target; the others generate."""
    mixed = [example for _, example in examples(WorldTask(converse=0.3), 300)]
    assert 60 < sum(bool(e.turns) for e in mixed) < 120
    assert all((e.image is None) == bool(e.turns) and (e.prompt == "") == bool(e.turns) for e in mixed)


def test_query_supervision_has_the_prompts_targets():
    """A conversation comes with a prompt and the targets of what it names: captions, upsampled or in other
    words; images to generate again or with a change. Nothing may generate a chimera."""
    shape, kinds = (4, 128), Counter()
    for scene, example in examples(WorldTask(converse=1, queries=shape), 400):
        targets, shown = example.query_targets, world.render(scene, 16)
        assert example.turns and (targets is None or targets.shape == shape)
        if example.prompt_image is not None:
            kinds["reconstruct" if example.prompt == data.RECONSTRUCT else "edit"] += 1
            assert (example.prompt_image == shown).all()
            assert example.turns_image is None or (example.turns_image == shown).all()          # no chimera
            if example.prompt == data.RECONSTRUCT:
                expected = world.query_targets(world.parse_caption(world.describe(scene)), *shape)
                assert np.array_equal(targets, expected)
        elif world.parse_caption(example.prompt):
            exact = np.array_equal(targets, world.query_targets(world.parse_caption(example.prompt), *shape))
            kinds["caption" if exact else "paraphrase"] += 1
        assert (targets is None) <= (not world.parse_caption(example.prompt))
    assert 40 < kinds["reconstruct"] < 100 and 60 < kinds["edit"] < 140
    assert kinds["caption"] > 80 and 10 < kinds["paraphrase"] < 120
    assert all(e.query_targets is None for _, e in examples(WorldTask(converse=1), 20))


# ---- --world and who trains on what -----------------------------------------------------------------------
@pytest.mark.parametrize("given, expected", [
    ((None, "clip"), dict(objects=4, words=0.1, edit=0.0, upsample=None, query_supervision=0.0)),
    ((None, "0"), dict(words=0.3, edit=0.0, query_supervision=1.0)),
    ((None, "0", False, True, True), dict(query_supervision=0.0)),
    ((None, "1"), dict(words=0.0, edit=0.0, upsample=None)),
    ((None, "2"), dict(words=0.2, edit=0.0)), ((None, "2", False, True), dict(words=0.2, edit=0.2)),
    ((None, "2", True, True), dict(words=0.0, edit=0.2)),
    (("words=0.5,objects=2", "1"), dict(words=0.5, objects=2, edit=0.0)),
    (("edit=0.3,upsample=1,", "1"), dict(edit=0.3, upsample=1.0)),
    (("query_supervision=2", "0"), dict(query_supervision=2.0, objects=4))])
def test_options_of_the_world(given, expected):
    """Defaults by stage, and what is given instead. (Mistakes: see those of train.py.)"""
    options = tasks.parse_options(*given)
    assert set(options) == {"objects", "words", "edit", "upsample", "query_supervision"}
    assert {key: options[key] for key in expected} == expected and isinstance(options["objects"], int)


@pytest.mark.parametrize("spec, sentence", [
    ("things=2", "not 'things=2'"), ("words=many", "not 'words=many'"), ("32", "not '32'"),
    ("words", "not 'words'"), ("objects=0", "between 1 and 4"), ("objects=5", "between 1 and 4"),
    ("words=1", "fractions"),
    ("words=-0.1", "fractions"), ("edit=1.5", "fractions")])
def test_wrong_options_of_the_world(spec, sentence):
    """What is no option, or no value of one, is named."""
    with pytest.raises(ValueError, match="--world") as error:
        tasks.parse_options(spec, "1")
    assert sentence in str(error.value)


def test_open_world_gives_each_stage_its_task(tiny):
    """Fractions, sizes and lengths of captions by stage; probes are of another world, without conversations,
    edits and reconstructions unless the stage has nothing else, and with hard negatives."""
    wanted = {("clip",): dict(long=True, converse=0.0), ("vae",): dict(long=None),
              ("decoder",): dict(long=None),
              ("0",): dict(long=None, converse=1.0, queries=(4, 32)),
              ("0", "--world", "query_supervision=0"): dict(converse=1.0, queries=None),
              ("1", "--joint", 0.5, "--reconstruct", 0.1): dict(converse=0.5, reconstruct=0.1, edit=0.0),
              ("2", "--world", "objects=2,words=0.5"): dict(long=False, edit=0.2, reconstruct=0.1),
              ("2", "--reconstruct", 0, "--world", "edit=0"): dict(edit=0.0, reconstruct=0.0)}
    for line, fields in wanted.items():
        stage, training, held_out, args = build("--stage", *line, "--seed", 3)
        assert {name: getattr(training.task, name) for name in fields} == fields, line
        assert (training.seed, training.source.seed) == (3, 3) and training.source.size == stage.size == 32
        assert held_out.seed == held_out.source.seed == tasks.HELD_OUT_SEED != 3
        probe = replace(training.task, converse=float(line[0] == "0"), reconstruct=0.0, edit=0.0,
                        hard_negatives=True)
        assert held_out.task == probe and not training.task.hard_negatives
        assert args.prompt_images == bool(fields.get("edit") or fields.get("reconstruct"))
    stage, training, _, _ = build("--stage", "2", "--world", "objects=2,words=0.5")
    assert (training.source.objects, training.source.words) == (2, 0.5)


def test_prompts_are_upsampled_by_models_that_learnt_it(tiny, tmp_path):
    """Stage 0 of the world teaches it, and config.json says so to stage 2, which then trains on upsampled
    captions, and to sample.py; --world upsample= says otherwise. Other data don't teach it."""
    stage, *_ = build("--stage", "0", "--init", tiny)
    assert stage.trained.config.upsample_prompts
    stage.export(tmp_path)
    eva = ("--init", tmp_path, "--eva", tiny)
    generation, training, _, _ = build("--stage", "1", *eva, "--fresh")
    generation.export(tmp_path)
    assert BLIP3o.from_pretrained(tmp_path, "meta").config.upsample_prompts and not training.task.upsample
    assert sample.Pipeline(tmp_path).sampling["upsample"]
    assert build("--stage", "2", *eva)[1].task.upsample
    assert not build("--stage", "2", *eva, "--world", "upsample=0")[1].task.upsample
    assert build("--stage", "1", *eva, "--world", "upsample=1")[1].task.upsample
    assert not build("--stage", "2", "--init", tiny)[1].task.upsample
    for i in range(2):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("an image")
    assert not build("--stage", "0", "--init", tiny, "--data", tmp_path)[0].trained.config.upsample_prompts
    for scene, example in examples(WorldTask(upsample=True), 20):
        assert bag(example.prompt) == bag(world.describe(scene))


def test_images_in_prompts_are_seen_but_teach_nothing(tiny):
    """--reconstruct: the official prompt with the image inside, whose condition depends on the image; the
    frozen vision tower gets no gradient."""
    line = ("--stage", "1", "--init", tiny, "--reconstruct", 0.5, "--world", "edit=0.3")
    stage, training, _, _ = build(*line)
    batch = stage.collate([training[i] for i in range(16)])
    prompts = batch["prompts"]
    has_image = (prompts["ids"] == stage.trained.config.image_token_id).any(1)
    assert 0 < has_image.sum() < 16 and len(prompts["grid"]) == has_image.sum()
    shown = [example.prompt_image for example in map(training.__getitem__, range(16))]
    assert [image is not None for image in shown] == has_image.tolist()
    for i, ids in enumerate(prompts["ids"]):
        text = stage.tokenizer.bpe.decode(ids[prompts["mask"][i]].tolist(), skip_special_tokens=False)
        assert (f"<|vision_end|>\n{training[i].prompt}<|im_end|>" in text) == bool(has_image[i])
    one, other = (stage.condition({**prompts, "patches": patches})
                  for patches in (prompts["patches"], prompts["patches"].flip(0)))
    assert [bool((a != b).any()) for a, b in zip(one, other)] == has_image.tolist()
    stage(batch)["flow"].backward()
    assert all(p.grad is None for p in stage.trained.visual.parameters())
    assert stage.trained.latent_queries.grad.abs().sum() > 0


# ---- Stage 0 ----------------------------------------------------------------------------------------------
def test_query_supervision_is_the_distance_of_the_states(tiny):
    """The loss "queries" is the weighted distance of each query's state from its target, over the prompts
    that have some; gradients reach the queries, every layer of the language model and the vision tower."""
    stage, training, _, _ = build("--stage", "0", "--init", tiny, "--world", "query_supervision=2")
    some = [training[i] for i in range(8)]
    some[2].prompt, some[2].prompt_image, some[2].query_targets = "a photograph of Paris", None, None
    losses, distances, vision = stage(stage.collate(some)), [], 0
    for example in some:
        prompts = stage.collate.prompts([example])
        state = stage.trained.condition(prompts["ids"], prompts["mask"], prompts["patches"], prompts["grid"])
        vision += example.prompt_image is not None
        if example.query_targets is not None:
            distances.append(((state[0].detach().numpy() - example.query_targets) ** 2).mean())
    assert len(distances) == 7 and 0 < vision < 8
    assert losses["queries"].item() == pytest.approx(2 * np.mean(distances), rel=1e-4)
    losses["queries"].backward()
    assert stage.trained.latent_queries.grad.abs().sum() > 0 and stage.trained.config.queries_supervised
    assert all(layer.self_attn.q_proj.weight.grad.abs().sum() > 0 for layer in stage.trained.llm.layers)
    assert stage.trained.visual.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    nothing = stage(stage.collate(some[2:3]))["queries"]
    assert nothing == 0 and nothing.requires_grad                    # all processes have the same losses


def test_stage_0_without_query_supervision(tiny):
    """Weight 0: conversations alone, the queries stay as they are, and config.json says so."""
    stage, training, _, _ = build("--stage", "0", "--init", tiny, "--world", "query_supervision=0")
    losses = stage(stage.collate([training[i] for i in range(4)]))
    assert set(losses) == {"text"} and not stage.trained.latent_queries.requires_grad
    assert not stage.trained.config.queries_supervised


# ---- Stage clip -------------------------------------------------------------------------------------------
@pytest.fixture
def clip():
    """A CLIP of random weights, 12 px, 9 features of 24 numbers."""
    return randomise(pretrain.CLIP(TINY_EVA, 20, text_width=32, embed_dim=8))


def test_clip_stage_weighs_its_losses_and_probes(tiny):
    """What is minimised are CLIP's losses with fixed weights; the probe tells images by captions."""
    stage, training, held_out, _ = build("--stage", "clip")
    batch = stage.collate([training[i] for i in range(6)])
    assert 0.2 < batch["noise"].std() < 0.4 and batch["noise"].shape == (6, 64, 16)
    losses = stage(batch)
    plain = stage.trained(batch["pixels"], batch["text_ids"], batch["text_mask"], batch["noise"])
    weights = {"pixels": 3, "places": 1, "contrastive": 0.3, "scale": 0.3}
    assert all(gap(losses[name], weight * plain[name]) < 1e-6 for name, weight in weights.items())
    batch = stage.collate([held_out[i] for i in range(6)])
    with torch.no_grad():
        numbers, (decoded, shown) = stage.probe(batch), stage.preview(batch)
    assert decoded.shape == shown.shape == (6, 3, 32, 32) and decoded.min() >= 0 and decoded.max() <= 1
    assert gap(numbers["_psnr"], -10 * (decoded - shown).square().mean().log10()) < 1e-6
    assert numbers["_top1"] * 6 == pytest.approx(round(float(numbers["_top1"]) * 6), abs=1e-5)
    stage.trained.place_head.weight.data.zero_()
    stage.trained.place_head.bias.data.zero_()
    assert gap(stage.probe(batch)["_place_error"], stage.trained.places.square().mean()) < 1e-5


# ---- Stage vae --------------------------------------------------------------------------------------------
def test_vae_stage_calibrates_its_latents(tiny):
    """Losses by hand; the probe makes latents of unit variance, and what they decode to stays."""
    stage, training, _, _ = build("--stage", "vae")
    batch = stage.collate([training[i] for i in range(6)])
    target = data.to_signed(batch["pixels"])
    rebuilt, kl = stage.trained(target, noise=batch["noise"])
    losses = stage(batch)
    assert gap(losses["l1"], (rebuilt - target).abs().mean()) < 1e-6
    assert gap(losses["mse"], F.mse_loss(rebuilt, target)) < 1e-6 and gap(losses["kl"], 1e-6 * kl) < 1e-9
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in stage.trained.parameters())
    with torch.no_grad():
        before = stage.trained.decode(stage.trained.encode(target))
        numbers = stage.probe(batch)
        latents = stage.trained.encode(target)
        assert abs(float(latents.std()) - 1) < 1e-4 and stage.trained.config.scaling_factor != 1
        assert gap(stage.trained.decode(latents), before) < 1e-5
    assert numbers["_psnr"] == pytest.approx(-10 * math.log10(float((before / 2 - target / 2).clamp(-1, 1)
                                                              .square().mean())), abs=1.0)


# ---- The tokenizer ----------------------------------------------------------------------------------------
def test_tokenizer_learns_the_worlds_words():
    """At most so many entries, SPECIAL last; frequent words of the world are one or two tokens."""
    tokenizer = pretrain.train_tokenizer(world.world_texts(150), 400)
    words = "a large red circle on the left"
    assert 330 < tokenizer.vocab_size <= 400 and len(tokenizer.encode(words)) < len(words) / 2
    assert tokenizer.decode(tokenizer.encode(words)) == words
    assert tokenizer.special["<image>"] == tokenizer.vocab_size - 1


# ==== pretrain ===========================================================================================

NANO_EVA = replace(TINY_DECODER["clip"], n_query=16)  # 4 x 4 features of 16 numbers, each of 8 x 8 pixels


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_train_tokenizer():
    """At most as many entries as asked for, SPECIAL last, words of the texts learnt, any text comes back."""
    t, words = train_tokenizer(world.world_texts(150), 400), "a large red circle on the left"
    n = t.vocab_size
    assert n <= 400 and [t.special[token] for token in data.SPECIAL] == list(range(n - len(data.SPECIAL), n))
    assert len(t.encode(words)) < len(words) / 2
    for text in ("", "\n\n \t", "naïve １２３ 42", "a\r\nb", "🙂👩\u200d🚀", "a [IMG] <|im_end|>"):
        assert t.decode(t.encode(text)) == text and not set(t.encode(text)) & set(t.special.values())
    assert t.encode("e\u0301") == t.encode("é")  # NFC
    control = Tokenizers.from_str(t.bpe.to_str())
    control.encode_special_tokens = False
    for token in data.SPECIAL:  # of any text, the reference reads it as one token
        assert control.encode(f"a{token}", add_special_tokens=False).ids[-1] == t.special[token]


def test_tokenizer_has_qwens_form():
    """The same texts give the same tokenizer, and it splits words by Qwen's pattern before it merges."""
    a, b = tiny_tokenizer(), tiny_tokenizer()
    assert a.bpe.to_str() == b.bpe.to_str() and a.vocab_size == 330
    splits = [piece for piece, _ in a.bpe.pre_tokenizer.pre_tokenize_str("I'LL take 42  cats\n")]
    assert splits == ["I", "'LL", "Ġtake", "Ġ", "4", "2", "Ġ", "Ġcats", "Ċ"]


@torch.no_grad()
def test_clip_losses():
    """InfoNCE, the image's own blocks, places, moments; texts ignore padding, only heads see the noise."""
    clip, pixels = randomise(CLIP(NANO_EVA, 20, text_width=32, embed_dim=8)), randn(4, 3, 32, 32)
    ids, noise = torch.arange(24).view(4, 6) % 20, randn(4, 16, 16, seed=2)
    mask = torch.arange(6) < torch.tensor([6, 3, 2, 5])[:, None]
    losses, clean = clip(pixels, ids, mask, noise), clip(pixels, ids, mask, 0 * noise)
    a, b, z = clip.encode_image(pixels), clip.encode_text(ids, mask), clip.visual.encode(pixels)
    assert a.shape == b.shape == (4, 8) and gap(a.norm(dim=-1), torch.ones(4)) < 1e-5
    p = (a @ b.T * clip.logit_scale.exp()).double().exp()
    by_hand = -sum(math.log(p[i, i] / p[i].sum()) + math.log(p[i, i] / p[:, i].sum()) for i in range(4)) / 8
    assert abs(float(losses["contrastive"]) - by_hand) < 1e-5
    blocks = image_blocks(pixels, 4)
    assert torch.equal(blocks[1, 6], pixels[1, :, 8:16, 16:24].flatten())  # 6: row 1, column 2
    assert gap(losses["pixels"], ((clip.pixel_head(z + noise) - blocks) ** 2).mean()) < 1e-5
    assert len(torch.unique(clip.places, dim=0)) == 16  # every place has a code of its own
    assert gap(losses["places"], ((clip.place_head(z + noise) - clip.places) ** 2).mean()) < 1e-5
    want = (z.mean((0, 1)) ** 2 + (z.reshape(-1, 16).std(0) - 1) ** 2).mean()
    assert gap(losses["scale"], want) < 1e-4
    assert {name for name in clean if clean[name] != losses[name]} == {"pixels", "places"}
    alone = clip.encode_text(ids[1:2, :3], mask[1:2, :3])
    assert gap(b[1:2], alone) < 1e-6
    assert gap(clip.encode_text(ids, torch.ones_like(mask))[1:2], alone) > 1e-2  # a bug: padding counts
    long = torch.zeros(1, 200, dtype=torch.long)
    with pytest.raises(ValueError, match="context of 128"):
        clip.encode_text(long, long == 0)
    with pytest.raises(ValueError, match="does not divide into 3 x 3"):
        CLIP(replace(NANO_EVA, n_query=9), 20)


def test_clip_learns():
    """60 steps on 8 pairs bring all losses down."""
    torch.manual_seed(0)
    clip = CLIP(NANO_EVA, 20, text_width=32, embed_dim=8)
    pixels, ids, mask = randn(8, 3, 32, 32), torch.randint(0, 20, (8, 4)), torch.ones(8, 4, dtype=torch.bool)
    optimizer, history = torch.optim.AdamW(clip.parameters(), 3e-3), []
    for _ in range(60):
        losses = clip(pixels, ids, mask, 0.3 * torch.randn(8, 16, 16))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({name: float(loss.detach()) for name, loss in losses.items()})
    first, last = history[0], history[-1]
    assert last["contrastive"] < 0.3 < first["contrastive"]
    for name, fraction in (("pixels", 0.9), ("places", 0.5), ("scale", 0.5)):
        assert last[name] < fraction * first[name], (name, first, last)


@torch.no_grad()
def test_vae_calibrate(tmp_path, monkeypatch):
    """Latents get unit variance, what they decode to stays, and the exported folder remembers the factor."""
    monkeypatch.setitem(PRESETS, "nano", TINY_DECODER)
    torch.manual_seed(0)
    stage, pixels = VaeStage(SimpleNamespace(init=None, fresh=False)), randn(4, 3, 32, 32)
    vae = stage.trained
    before = vae.decode(vae.encode(pixels))
    assert abs(float(vae.encode(pixels).std()) - 1) > 0.1
    stage.calibrate(pixels)
    assert abs(float(vae.encode(pixels).std()) - 1) < 1e-4
    assert gap(vae.decode(vae.encode(pixels)), before) < 1e-5
    assert vae.config == replace(TINY_DECODER["vae"], scaling_factor=vae.config.scaling_factor)
    stage.export(tmp_path)
    again = VaeStage(SimpleNamespace(init=tmp_path, fresh=False))  # goes on where the folder stopped
    assert VAE.from_pretrained(tmp_path).config == again.trained.config == vae.config
    assert pretrain.VaeCollate(32, vae).shape == (4, 16, 16)
