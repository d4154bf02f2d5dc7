"""A scene becomes an Example, the form in which train.py takes any data.

    generate        the prompt is the caption of the image, upsampled or not
    reconstruct     the prompt is the image itself
    edit            the prompt is an image and an instruction, the target the image after the change
    converse        questions about an image, descriptions of it; prompts to upsample; requests for images

`World` is the source, `WorldTask` the task, with the signatures of data.Shards and data.CaptionTask.
"""
from dataclasses import dataclass, replace

import numpy as np

import data
from checkpoint import Interval, number, settings
from data import Example
from miniature import world

HELD_OUT_SEED = 10 ** 6  # of the world that probes and previews see, and of their captions
TURNS = 8            # of a conversation about one image: it is read once, so more cost little
CHAT_TURNS = 4       # of a conversation in which images are asked for
CHIMERAS = 0.08      # fraction of these with an object that is neither this nor that
UPSAMPLED = 0.75     # fraction of upsampled captions where the language model upsamples prompts
# What is asked about an image; relations need more practice than the rest, and few images have one.
QUESTION_KINDS = (*world.QUESTIONS, "position", "position", "position")

# `--world`: its options and their defaults; None: the stage's own, see `parse_options`.
OPTIONS = {
    "objects": 4,                 # the most objects in an image: 1 is learnt in minutes
    "edit": None,                 # stages 1, 2: fraction of prompts that are an image and a change of it
    "upsample": None,             # stages 1, 2: fraction of captions and changes that are upsampled
    "captions": 0.0,              # stage 0: fraction of the conversations that are a description alone
}
KINDS = {
    "objects": (number(int, Interval(1, 4)), "objects must lie between 1 and 4, the world's most"),
    "edit": (number(float, Interval(0, below=1)), "edit is a fraction of the samples, from 0 to below 1"),
    **{name: (number(float, Interval(0, 1)), f"{name} is a fraction of the samples, from 0 to 1")
       for name in ("upsample", "captions")},
}
STAGES = {"edit": ("1", "2"), "upsample": ("1", "2"), "captions": ("0",)}             # the others: all


def parse_options(spec, stage, has_vision=False):
    """`--world edit=0.2,objects=2` -> {option: number} with the defaults of a stage.

    has_vision: the model has a vision tower, so stage 2 learns to edit.
    Raises ValueError for what is no option, no value of one, or has no effect in this stage.
    """
    given = settings("--world", spec, KINDS)
    for name, stages in STAGES.items():
        if given.get(name) and stage not in stages:
            raise ValueError(f"--world {name} belongs to stage{'s' * (len(stages) > 1)} "
                             f"{' and '.join(stages)}, not to stage {stage}")
    return {**OPTIONS, "edit": 0.25 * (has_vision and stage == "2"), **given}


class World:
    """The synthetic world as a source: item i is scene i, with at most `objects` objects.

    seed 0 is for training, other seeds are for evaluation. size: side S of the images.
    """

    def __init__(self, seed=0, size=64, objects=4, length=10 ** 9):
        self.seed, self.size, self.objects, self.length = seed, size, objects, length

    def __len__(self):
        return self.length

    def index(self, position, ahead=0, seed=0, held_out=False):
        """The item at a position of the run: the world is endless and needs no order but its own."""
        return (position + ahead) % self.length

    def name(self, i):
        """What a person finds item i by."""
        return f"scene {i} of world {self.seed}"

    def __getitem__(self, i):
        """{"image": uint8 (S, S, 3), "scene": Scene}."""
        scene = world.make_scene(self.seed, i, most=self.objects)
        return {"image": world.render(scene, self.size), "scene": scene}


@dataclass
class WorldTask:
    """Turns an item of World into an Example.

    long: long captions, short ones (False), or a mixture (None). short_caption: the probability of short
    ones, instead. converse, reconstruct, edit: fractions of the samples, as in data.CaptionTask. upsample:
    fraction of the captions and changes that are upsampled; here the image stays beside such a change.
    captions: fraction of the conversations that are a description alone. hard_negatives: give each prompt
    with two colours also with these exchanged, for probes.
    """
    long: bool | None = None
    short_caption: float | None = None
    converse: float = 0.0
    reconstruct: float = 0.0
    edit: float = 0.0
    upsample: float = 0.0
    captions: float = 0.0
    hard_negatives: bool = False

    def __call__(self, item, rng):
        """{"image", "scene"} -> Example."""
        scene, image = item["scene"], item["image"]
        text = self.caption(scene, rng)
        if self.converse == 1 or self.converse and rng.random() < self.converse:
            return self.conversation(scene, image, text, rng)
        choice = rng.random() if self.reconstruct or self.edit else 1.0
        upsample = self.upsample > 0 and rng.random() < self.upsample
        if choice < self.reconstruct + self.edit:
            instruction, after = data.RECONSTRUCT, scene
            if choice >= self.reconstruct:
                instruction, after = world.edit(scene, rng)
            prompt = world.describe_edit(scene, after) if upsample else instruction
            return Example(rng, world.render(after, len(image)), prompt=prompt, prompt_image=image)
        if upsample:
            text = world.upsample_caption(scene, text, world.parse_caption(text))
        hard_negative = world.swap(text, world.COLOURS) if self.hard_negatives else None
        return Example(rng, image, prompt=text, hard_negative=hard_negative)

    def caption(self, scene, rng):
        """A caption of the wanted length."""
        if self.short_caption is None:
            return world.caption(scene, rng, self.long)
        return world.caption(scene, rng, long=not rng.random() < self.short_caption)

    def conversation(self, scene, image, text, rng):
        """About an image, about texts, or about images that are asked for; or, before all that can be
        learnt, no more than the description of an image.

        Texts are prompts to upsample (data.UPSAMPLE): whatever a caption leaves open is decided, which
        sample.Pipeline.upsample_prompts will ask for before it generates. That makes the language model bind
        each colour to its object while it reads: predicting captions alone never needs this, and the frozen
        states will have to tell the DiT who is red.
        """
        if self.captions and rng.random() < self.captions:
            return Example(rng, turns=[(data.DESCRIBE, world.describe(scene))], turns_images=[image])
        kind = rng.random()
        if kind < 0.5:
            return talk_about(scene, image, rng)
        if kind > 0.85:
            return chat(scene, image, rng)
        turns = []
        for caption, described in [(text, scene)] + [read_only_scene(rng) for _ in range(2)]:
            prompt, parsed = parse_or_paraphrase(caption, rng, rng.random() < 0.6)
            turns.append((data.UPSAMPLE.format(prompt), world.upsample_caption(described, caption, parsed)))
        return Example(rng, turns=turns)


