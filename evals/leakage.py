"""Was the test trained on? Prompts that stand in the training captions, and images that copy training
images."""
import math
import re
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data import BadSample, crop_square, open_source
from evals.distances import clip_features
from evals.generation import read_prompts
from evals.report import BATCH, SHEET, print_table, rate, read_images, save_results, write_image
from sample import Pipeline


def word_pairs(text):
    """(normalised text, its set of word pairs, the ends included): case and punctuation don't count."""
    words = re.findall(r"\w+", text.lower())
    return " ".join(words), set(zip(["^", *words], [*words, "$"]))


def find_leaks(prompts, captions, least):
    """For each prompt (Jaccard similarity of its word pairs with the nearest caption, that caption, are
    all words the same?); (0, None, False) below `least`. Prompts are indexed by word pairs, captions
    stream by."""
    indexed = [word_pairs(prompt) for prompt in prompts]
    prompts_with = defaultdict(list)                                 # word pair -> numbers of prompts
    for i, (_, pairs) in enumerate(indexed):
        for pair in pairs:
            prompts_with[pair].append(i)
    best = [(0.0, None, False)] * len(prompts)
    for caption in captions:
        text, pairs = word_pairs(caption)
        for i, common in Counter(i for pair in pairs for i in prompts_with.get(pair, ())).items():
            prompt_text, prompt_pairs = indexed[i]
            similarity, exact = common / (len(pairs) + len(prompt_pairs) - common), text == prompt_text
            if similarity >= least and (similarity, exact) > (best[i][0], best[i][2]):
                best[i] = similarity, caption.strip(), exact
    return best


def read_captions(source):
    """Yield all captions of a source, without the images."""
    for i in tqdm(range(len(source)), disable=None):
        with suppress(BadSample):                                    # training passes over these, too
            _, texts = source.read(i, texts_only=True)
            yield from texts.get("captions", ())


def leakage(args, prompts=(), captions=()):
    """Which evaluation prompts stand in the training captions, word for word or nearly (word pairs,
    Jaccard)?

    Without --prompts: those of `alignment`. Without --train: captions of the world's first --n training
    images. Both of these are handed in, as lists or iterators of strings.
    """
    if args.prompts:
        prompts = [job["prompt"] for job in read_prompts(args.bench, args.prompts)]
    if args.train:
        captions = read_captions(open_source(args.train))
    prompts = list(dict.fromkeys(prompts))
    best = find_leaks(prompts, captions, args.near)
    table = {"word for word": rate(exact for _, _, exact in best),
             f"{args.near:.2f} alike or more": rate(similarity > 0 for similarity, _, _ in best)}
    where = args.train or "the synthetic world"
    print_table(f"{len(prompts)} different prompts found in the captions of {where}", table)
    leaks = [{"prompt": prompt, "similarity": similarity, "exact": exact, "caption": caption}
             for prompt, (similarity, caption, exact) in zip(prompts, best) if caption is not None]
    save_results(args, {"table": table, "found": leaks})


# ---- copies of training images --------------------------------------------------------------------------

def all_features(pipe, images):
    """All 64 CLIP features of PIL images as one vector each: (N, 64 C)."""
    batches = [images[i:i + BATCH] for i in range(0, len(images), BATCH)]
    return torch.cat([clip_features(pipe, batch).flatten(1) for batch in batches])


def training_features(pipe, source, n):
    """(numbers of the first n items that can be read, their features (N, 64 C)); ValueError if there
    are fewer than two."""
    numbers, features = [], []
    for i in tqdm(range(0, min(n, len(source)), BATCH), disable=None):
        images = []
        for j in range(i, min(i + BATCH, n, len(source))):
            with suppress(BadSample):                                # training passes over these, too
                item = source[j]
                if "image" in item:                                  # conversations may have none
                    images.append(Image.fromarray(item["image"]))
                    numbers.append(j)
        if images:
            features.append(all_features(pipe, images))
    if len(numbers) < 2:
        raise ValueError(f"{len(numbers)} training images can be read: two are the least")
    return numbers, torch.cat(features)


def neighbours(args):
    """What is memorised? To each image in --a the nearest of --train's images, by the root mean square
    difference of all 64 CLIP features. A copy is far nearer than training images are to each other;
    that distance stands beside it.

    OUT/neighbours.png: the images, each with the nearest one below it.
    """
    pipe = Pipeline(args.ckpt, args.device, args.dtype, eva=args.eva)
    side = pipe.eva.config.image_size
    source = open_source(args.train, side)
    files, images = zip(*((file, crop_square(image, side)) for batch in read_images(args.a)
                          for file, image in batch))
    mine = all_features(pipe, images)
    numbers, known = training_features(pipe, source, args.n)
    root = mine.shape[1] ** 0.5
    distances, nearest = (torch.cdist(mine, known) / root).min(1)                # (N,), (N,)
    usual = (torch.cdist(known[:1000], known) / root).fill_diagonal_(math.inf).min(1).values
    items = [source[numbers[k]] for k in nearest.tolist()]
    table = {"to training pictures": {"distance": distances.median().item(), "n": len(images)},
             "among training pictures": {"distance": usual.median().item(), "n": len(known)}}
    print_table(f"median distance to the nearest, {args.a} and {args.train}", table)
    shown = range(0, len(images), -(-len(images) // (SHEET // 12)))
    rows = [[np.asarray(images[i]) for i in shown], [items[i]["image"] for i in shown]]
    sheet = np.concatenate([np.concatenate(row, 1) for row in rows])
    write_image(Path(args.out) / "neighbours.png", sheet.repeat(2, 0).repeat(2, 1))
    save_results(args, {"table": table, "pictures": [
        {"file": str(file), "distance": distance, "nearest": item.get("captions", [None])[0]}
        for file, distance, item in zip(files, distances.tolist(), items)]})
