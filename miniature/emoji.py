"""Captioned images of real artists: emoji of four of them, from packages of the npm registry, as tar shards.

    cd FOLDER && npm pack emojilib@4.0.3 emoji-datasource-twitter@16.0.0 emoji-datasource-google@16.0.0 \
        emojione@2.2.7 @lobehub/fluent-emoji-3d@1.1.0
    python -m miniature.emoji FOLDER runs/emoji

writes emoji.tar, to train on, and held-out.tar: a tenth of the (name, style) pairs. Each name of a held-out
pair is in emoji.tar in another style, and each style with other names. A sample is a PNG of 64 x 64 and a
JSON with two captions: the name and the style, and keywords and the style. Flags that emojilib names so and
other skin colours are left out.
"""
import hashlib
import io
import json
import re
import sys
import tarfile
import zlib
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from checkpoint import POSITIVE, Parser, atomic_write, number, parse_json, run_command
from data import open_source, to_rgb
from evals.distances import clip_features
from evals.report import BATCH, print_table, rate, save_results, write_image
from miniature.scores import load_pipeline
from sample import Pipeline, to_uint8

NAMES = "emojilib-4.0.3.tgz", "package/dist/emoji-en-US.json"       # MIT; {emoji: [name, keyword, ...]}
SIZE = 64                                                           # side of an image
HELD_OUT = 0.1                                                      # fraction of the pairs
KEYWORDS = 4                                                        # in the second caption
SKIN = re.compile("1f3f[b-f]")


class Artist(NamedTuple):
    """Where the images of an artist lie in a package, and how captions name the style. The images' licences:
    Twemoji CC BY 4.0, Noto Apache 2.0, EmojiOne 2 CC BY 4.0, Fluent Emoji MIT."""
    package: str
    folder: str
    style: str


ARTISTS = {
    "twemoji": Artist("emoji-datasource-twitter-16.0.0.tgz", "package/img/twitter/64/",
                      "flat Twemoji style"),
    "noto": Artist("emoji-datasource-google-16.0.0.tgz", "package/img/google/64/", "shaded Noto style"),
    "emojione": Artist("emojione-2.2.7.tgz", "package/assets/png/", "bright EmojiOne style"),
    "fluent": Artist("lobehub-fluent-emoji-3d-1.1.0.tgz", "package/assets/", "glossy 3D Fluent style"),
}


@contextmanager
def opened(folder, package):
    """Within: the tar file of a package in `folder`; ValueError where it is missing, cut, or another's."""
    try:
        with tarfile.open(Path(folder) / package, "r:gz") as tar:
            yield tar
    except (OSError, tarfile.TarError, EOFError, zlib.error, KeyError) as error:
        raise ValueError(f"{Path(folder) / package} can't be read ({error}): `npm pack` brings it, see "
                         "python -m miniature.emoji --help") from None


def code(emoji):
    """The code points of an emoji, as names of files have them: "1f355". Variation selectors don't count."""
    return "-".join(f"{ord(c):04x}" for c in emoji if c != "\ufe0f")


def read_words(folder):
    """{code: [name, keyword, ...]} in words, without flags."""
    package, member = NAMES
    with opened(folder, package) as tar:
        entries = parse_json(tar.extractfile(member).read(), f"{package}: {member}")
    words = {code(emoji): [text.replace("_", " ").strip().lower() for text in texts]
             for emoji, texts in entries.items()}
    return {key: texts for key, texts in words.items() if texts and "flag" not in texts}


def read_images(folder, artist):
    """Yield (code, PNG of SIZE x SIZE) for the images of an Artist."""
    with opened(folder, artist.package) as tar:
        for member in tar:
            path = Path(member.name)
            if member.name.startswith(artist.folder) and path.suffix in (".png", ".webp") \
                    and path.parent == Path(artist.folder) and not SKIN.search(path.stem):
                image = to_rgb(Image.open(io.BytesIO(tar.extractfile(member).read())))
                content = io.BytesIO()
                image.resize((SIZE, SIZE), Image.LANCZOS).save(content, "png")
                yield "-".join(part for part in path.stem.lower().split("-") if part != "fe0f"), content


def captions(texts, style):
    """["name, style", "keywords, style"] of an emoji's texts [name, keyword, ...]."""
    words = [text for text in texts[1:] if text.isascii() and text.replace(" ", "").isalpha()][:KEYWORDS]
    return [f"{texts[0]}, {style}"] + ([f"{', '.join(words)}, {style}"] if words else [])


def is_held_out(key, artist, artists):
    """Is this pair held out? A pure function of its names; never all pairs of one emoji."""
    def draw(artist):
        return int.from_bytes(hashlib.sha256(f"{key} {artist}".encode()).digest()[:8]) / 2 ** 64
    return draw(artist) < HELD_OUT and any(draw(other) >= HELD_OUT for other in artists)


