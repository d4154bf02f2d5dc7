"""A scene becomes an Example, the form in which train.py takes any data.

    generate        the prompt is the caption of the image, upsampled or not
    reconstruct     the prompt is the image itself
    edit            the prompt is an image and an instruction, the target the image after the change
    converse        questions about the image, descriptions of it; prompts to upsample
    query targets   what the queries' states must encode of a prompt: only in a stage 0 from random weights

`World` is the source, `WorldTask` the task, with the signatures of data.Shards and data.CaptionTask.
"""
from dataclasses import dataclass, replace

import numpy as np

import data
from checkpoint import Interval, number
from data import Example
from miniature import world

HELD_OUT_SEED = 10 ** 6  # of the world that probes and previews see, and of their captions
QUESTIONS = 4  # in one conversation: the prompt is read once, so more cost little
CHIMERAS = 0.2  # fraction of images with an object that is neither this nor that

# `--world`: its options and their defaults; None: the stage's own, see `parse_options`.
OPTIONS = {
    "objects": 4,                 # the most objects in an image: 1 is learnt in minutes
    "words": None,                # fraction of images that show a word
    "edit": None,                 # stages 1, 2: fraction of prompts that are an image and a change of it
    "upsample": None,             # stages 1, 2: train on upsampled captions? 0 or 1
    "query_supervision": None,    # stage 0: weight of the loss between the queries' states and their targets
}
WORDS = {"clip": 0.1, "vae": 0.1, "decoder": 0.1, "0": 0.3, "1": 0.0, "2": 0.2}


SHARE = number(float, Interval(0, below=1)), "words and edit are fractions of the samples, from 0 to below 1"
KINDS = {
    "objects": (number(int, Interval(1, 4)), "objects must lie between 1 and 4, the world's most"),
    "words": SHARE, "edit": SHARE,
    "upsample": (number(int, Interval(0, 1)), "upsample is 0 or 1"),
    "query_supervision": (number(float, Interval(0, 1e6)), "query_supervision is a weight from 0 to 1e6"),
}
STAGES = {"edit": ("1", "2"), "upsample": ("1", "2"), "query_supervision": ("0",)}   # the others: all


def parse_options(spec, stage, paper=False, has_vision=False, joint=False):
    """`--world words=0.2,objects=2` -> {option: number} with the defaults of a stage.

    has_vision: the model has a vision tower, so stage 2 learns to edit. joint: conversations are mixed in.
    Raises ValueError for what is no option, no value of one, or has no effect in this stage.
    """
    from train import settings  # which imports this module when it runs
    given = settings("--world", spec, KINDS)
    for name, stages in STAGES.items():
        if given.get(name) and stage not in stages:
            raise ValueError(f"--world {name} belongs to stage{'s' * (len(stages) > 1)} "
                             f"{' and '.join(stages)}, not to stage {stage}")
    return {**OPTIONS, "words": 0.0 if paper else WORDS[stage],
            "edit": 0.2 * (has_vision and stage == "2"),
            "query_supervision": float(stage == "0" and not joint), **given}


class World:
    """The synthetic world as a source: item i is scene i, with at most `objects` objects, or a word in a
    fraction `words`.

    seed 0 is for training, other seeds are for evaluation. size: side S of the images.
    """

    def __init__(self, seed=0, size=64, objects=4, words=0.0, length=10 ** 9):
        self.seed, self.size, self.objects, self.words, self.length = seed, size, objects, words, length

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
        has_word = self.words and np.random.default_rng((self.seed, i, 4)).random() < self.words
        if has_word:
            scene = world.make_word(self.seed, i)
        else:
            scene = world.make_scene(self.seed, i, most=self.objects)
        return {"image": world.render(scene, self.size), "scene": scene}


