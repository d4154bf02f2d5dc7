"""Every use of a trained model, from the command line.

    python sample.py --prompt "a red circle above a blue square" --n 4      pictures
    python sample.py --prompt "a red circle" --steps-strip                  one picture on its way from noise
    python sample.py --image cat.png --prompt "What is this?"               an answer, word by word
    python sample.py --image cat.png --reconstruct                          picture -> 64 features -> picture

A prompt walks: data.prompt_ids (template, tokens) -> BLIP3o.condition (LLM, 64 queries) -> BLIP3o.generate_features
(flow.py steps through dit.py) -> PixelDecoder.decode (UNet, VAE) -> PNG. eval.py and train.py call the same `Pipeline`.
Answers and the names of written files go to stdout, progress and timings to stderr.

B pictures, L tokens, C width of one CLIP feature, H W pixels.
"""
import argparse
import json
import math
import re
import sys
import time
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError
from tqdm import tqdm

from clip_decoder import EvaClip, PixelDecoder
from data import (DESCRIBE, Tokenizer, chat_ids, crop_square, load_image, pad, preprocess_clip, preprocess_qwen,
                  prompt_ids)
from model import BLIP3o

# Steps and guidance of the official pipeline; a checkpoint names its own in config.json as nano_blip3o.sampling.
OFFICIAL = {"steps": 30, "cfg": 3.0, "decoder_steps": 50, "decoder_cfg": 3.0}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# One seed makes noise for three things, each a stream of its own. torch's CPU generator reads only 32 bits of its seed,
# so streams lie MAX_SEED apart: seed + 2^32 would be the same noise again.
FEATURES, DECODER, NEGATIVE = 0, 1, 2
MAX_SEED = 10 ** 9
BATCH, DECODER_PIXELS = 16, 4 * 1024 ** 2       # pictures of one batch; the decoder takes fewer where they are large
FRAMES = 8                                      # of --steps-strip