def parse_or_paraphrase(text, rng, paraphrase):
    """(the caption or a paraphrase of it, what world.parse_caption finds in it)."""
    return world.paraphrase(text, rng) if paraphrase else (text, world.parse_caption(text))


def read_only_scene(rng):
    """(caption, scene) to read, not to see: a fifth has a pair of colour and shape that no image shows."""
    novel = rng.random() < 0.2
    if rng.random() < 0.15:
        return world.group_caption(rng, novel)
    scene = world.make_scene(0, int(rng.integers(10 ** 9)), novel)
    return world.caption(scene, rng), scene


def talk_about(scene, image, rng):
    """A conversation of TURNS about an image: questions, whether it matches a caption, what a change would
    make of it, and somewhere among them a description of everything; or whether a chimera matches the scene
    that it was made of (it doesn't).
    """
    if rng.random() < CHIMERAS:
        image = world.chimera(scene, rng, len(image))
        turns = [(world.match_question(scene, rng)[0], "no") for _ in range(TURNS)]
        return Example(rng, turns=turns, turns_images=[image])
    turns = [(data.DESCRIBE, world.describe(scene)), upsample_edit(scene, rng)]
    while len(turns) < TURNS:
        if rng.random() < 0.35:
            turns.append(world.match_question(scene, rng))
        else:
            turns.append(world.ask(scene, rng, QUESTION_KINDS, paraphrase=rng.random() < 0.5))
    return Example(rng, turns=[turns[i] for i in rng.permutation(TURNS)], turns_images=[image])


def upsample_edit(scene, rng):
    """(a change of the scene's image to describe the result of, the description)."""
    if rng.random() < 0.1:
        return data.UPSAMPLE_EDIT.format(data.RECONSTRUCT), world.describe(scene)
    instruction, after = world.edit(scene, rng)
    return data.UPSAMPLE_EDIT.format(instruction), world.describe_edit(scene, after)


def chat(scene, image, rng):
    """A conversation of CHAT_TURNS as people have it: requests for images and changes of the last one, which
    an assistant answers with data.IMG and data.EDIT, questions about it, other talk, and requests that it
    has to decline. Three in ten begin with an image. Generated images stand in the turns after them.
    """
    shown, current = (image, scene) if rng.random() < 0.3 else (None, None)
    turns, images = [], []
    for _ in range(CHAT_TURNS):
        images.append(shown)
        kind, shown = rng.random(), None
        if kind < 0.12:
            turn = world.small_talk(rng)
        elif kind < 0.3:
            turn = world.outside_prompt(rng), world.OUTSIDE
        elif kind < 0.4 or (kind < 0.7 and current):
            about, paraphrase = current or scene, rng.random() < 0.5
            question, answer = world.ask(about, rng, QUESTION_KINDS, paraphrase)
            turn = question, answer if current else world.NO_IMAGE
        else:
            if current and kind < 0.9:
                instruction, current = world.edit(current, rng)
                turn = instruction, data.EDIT
            else:
                current = world.make_scene(0, int(rng.integers(10 ** 9)))
                turn = parse_or_paraphrase(world.caption(current, rng), rng, rng.random() < 0.7)[0], data.IMG
            shown = world.render(current, len(image))
        turns.append(turn)
    return Example(rng, turns=turns, turns_images=images)


def world_texts(n):
    """What the tokenizer learns from: the messages of n conversations, as many prompts to generate."""
    source, task = World(), WorldTask(converse=1.0)
    for i in range(n):
        item, rng = source[i], np.random.default_rng(i)
        for user, assistant in task(item, rng).turns:
            yield from (f"user\n{user}", f"assistant\n{assistant}")
        prompt = data.GENERATE.format(task.caption(item["scene"], rng))
        yield from (f"system\n{data.SYSTEM}", f"user\n{prompt}")


def open_world(args, stage):
    """(training samples, held-out samples) of a stage, from worlds that share no scene."""
    options, config = args.world, getattr(stage.trained, "config", None)
    upsample = options["upsample"]
    if upsample is None:
        upsample = UPSAMPLED * (args.stage in ("1", "2") and config.upsample_prompts)
    task = WorldTask(stage.long_captions, args.short_caption, stage.converse, args.reconstruct,
                     options["edit"], upsample, options["captions"])
    if stage.converse and options["captions"] < 1:                   # the conversations teach it
        config.upsample_prompts = config.chat_images = True
    training, unseen = (World(seed, stage.size, options["objects"])
                        for seed in (args.seed, HELD_OUT_SEED))
    probe = replace(task, converse=float(task.converse == 1), reconstruct=0.0, edit=0.0, hard_negatives=True)
    return data.Samples(training, task, args.seed), data.Samples(unseen, probe, HELD_OUT_SEED)