@dataclass
class WorldTask:
    """Turns an item of World into an Example.

    long: long captions, short ones (False), or a mixture (None). short_caption: the probability of short
    ones, instead. converse, reconstruct, edit: fractions of the samples, as in data.CaptionTask. upsample:
    prompts are upsampled captions. queries: (n_query, D), the shape of the query targets, where there are to
    be any. hard_negatives: give each prompt with two colours also with these exchanged, for probes.
    """
    long: bool | None = None
    short_caption: float | None = None
    converse: float = 0.0
    reconstruct: float = 0.0
    edit: float = 0.0
    upsample: bool = False
    queries: tuple | None = None
    hard_negatives: bool = False

    def __call__(self, item, rng):
        """{"image", "scene"} -> Example."""
        scene, image = item["scene"], item["image"]
        text = self.caption(scene, rng)
        if self.converse == 1 or self.converse and rng.random() < self.converse:
            example = self.conversation(scene, image, text, rng)
            return self.supervise_queries(example, scene, image, text) if self.queries else example
        choice = rng.random() if self.reconstruct or self.edit else 1.0
        if choice < self.reconstruct:
            return Example(rng, image, prompt=data.RECONSTRUCT, prompt_image=image)
        if choice < self.reconstruct + self.edit:
            instruction, after = world.edit(scene, rng)
            return Example(rng, world.render(after, len(image)), prompt=instruction, prompt_image=image)
        if self.upsample:
            text = world.upsample_caption(scene, text, world.parse_caption(text))
        hard_negative = world.swap_colours(text) if self.hard_negatives else None
        return Example(rng, image, prompt=text, hard_negative=hard_negative)

    def caption(self, scene, rng):
        """A caption of the wanted length."""
        if self.short_caption is None:
            return world.caption(scene, rng, self.long)
        return world.caption(scene, rng, long=not rng.random() < self.short_caption)

    def conversation(self, scene, image, text, rng):
        """Half of the conversations are about an image: questions, whether it matches a caption, and
        somewhere among them a description of everything; or whether a chimera matches the scene that it was
        made of (it doesn't).

        The other half upsample prompts (data.UPSAMPLE): whatever a caption leaves open is decided, which
        sample.Pipeline.upsample_prompts will ask for before it generates. That makes the language model bind
        each colour to its object while it reads: predicting captions alone never needs this, and the frozen
        states will have to tell the DiT who is red.
        """
        if rng.random() < 0.5:
            if scene.objects and rng.random() < CHIMERAS:
                image = world.chimera(scene, rng, len(image))
                turns = [(world.match_question(scene, rng)[0], "no") for _ in range(QUESTIONS)]
                return Example(rng, turns=turns, turns_image=image)
            kinds = [world.match_question if i % 2 else world.ask for i in rng.permutation(QUESTIONS)]
            turns = [make_question(scene, rng) for make_question in kinds]
            turns.insert(int(rng.integers(len(turns) + 1)), (data.DESCRIBE, world.describe(scene)))
            return Example(rng, turns=turns, turns_image=image)
        turns = []
        for caption, described in [(text, scene)] + [read_only_scene(rng) for _ in range(2)]:
            prompt, parsed = parse_or_paraphrase(caption, rng, rng.random() < 0.5)
            turns.append((data.UPSAMPLE.format(prompt), world.upsample_caption(described, caption, parsed)))
        return Example(rng, turns=turns)

    def supervise_queries(self, example, scene, image, text):
        """Add a prompt and the targets of the queries' states after it: most prompts are captions, many of
        them upsampled or paraphrased; the others are the image, to be generated again or with a change."""
        rng, shown = example.rng, example.turns_image
        is_chimera = shown is not None and shown is not image  # no caption fits it; nobody shall generate it
        if is_chimera or rng.random() < 0.6:
            form = rng.random()
            if rng.random() < 0.2:
                text, scene = read_only_scene(rng)
            if form < 0.4:
                text = world.upsample_caption(scene, text, world.parse_caption(text))
            example.prompt, parsed = parse_or_paraphrase(text, rng, 0.4 < form < 0.7)
        else:
            instruction, after = data.RECONSTRUCT, scene
            if rng.random() >= 0.4:
                instruction, after = world.edit(scene, rng)
            parsed = world.parse_caption(world.describe(after))
            example.prompt, example.prompt_image = instruction, image
        if parsed:
            example.query_targets = world.query_targets(parsed, *self.queries)
        return example


def parse_or_paraphrase(text, rng, paraphrase):
    """(the caption or a paraphrase of it, what world.parse_caption finds in it)."""
    return world.paraphrase(text, rng) if paraphrase else (text, world.parse_caption(text))


def read_only_scene(rng):
    """(caption, scene) to read, not to see: a fifth has a pair of colour and shape that no image shows."""
    scene = world.make_scene(0, int(rng.integers(10 ** 9)), novel=rng.random() < 0.2)
    return world.caption(scene, rng), scene


def open_world(args, stage):
    """(training samples, held-out samples) of a stage, from worlds that share no scene."""
    options, config = args.world, getattr(stage.trained, "config", None)
    upsample = options["upsample"]
    if upsample is None:
        upsample = args.stage == "2" and config.upsample_prompts
    task = WorldTask(stage.long_captions, args.short_caption, stage.converse, args.reconstruct,
                     options["edit"], bool(upsample), getattr(stage, "query_targets_shape", None))
    if stage.converse:                                               # the conversations teach it
        config.upsample_prompts = True
    training, unseen = (World(seed, stage.size, options["objects"], options["words"])
                        for seed in (args.seed, HELD_OUT_SEED))
    probe = replace(task, converse=float(task.converse == 1), reconstruct=0.0, edit=0.0, hard_negatives=True)
    return data.Samples(training, task, args.seed), data.Samples(unseen, probe, HELD_OUT_SEED)