def add(tar, name, content):
    """Append a file to a tar."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def spread(items, n):
    """n of the items of a list, or all, spread evenly."""
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]


def read_packages(folder):
    """[(code, artist, PNG, is the pair held out?)] of the packages in `folder`, and their words, as
    `read_words` has them."""
    words, images = read_words(folder), defaultdict(dict)            # code -> {artist: PNG}
    for name, artist in ARTISTS.items():
        found = dict(read_images(folder, artist))
        if not found:
            raise ValueError(f"{Path(folder) / artist.package} has no images in {artist.folder}")
        for key in found.keys() & words.keys():
            images[key][name] = found[key].getvalue()
    return [(key, name, content, is_held_out(key, name, by_artist)) for key, by_artist in
            sorted(images.items()) for name, content in by_artist.items()], words


def build(folder, out, n=None):
    """Write out/emoji.tar and out/held-out.tar from the packages in `folder`; n: only so many pairs are to
    train on, spread evenly, and all others held out. Returns {artist: (pairs to train on, held-out pairs)}.
    """
    pairs, words = read_packages(folder)
    training = [pair[:2] for pair in pairs if not pair[3]]
    training = set(spread(training, len(training) if n is None else n))
    counts = {name: [0, 0] for name in ARTISTS}
    Path(out).mkdir(parents=True, exist_ok=True)
    files = Path(out) / "emoji.tar", Path(out) / "held-out.tar"
    with atomic_write(files[0]) as train, atomic_write(files[1]) as held_out, \
            tarfile.open(train, "w") as train_tar, tarfile.open(held_out, "w") as held_out_tar:
        for key, name, content, _ in pairs:
            unseen = (key, name) not in training
            tar = held_out_tar if unseen else train_tar
            about = {"captions": captions(words[key], ARTISTS[name].style)}
            add(tar, f"{key}-{name}.png", content)
            add(tar, f"{key}-{name}.json", json.dumps(about).encode())
            counts[name][unseen] += 1
    return counts


# ---- how well are they drawn? -----------------------------------------------------------------------------

# Words that no caption has, for what captions name otherwise: only the language model can know them.
SYNONYMS = {
    "kitty": "1f431", "pooch": "1f436", "bunny": "1f430", "serpent": "1f40d", "hog": "1f437",
    "bovine": "1f42e", "grizzly": "1f43b", "hen": "1f414", "bumblebee": "1f41d", "sedan": "1f697",
    "cab": "1f695", "lorry": "1f69a", "jetliner": "2708", "spacecraft": "1f680", "conifer": "1f332",
    "twister": "1f32a", "spud": "1f954", "maize": "1f33d", "aubergine": "1f346", "cheeseburger": "1f354",
    "lager": "1f37a", "espresso": "2615", "sneaker": "1f45f", "handset": "1f4f1", "ruby": "1f48e",
    "padlock": "1f512", "telly": "1f4fa", "fiddle": "1f3bb", "orb": "1f52e"}


def read_pairs(path, size):
    """[(code, artist, caption, image uint8 (size, size, 3))] of a tar that `build` wrote."""
    source, pairs = open_source(str(path), size), []
    for i in range(len(source)):
        item, (key, _, artist) = source[i], Path(source.name(i).split(": ")[-1]).stem.rpartition("-")
        if artist not in ARTISTS:
            raise ValueError(f"{source.name(i)} isn't called CODE-ARTIST: python -m miniature.emoji makes "
                             f"{path}")
        pairs.append((key, artist, item["captions"][0], item["image"]))
    return pairs


class Galleries:
    """CLIP features of true images by style: {artist: features (N, D)} and {artist: their N codes}, of pairs
    as `read_pairs` returns them."""

    def __init__(self, pipe, pairs):
        known = [(key, artist) for key, artist, *_ in pairs]
        self.features = dict(zip(known, encode(pipe, [image for *_, image in pairs])))  # each (D,)
        self.codes = {artist: [key for key, other in known if other == artist] for artist in ARTISTS}
        self.matrices = {artist: torch.stack([self.features[key, artist] for key in codes])
                         for artist, codes in self.codes.items() if codes}

    def rank(self, feature, key, artist):
        """The rank, 0 the nearest, of a code among all of its style by distance from a feature (D,)."""
        distances = (self.matrices[artist] - feature).square().sum(1)
        return int((distances < distances[self.codes[artist].index(key)]).sum())

    def ranks(self, features, pairs):
        """The ranks of pairs (code, artist, ...) by features (N, D)."""
        return [self.rank(feature, *pair[:2]) for feature, pair in zip(features, pairs)]

    def copying(self, pairs):
        """The ranks of pairs by the true image of the same code by another artist, where there is one."""
        others = [(next((other for other in ARTISTS if other != artist and (key, other) in self.features),
                        None), key, artist) for key, artist, *_ in pairs]
        return [self.rank(self.features[key, other], key, artist) for other, key, artist in others if other]


def top(ranks):
    """Ranks -> a row of the table: top 1, and top 5 as its score with the interval."""
    return {"top 1": sum(rank == 0 for rank in ranks) / len(ranks), **rate(rank < 5 for rank in ranks)}


def run_emoji(args):
    """Do generated emoji show what was asked? For each held-out pair, the names of that style are ranked by
    the distance of their true images' CLIP features, by the encoder of --judge, from those of the generated
    image.

    --data: the folder that `python -m miniature.emoji` filled; of more than --n held-out pairs so many are
    chosen, spread evenly. Beside it: as many pairs that were trained on; the true image, encoded and decoded
    (the ceiling); the same name's image by another artist, what copying would give; and chance. synonyms:
    prompts with a word that no caption has.
    OUT/emoji.png: 32 held-out pairs, spread evenly, generated and true; OUT/emoji-generated, OUT/emoji-true:
    all, for `fid` and `neighbours`.
    """
    pipe = load_pipeline(args)
    judge = Pipeline(args.judge, args.device, args.dtype) if args.judge else pipe
    side = pipe.eva.config.image_size
    seen, unseen = (read_pairs(Path(args.data) / f"{name}.tar", side) for name in ("emoji", "held-out"))
    galleries, pairs = Galleries(judge, seen + unseen), spread(unseen, args.n)
    trained = spread(seen, len(pairs))
    common = set(re.findall(r"\w+", " ".join(caption for _, _, caption, _ in seen).lower()))
    words = [(key, artist, f"{word}, {ARTISTS[artist].style}") for word, key in SYNONYMS.items()
             if word not in common for artist in ARTISTS if (key, artist) in galleries.features]
    asked, truth = pairs + words + trained, [pair[3] for pair in pairs]
    images = batched([pair[2] for pair in asked], lambda part, seeds: to_uint8(pipe.images(part, seeds)),
                     args.seed)
    again = batched(truth, lambda part, seeds: to_uint8(pipe.reconstruct(to_pil(part), seeds)), args.seed)
    ranks = galleries.ranks(encode(judge, images), asked)
    ranks, of_words, of_trained = (ranks[:len(pairs)], ranks[len(pairs):-len(trained)],
                                   ranks[-len(trained):])
    table = {"generated": top(ranks)}
    for artist in ARTISTS:
        if of_artist := [r for r, pair in zip(ranks, pairs) if pair[1] == artist]:
            table[f"  {ARTISTS[artist].style}"] = top(of_artist)
    table |= {"pairs trained on": top(of_trained),
              "reconstructed": top(galleries.ranks(encode(judge, again), pairs)),
              "another artist's": top(galleries.copying(pairs))}
    if words:
        table["synonyms"] = top(of_words)
    names = sum(map(len, galleries.codes.values())) / len(ARTISTS)
    table["chance"] = {"top 1": 1 / names} | dict.fromkeys(("score", "low", "high"), 5 / names)
    print_table(f"{len(pairs)} held-out pairs among {names:.0f} names a style: right name the nearest, "
                "or among the five nearest (score)", table)
    write_image(Path(args.out) / "emoji.png", side_by_side(images, truth))
    for name, shown in ("generated", images), ("true", truth):
        write_pairs(Path(args.out) / f"emoji-{name}", pairs, shown)
    save_results(args, {"table": table, "pairs": [
        {"caption": pair[2], "rank": r} for pair, r in zip(pairs, ranks)]})


def write_pairs(folder, pairs, images):
    """Write the images of pairs (code, artist, ...) as CODE-ARTIST.png; those of an earlier run go."""
    for artist in ARTISTS:
        for old in folder.glob(f"*-{artist}.png"):
            old.unlink()
    for (key, artist, *_), image in zip(pairs, images):
        write_image(folder / f"{key}-{artist}.png", image)


def batched(items, work, seed=0):
    """The results of work(some items, their seeds), one for each item; item i has seed + i."""
    results = []
    for i in tqdm(range(0, len(items), BATCH), disable=None):
        part = items[i:i + BATCH]
        results.extend(work(part, range(seed + i, seed + i + len(part))))
    return results


def to_pil(images):
    """uint8 images (H, W, 3) -> PIL images."""
    return [Image.fromarray(image) for image in images]


def encode(pipe, images):
    """CLIP features of uint8 images (H, W, 3), flat, (n, D)."""
    return torch.stack(batched(list(images),
                               lambda part, _: clip_features(pipe, to_pil(part)).flatten(1)))


def side_by_side(images, truth, n=32, columns=8):
    """n of the images, spread evenly, below each its true one, in rows of `columns`, twice as large."""
    columns = min(columns, len(truth))
    n = min(n, len(truth)) // columns * columns
    chosen = spread(range(len(truth)), n)
    rows = [np.concatenate([part[j] for j in chosen[i:i + columns]], 1)
            for i in range(0, n, columns) for part in (images, truth)]
    return np.concatenate(rows).repeat(2, 0).repeat(2, 1)


def run(argv):
    """The command line."""
    parser = Parser("python -m miniature.emoji", description=__doc__)
    parser.add_argument("folder", help="folder with the packages")
    parser.add_argument("out", help="folder for emoji.tar and held-out.tar")
    parser.add_argument("--n", type=number(int, POSITIVE), help="pairs to train on (default: nine tenths)")
    args = parser.parse_args(argv)
    for name, (seen, unseen) in build(args.folder, args.out, args.n).items():
        print(f"{name}: {seen} images, {unseen} held out")


if __name__ == "__main__":
    sys.exit(run_command("miniature.emoji", partial(run, None)))