# ----------------------------------------------------------------------------------------------------------------------
# The pipeline: what a model folder can do
# ----------------------------------------------------------------------------------------------------------------------
class Pipeline:
    """The parts of one model folder, each read from disk when first needed, and what they do together.

    device: "auto" is CUDA where there is one, else the CPU. dtype: "auto" is bf16 on CUDA, else fp32. parts:
    what BLIP3o.from_pretrained reads, None for all that is there. Steps and guidance left at None are the checkpoint's
    own, else the official ones. Whoever has a live model assigns `model`, `eva` or `decoder` instead of having it read.
    Raises ValueError for a folder that holds no model, or a device that isn't there.

    A picture depends on its prompt, its seed and the settings alone: not on its batch, nor on what was drawn before.
    """

    def __init__(self, folder, device="auto", dtype="auto", parts=None):
        self.folder, self.parts = Path(folder), parts
        self.config = self.read("config.json")
        if not self.config:
            raise ValueError(f"there is no model in {folder}: it has no config.json")
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.device)
        self.tokenizer = Tokenizer.from_pretrained(folder)
        self.sampling = {**OFFICIAL, **self.config.get("nano_blip3o", {}).get("sampling", {})}
        self.seconds = {}                                            # part -> time spent in it
        self.negatives = {}                                          # (seed, steps, guidance) -> (64, C)

    def read(self, name):
        """The object in a JSON file of the folder; {} where there is no such file."""
        file = self.folder / name
        try:
            return json.loads(file.read_text("utf-8")) if file.is_file() else {}
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} isn't valid JSON: {error}") from None

    def setting(self, name, value=None):
        """One of OFFICIAL: the value if given, else the checkpoint's."""
        return self.sampling[name] if value is None else value

    @cached_property
    def model(self):
        """Vision tower, LLM, queries and DiT: those of `parts`."""
        with self.timed("load"):
            return BLIP3o.from_pretrained(self.folder, self.device, self.dtype, self.parts).eval()

    @cached_property
    def eva(self):
        """The image encoder."""
        with self.timed("load"):
            return EvaClip.from_pretrained(self.folder, self.device, self.dtype)

    @cached_property
    def decoder(self):
        """The pixel decoder."""
        with self.timed("load"):
            return PixelDecoder.from_pretrained(self.folder, self.device, self.dtype)

    @contextmanager
    def timed(self, part, module=None, calls=None):
        """Add the time of the block to seconds[part]; given a module, a bar counts its forward passes up to `calls`."""
        start = time.perf_counter()
        with tqdm(total=calls, desc=part, leave=False, disable=None if module else True) as bar:
            def count(*_):
                bar.update()                                         # must not return: that would replace the output
            hook = module.register_forward_hook(count) if module else None
            try:
                yield
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)              # else the next part would pay for this one
            finally:
                if hook:
                    hook.remove()
        self.seconds[part] = self.seconds.get(part, 0) + time.perf_counter() - start

    # ---- text -> features -> pixels ----------------------------------------------------------------------------------

    def features(self, prompts, seeds, steps=None, guidance=None):
        """One prompt and one seed for each picture -> CLIP features (B, 64, C), fp32."""
        if not all(prompt.strip() for prompt in prompts):
            raise ValueError("the prompt is empty")
        rows = [prompt_ids(self.tokenizer, prompt) for prompt in prompts]
        return self.generate(rows, seeds, FEATURES, steps, guidance)

    @torch.no_grad()
    def generate(self, rows, seeds, stream, steps=None, guidance=None):
        """Rows of token ids, [IMG] and queries not among them -> features (B, 64, C), fp32."""
        steps, guidance, model = self.setting("steps", steps), self.setting("cfg", guidance), self.model
        if model.dit is None:
            raise ValueError(f"the model in {self.folder} has no DiT: it can answer questions, but not draw")
        if len(rows) != len(seeds):
            raise ValueError(f"{len(rows)} prompts need as many seeds, not {len(seeds)}")
        ids, mask = pad(rows)                                                          # (B, L)
        with self.timed("LLM"):
            cond = model.condition(ids.to(self.device), mask.to(self.device))         # (B, queries, D)
        noise = draw_noise(seeds, (model.config.gen_hidden_size, model.config.grid, model.config.grid), stream)
        with self.timed("DiT", model.dit, steps):
            return model.generate_features(cond, steps, guidance, noise.to(self.device))

    def negative(self, seeds, steps=None, guidance=None):
        """What the decoder's guidance leads away from: features (B, 64, C) that the model makes of a single space.

        No chat template around it, as in the official pipeline. That one draws them once per process and keeps them, so
        that every picture depends on how the process began; here each seed has its own.
        """
        keys = [(seed, self.setting("steps", steps), self.setting("cfg", guidance)) for seed in seeds]
        new = [key for key in dict.fromkeys(keys) if key not in self.negatives]
        if new:
            rows = [self.tokenizer.encode(" ")] * len(new)
            self.negatives |= zip(new, self.generate(rows, [seed for seed, *_ in new], NEGATIVE, steps, guidance))
        return torch.stack([self.negatives[key] for key in keys])

    @torch.no_grad()
    def pixels(self, features, seeds, steps=None, guidance=None, size=None, negative=None):
        """Features (B, 64, C) and a seed for each -> pixels (B, 3, H, W) in [0, 1], fp32, on the CPU.

        size: (height, width), the decoder's own if None. negative (B, 64, C): that of `negative` if None.
        """
        steps, guidance = self.setting("decoder_steps", steps), self.setting("decoder_cfg", guidance)
        if negative is None and guidance != 1:
            negative = self.negative(seeds)
        decoder = self.decoder
        factor, channels = decoder.vae.factor, decoder.unet.config.in_channels
        height, width = size or (decoder.unet.config.sample_size * factor,) * 2
        noise = draw_noise(seeds, (channels, height // factor, width // factor), DECODER)
        batch = max(1, DECODER_PIXELS // (height * width))
        parts = [slice(i, i + batch) for i in range(0, len(features), batch)]
        with self.timed("decoder", decoder.unet, steps * len(parts)):
            return torch.cat([decoder.decode(features[p], None if negative is None else negative[p], steps, guidance,
                                             noise[p], (height, width)).cpu() for p in parts])

    def images(self, prompts, seeds, steps=None, guidance=None, decoder_steps=None, decoder_guidance=None, size=None):
        """One prompt and one seed for each picture -> pixels (B, 3, H, W) in [0, 1]."""
        return self.pixels(self.features(prompts, seeds, steps, guidance), seeds, decoder_steps, decoder_guidance, size)

    def trajectory(self, prompt, seed, steps=None, guidance=None):
        """How the features of one picture came about: (states, guesses), both (steps + 1, 64, C), from noise to result.

        states are the points x_t at which the sampler stood. guesses are the data that it saw from there, at the end of
        the straight line along the velocity: x_t + (1 - t) v. A hook reads along what the sampler shows the DiT.
        """
        times, states = [], []

        def watch(_, args):
            x, t = args                                              # (1 or 2, C, h, w), two alike under guidance
            times.append(t[0].item())
            states.append(x[:1].flatten(2).transpose(1, 2))          # (1, 64, C)
        hook = self.model.dit.register_forward_pre_hook(watch)
        try:
            states.append(self.features([prompt], [seed], steps, guidance))
        finally:
            hook.remove()
        x, t = torch.cat(states), torch.tensor(times + [1.0]).view(-1, 1, 1).to(self.device)       # (steps + 1, 64, C)
        v = (x[1:] - x[:-1]) / (t[1:] - t[:-1])
        return x, torch.cat([x[:-1] + (1 - t[:-1]) * v, x[-1:]])

    # ---- pixels -> features -> pixels --------------------------------------------------------------------------------

    @torch.no_grad()
    def reconstruct(self, images, seeds=None, steps=None, guidance=None):
        """PIL images -> what 64 features keep of them, (B, 3, H, W) in [0, 1]; without language model and DiT.

        Guidance leads away from the features of an all-zero normalised image, as official.
        """
        eva = self.eva
        pixels = torch.cat([preprocess_clip(image, eva.config.image_size) for image in images])    # (B, 3, S, S)
        pixels = torch.cat([pixels, torch.zeros_like(pixels[:1])]).to(self.device, self.dtype)
        with self.timed("EVA"):
            features = eva.encode(pixels).float()                                                  # (B + 1, 64, C)
        seeds = [0] * len(images) if seeds is None else seeds
        negative = features[-1:].expand(len(images), -1, -1)
        return self.pixels(features[:-1], seeds, steps, guidance, negative=negative)

    # ---- pictures and questions -> text ------------------------------------------------------------------------------

    def answer(self, image, question, max_new_tokens=64, temperature=0.0, on_text=None):
        """The answer to a question about a PIL image (or None: about nothing). on_text(piece) hears it as it grows.

        A token of a byte-level BPE may end within a character: pieces wait until their characters are whole.
        """
        ids, told = [], ""

        def hear(step):
            nonlocal told
            if step[0] is not None:
                ids.append(step[0])
                whole = self.tokenizer.decode(ids).rstrip("\ufffd")   # what a broken last character decodes to
                if len(whole) > len(told):
                    on_text(whole[len(told):])
                    told = whole
        text = self.ask([image], [question], max_new_tokens, temperature, hear if on_text else None)[0]
        if on_text and len(text) > len(told):
            on_text(text[len(told):])
        return text

    def answers(self, images, questions, max_new_tokens=64, temperature=0.0):
        """The answers to questions about PIL images (or None), one question each, as one batch: a list of strings."""
        return self.ask(images, questions, max_new_tokens, temperature)

    @torch.no_grad()
    def ask(self, images, questions, max_new_tokens, temperature, on_token=None):
        """What answer and answers share: preprocess, one call of BLIP3o.generate_text, decode."""
        model, limits, rows, looks, seen = self.model, self.read("preprocessor_config.json"), [], [], {}
        limits = {name: limits[name] for name in ("min_pixels", "max_pixels") if name in limits}
        for image, question in zip(images, questions, strict=True):
            if not question.strip():
                raise ValueError("the question is empty")
            pads = 0
            if image is not None:
                if model.visual is None:
                    raise ValueError(f"the model in {self.folder} has no vision tower: it can't look at pictures")
                vision = model.config.vision
                looks.append(preprocess_qwen(image, vision.patch_size, vision.spatial_merge_size, **limits))
                pads = len(looks[-1][0]) // vision.spatial_merge_size ** 2
            rows.append(chat_ids(self.tokenizer, [(question, None)], pads)[0])
        ids, mask = pad(rows)                                                          # (B, L)
        if looks:
            patches, grids = map(torch.cat, zip(*looks))                               # (all patches, P), (images, 3)
            seen = {"pixels": patches.to(self.device, self.dtype), "grid_thw": grids.to(self.device)}
        penalty = self.read("generation_config.json").get("repetition_penalty", 1.0)
        with self.timed("LLM"):
            new = model.generate_text(ids.to(self.device), mask.to(self.device), **seen, max_new_tokens=max_new_tokens,
                                      temperature=temperature, repetition_penalty=penalty, on_token=on_token)
        return [self.tokenizer.decode(row) for row in new]


# ----------------------------------------------------------------------------------------------------------------------
# Small things
# ----------------------------------------------------------------------------------------------------------------------
def pick_device(name):
    """"auto", or a torch device's name -> torch.device; ValueError where this machine has no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"there is no device called {name!r}: use auto, cpu or cuda") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"this machine has no device {name!r} that PyTorch can use: try --device cpu")
    return device


def pick_dtype(name, device):
    """"auto", or a name of DTYPES -> torch dtype."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"there is no dtype {name!r}: use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def draw_noise(seeds, shape, stream):
    """Unit normal noise (B, *shape), fp32, on the CPU: row i comes from seeds[i] alone, the same on every machine."""
    if not all(0 <= seed < MAX_SEED for seed in seeds):
        raise ValueError(f"a seed lies between 0 and {MAX_SEED - 1}")
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed + stream * MAX_SEED))
                        for seed in seeds])


def to_uint8(pixels):
    """Pixels (..., 3, H, W) in [0, 1] -> uint8 array (..., H, W, 3), rounded half to even."""
    return (pixels * 255).round().to(torch.uint8).movedim(-3, -1).cpu().numpy()


def grid(pixels, columns=None, least=192):
    """Pictures (B, 3, H, W) row by row on white -> one picture (3, H', W'); as good as square if columns is None.

    Small ones are enlarged by a whole number, pixel by pixel, until their sides have `least` pixels.
    """
    B, _, H, W = pixels.shape
    columns = columns or math.ceil(math.sqrt(B))
    factor = math.ceil(least / min(H, W))
    cells = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)          # (B, 3, f H, f W)
    cells = F.pad(cells, (2, 2, 2, 2), value=1.0)
    cells = F.pad(cells, (0, 0, 0, 0, 0, 0, 0, -B % columns), value=1.0)              # (rows * columns, 3, h, w)
    return cells.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


def slug(text):
    """Text -> the beginning of a file name."""
    return re.sub(r"[\W_]+", "-", text.lower())[:48].strip("-") or "picture"


def save(pixels, folder, name, about):
    """Write pixels (3, H, W) in [0, 1] to folder/name.png, print where, return the path.

    `about`, a dict of what the picture was made from, is kept in the file. A file of that name made from anything else
    is never overwritten: the new one gets a number.
    """
    folder, about, number = Path(folder), json.dumps(about), 1
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    while path.exists() and made_from(path) != about:
        number += 1
        path = folder / f"{name}-{number}.png"
    note = PngInfo()
    note.add_text("nano_blip3o", about)
    Image.fromarray(to_uint8(pixels)).save(path, pnginfo=note)
    print(path, flush=True)
    return path


def made_from(path):
    """The `about` that `save` kept in a file, as a string; None in a file that isn't its."""
    try:
        with Image.open(path) as image:
            return image.info.get("nano_blip3o")
    except OSError:
        return None


# ----------------------------------------------------------------------------------------------------------------------
# Commands
# ----------------------------------------------------------------------------------------------------------------------
def draw(pipe, args):
    """--prompt: a file for each picture, picture i with seed + i; a grid of all if they are several."""
    seeds, about, drawn = range(args.seed, args.seed + args.n), settings(pipe, args), []
    for i in tqdm(range(0, args.n, BATCH), desc="batches", leave=False, disable=None if args.n > BATCH else True):
        batch = seeds[i:i + BATCH]
        drawn.append(pipe.images([args.prompt] * len(batch), batch, args.steps, args.cfg, args.decoder_steps,
                                 args.decoder_cfg))
        for seed, picture in zip(batch, drawn[-1]):
            save(picture, args.out, f"{slug(args.prompt)}-{seed}", {**about, "seed": seed})
    if args.n > 1:
        save(grid(torch.cat(drawn)), args.out, f"{slug(args.prompt)}-{seeds[0]}-to-{seeds[-1]}", {**about, "n": args.n})


def strip(pipe, args):
    """--steps-strip: the way of one picture from noise, FRAMES of its steps from left to right.

    Upper row: what the decoder makes of the state x_t itself. Lower row: of the data that the DiT sees from there. The
    decoder's own noise is the same in all of them.
    """
    states, guesses = pipe.trajectory(args.prompt, args.seed, args.steps, args.cfg)
    chosen = torch.linspace(0, len(states) - 1, min(FRAMES, len(states))).round().long()
    features = torch.cat([states[chosen], guesses[chosen]])                           # (2 FRAMES, 64, C)
    pictures = pipe.pixels(features, [args.seed] * len(features), args.decoder_steps, args.decoder_cfg)
    about = {**settings(pipe, args), "frames": len(chosen)}
    save(grid(pictures, len(chosen)), args.out, f"{slug(args.prompt)}-{args.seed}-steps", about)
    print(f"left to right: after {', '.join(map(str, chosen.tolist()))} steps; upper row: the state itself, lower row: "
          "the picture it is heading for", file=sys.stderr)


def settings(pipe, args):
    """All that a picture depends on."""
    return {"prompt": args.prompt, "seed": args.seed, "ckpt": args.ckpt,
            **{name: pipe.setting(name, getattr(args, name)) for name in OFFICIAL}}


def reconstruct(pipe, args):
    """--image --reconstruct: the middle square of the picture, and beside it what its 64 features keep."""
    image = load_image(args.image)
    after = pipe.reconstruct([image], [args.seed], args.decoder_steps, args.decoder_cfg)[0]                # (3, H, W)
    before = torch.from_numpy(np.array(crop_square(image, after.shape[-1]))).permute(2, 0, 1) / 255
    about = {"image": args.image, **settings(pipe, args)}
    save(grid(torch.stack([before, after]), 2), args.out, f"{slug(Path(args.image).stem)}-reconstructed", about)


def answer(pipe, args):
    """--image and maybe --prompt: the answer, on stdout, as it grows."""
    pipe.answer(load_image(args.image), DESCRIBE if args.prompt is None else args.prompt, args.max_new_tokens,
                on_text=lambda text: print(text, end="", flush=True))
    print()


# What each command does, and what it needs of BLIP3o.
COMMANDS = {"draw": (draw, {"llm", "queries", "dit"}), "strip": (strip, {"llm", "queries", "dit"}),
            "answer": (answer, {"llm", "visual"}), "reconstruct": (reconstruct, set())}


class Parser(argparse.ArgumentParser):
    """argparse, but mistakes are ValueErrors like all others here."""

    def error(self, message):
        raise ValueError(message)


def parse(argv):
    """Command line -> (command, args); ValueError for what can't be meant."""
    parser = Parser("sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompt", help="what to draw; with --image, a question about it")
    add("--image", help="a picture file to ask about or to reconstruct")
    add("--reconstruct", action="store_true", help="send --image through the 64 features and back")
    add("--steps-strip", action="store_true", help="draw the way from noise to the picture as a strip")
    add("--n", type=int, default=1, help="number of pictures, with seeds from --seed on")
    add("--seed", type=int, default=0)
    add("--steps", type=int, help="Euler steps of the DiT (the checkpoint's, else 30)")
    add("--cfg", type=float, help="guidance of the DiT, 1 for none (the checkpoint's, else 3)")
    add("--decoder-steps", type=int, help="steps of the pixel decoder (the checkpoint's, else 50)")
    add("--decoder-cfg", type=float, help="guidance of the pixel decoder, 1 for none (the checkpoint's, else 3)")
    add("--max-new-tokens", type=int, default=64, help="longest answer")
    add("--ckpt", default=str(Path(__file__).parent / "weights" / "nano"), help="model folder (weights/nano)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", default="auto", help=f"auto, {', '.join(DTYPES)}")
    add("--out", default="runs/samples", help="folder for pictures")
    args = parser.parse_args(argv)

    wrong = [  # (is it so?, what to say)
        (args.prompt is None and args.image is None, "say what to do: --prompt draws, --image with --prompt answers"),
        (args.prompt is not None and not args.prompt.strip(), "the prompt is empty"),
        (args.reconstruct and args.image is None, "--reconstruct needs an --image"),
        (args.reconstruct and args.prompt is not None, "--reconstruct takes no --prompt"),
        (args.steps_strip and args.image is not None, "--steps-strip draws a --prompt and takes no --image"),
        (args.n > 1 and (args.steps_strip or args.image is not None), "--n is for pictures of a --prompt alone"),
        (args.seed + args.n > MAX_SEED or args.seed < 0, f"seeds must lie between 0 and {MAX_SEED - 1}"),
        *((value is not None and value < 1, f"--{name.replace('_', '-')} must be at least 1, not {value}")
          for name, value in vars(args).items() if name in ("n", "steps", "decoder_steps", "max_new_tokens")),
        *((value is not None and not 0 <= value < math.inf, f"--{name.replace('_', '-')} can't be {value}")
          for name, value in vars(args).items() if name in ("cfg", "decoder_cfg")),
    ]
    for so, what in wrong:
        if so:
            raise ValueError(what)
    if args.image is not None:
        return "reconstruct" if args.reconstruct else "answer", args
    return "strip" if args.steps_strip else "draw", args


def main(argv=None):
    """Run one command; returns the exit code: 0, 2 after a mistake (one sentence on stderr), 130 after Ctrl-C."""
    try:
        name, args = parse(argv)
        command, parts = COMMANDS[name]
        pipe = Pipeline(args.ckpt, args.device, args.dtype, parts)
        command(pipe, args)
        print(", ".join(f"{part} {seconds:.1f} s" for part, seconds in pipe.seconds.items()), file=sys.stderr)
        return 0
    except KeyboardInterrupt:
        return 130
    except torch.OutOfMemoryError:
        message = "the GPU's memory is too small for this: try fewer pictures, or --device cpu"
    except (ValueError, OSError, SafetensorError) as error:
        message = " ".join(str(error).split())
    print(f"sample.py: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
