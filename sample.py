"""Every use of a trained model, from the command line.

    python sample.py --prompt "a red circle above a blue square" --n 4      pictures
    python sample.py --prompt "a red circle" --steps-strip                  one picture on its way from noise
    python sample.py --image cat.png --prompt "What is this?"               an answer, word by word
    python sample.py --image cat.png --reconstruct                          picture -> 64 features -> picture
    python sample.py --image cat.png --prompt "the same in snow" --draw     a picture of a picture and a text
    python sample.py --chat                                                 talk: text and @files in, "/image ..." draws
    python sample.py --caption IMAGES --ckpt FOLDER --out shards/           a folder of pictures becomes training data
    python sample.py --ckpt FOLDER --dry-run                                what fits into this machine's memory?
    python sample.py --ckpt FOLDER --export diffusers DIR                   DiT, UNet and VAE for diffusers

A prompt walks: data.prompt_ids (template, tokens) -> BLIP3o.condition (LLM, 64 queries) -> BLIP3o.generate_features
(flow.py steps through dit.py) -> PixelDecoder.decode (UNet, VAE) -> PNG. eval.py and train.py call the same `Pipeline`.
Answers and the names of written files go to stdout, progress and timings to stderr.

B pictures, L tokens, C width of one CLIP feature, H W pixels.
"""
import argparse
import io
import json
import math
import os
import re
import resource
import sys
import tarfile
import time
from collections import Counter
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError
from tqdm import tqdm

from clip_decoder import PRESETS as DECODER_PRESETS, EvaClip, PixelDecoder, UNet, VAE, save_weights, write_json
from data import (CLAIM, DESCRIBE, EXPAND, PICTURES, BadSample, Tokenizer, chat_ids, crop_square, load_image, pad, preprocess_clip,
                  preprocess_qwen, prompt_ids, scan, smart_resize)
from model import PRESETS, BLIP3o, component, last_real, preset, read_headers

# Steps and guidance of the official pipeline; a checkpoint names its own in config.json as nano_blip3o.sampling.
OFFICIAL = {"steps": 30, "cfg": 3.0, "decoder_steps": 50, "decoder_cfg": 3.0, "expand": False}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# One seed makes noise for four things, each a stream of its own. torch's CPU generator reads only 32 bits of its seed,
# so streams lie MAX_SEED apart: seed + 2^32 would be the same noise again.
FEATURES, DECODER, NEGATIVE, WORDS = 0, 1, 2, 3
MAX_SEED = 10 ** 9
GIB = 2 ** 30
UNET_WORK, VAE_WORK = 13, 7.5                   # working memory in full-size feature maps of the first level's width
LOOK = 448                                      # side of a picture that is part of a drawing's prompt
CONTEXT = 32768                                 # tokens that a model reads whose config.json doesn't say how many
BATCH, DECODER_PIXELS = 16, 4 * 1024 ** 2       # pictures of one batch; the decoder takes fewer where they are large
FRAMES = 8                                      # of --steps-strip
SHARD = 1000                                    # pictures in a shard that --caption writes
LONG, SHORT = "Describe this image in one paragraph of about 90 words.", "Describe this image in one short sentence."
EXPANDED, NUCLEUS = 128, 0.9                    # most tokens of an expanded prompt, and the mass that they are drawn from
SHORT_TOKENS, CAPTION_PIXELS = 32, 1024 * 28 ** 2        # most tokens of a short caption, most pixels of a captioned picture


# ----------------------------------------------------------------------------------------------------------------------
# The pipeline: what a model folder can do
# ----------------------------------------------------------------------------------------------------------------------
class Pipeline:
    """The parts of one model folder, each read from disk when first used, and what they do together.

    device: "auto" is CUDA where there is one, else the CPU. dtype: "auto" is bf16 on CUDA, else fp32; the VAE is always
    fp32. offload: a part leaves memory when the next one comes, so that only the largest must fit. compiled: torch.compile
    the DiT and the UNet. eva: the folder with EVA-CLIP and the diffusion-decoder, if it is another one. Steps and guidance left at None are the checkpoint's own, else the official ones. Whoever has a
    live model assigns `model`, `eva` or `decoder` instead of having it read.
    Raises ValueError for a folder that holds no model, or a device that isn't there.

    A picture depends on its prompt, its seed and the settings alone: not on its batch, nor on what was drawn before.
    """

    def __init__(self, folder, device="auto", dtype="auto", offload=False, compiled=False, eva=None):
        self.folder, self.offload, self.compiled = Path(folder), offload, compiled
        self.eva_folder = Path(eva or folder)
        self.config = self.read("config.json")
        if not self.config:
            raise ValueError(f"there is no model in {folder}: it has no config.json")
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.device)
        ours = self.config.get("nano_blip3o", {})
        self.sampling = {**OFFICIAL, "expand": ours.get("expands", False), **ours.get("sampling", {})}
        self.limits = {}                                             # min_pixels, max_pixels instead of the folder's own
        self.resident = []                                           # the modules that are in memory
        self.seconds = {}                                            # part -> time spent in it
        self.negatives = {}                                          # (seed, steps, guidance) -> (64, C)
        self.expanded = {}                                           # (prompt, seed) -> the prompt in full

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
    def tokenizer(self):
        """The tokenizer; ValueError if it isn't the one that the language model was made for."""
        tokenizer, text = Tokenizer.from_pretrained(self.folder), self.model.config.text
        rows, drawn = text.vocab_size, self.model.config.draws
        if tokenizer.vocab_size > rows or drawn and tokenizer.vocab_size != rows:
            raise ValueError(f"{self.folder / 'tokenizer.json'} makes {tokenizer.vocab_size} tokens, [IMG] and its two "
                             f"companions included, but the language model has {rows}: they belong to different models")
        return tokenizer

    @cached_property
    def model(self):
        """Vision tower, LLM, queries and DiT, as far as the folder has them."""
        model = BLIP3o.from_pretrained(self.folder, "meta", self.dtype).eval()

        def part(name):
            return getattr(BLIP3o.from_pretrained(self.folder, self.device, self.dtype, {name}), name)
        for name in "visual", "llm", "dit", "regressor":
            if getattr(model, name) is not None:
                self.read_when_called(getattr(model, name), partial(part, name), name == "dit")
        if model.latent_queries is not None:
            model.latent_queries = BLIP3o.from_pretrained(self.folder, self.device, self.dtype, {"queries"}).latent_queries
        return model

    @cached_property
    def eva(self):
        """The image encoder."""
        return self.read_when_called(EvaClip.from_pretrained(self.eva_folder, "meta", self.dtype),
                                     lambda: EvaClip.from_pretrained(self.eva_folder, self.device, self.dtype))

    @cached_property
    def decoder(self):
        """The pixel decoder."""
        if not any((self.eva_folder / base / "unet").is_dir() for base in ("diffusion-decoder", ".")):
            raise ValueError(f"there is no diffusion-decoder in {self.eva_folder} to draw from features with: --eva names a "
                             "folder that has one")
        decoder = PixelDecoder.from_pretrained(self.eva_folder, "meta", self.dtype)
        self.read_when_called(decoder.unet, lambda: UNet.from_pretrained(self.eva_folder, self.device, self.dtype), True)
        self.read_when_called(decoder.vae, lambda: VAE.from_pretrained(self.eva_folder, self.device))
        return decoder

    def read_when_called(self, module, read, heavy=False):
        """A module without memory (on the device "meta") that takes its tensors from read() when it, or one of its
        children, is first called. With offload, what was in memory before leaves it. Returns the module."""
        def enter(*_):
            if module in self.resident:
                return
            with self.timed("load"):
                if self.offload:
                    while self.resident:
                        self.resident.pop().to("meta")
                module.load_state_dict(read().state_dict(), assign=True)
                self.resident.append(module)
            if not self.offload:
                for hook in hooks:
                    hook.remove()
                if self.compiled and heavy:
                    # Static shapes: no step compiles anew. Not the hooks: a progress bar can't be compiled.
                    module.forward = torch.compile(module.forward, dynamic=False)
        hooks = [m.register_forward_pre_hook(enter) for m in (module, *module.children())]
        return module

    @contextmanager
    def timed(self, part, module=None, calls=None):
        """Add the time of the block, without that of blocks inside it, to seconds[part]; given a module, a bar counts its
        forward passes up to `calls`."""
        start, before = time.perf_counter(), sum(self.seconds.values())
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
        inside = sum(self.seconds.values()) - before
        self.seconds[part] = self.seconds.get(part, 0) + time.perf_counter() - start - inside

    # ---- text -> features -> pixels ----------------------------------------------------------------------------------

    @torch.no_grad()
    def expand(self, prompts, seeds):
        """Prompts -> what shall be drawn of them, in full: "a red star" becomes "a large red star in the middle on a grey
        background", or something else with another seed. The language model, asked to EXPAND, decides what they leave open.

        A DiT that has to decide it itself does so at every place at once, and places that disagree make no whole picture.
        DALL-E 3 calls this upsampling (Betker et al. 2023, section 3.5). An answer of nothing leaves the prompt as it is.
        """
        todo = [key for key in dict.fromkeys(zip(prompts, seeds, strict=True)) if key not in self.expanded]
        for i in range(0, len(todo), BATCH):
            some = todo[i:i + BATCH]
            told = self.ask([([(EXPAND.format(prompt), None)], [[]]) for prompt, _ in some], EXPANDED, 1.0, top_p=NUCLEUS,
                            generator=[torch.Generator().manual_seed(seed + WORDS * MAX_SEED) for _, seed in some])
            self.expanded |= {key: text.strip() or key[0] for key, text in zip(some, told)}
        return [self.expanded[key] for key in zip(prompts, seeds)]

    def features(self, prompts, seeds, steps=None, guidance=None, images=None, expand=None):
        """One prompt and one seed for each picture -> CLIP features (B, 64, C), fp32.

        images: PIL images that are part of the prompts, one for each, as in the official text + image form. expand: draw
        what `expand` makes of the prompts. Never with images: they leave nothing open.
        """
        rows, looks = self.rows(self.in_full(prompts, seeds, images, expand), images)
        return self.generate(rows, self.noise(seeds, FEATURES), steps, guidance, looks)

    def in_full(self, prompts, seeds, images, expand):
        """The prompts that are drawn: expanded ones where that is wanted (None: as the checkpoint does)."""
        if not all(prompt.strip() for prompt in prompts):
            raise ValueError("the prompt is empty")
        return self.expand(prompts, seeds) if self.setting("expand", expand) and images is None else prompts

    def rows(self, prompts, images=None):
        """Prompts -> their token ids in the template of drawing, and the images as `look` gives them (or None)."""
        if images is None:
            return [prompt_ids(self.tokenizer, prompt) for prompt in prompts], None
        looks = [self.look(image.resize((LOOK, LOOK))) for image in images]         # aspect not kept, as official
        merge = self.model.config.vision.spatial_merge_size ** 2
        return [prompt_ids(self.tokenizer, p, len(patches) // merge) for p, (patches, _) in zip(prompts, looks)], looks

    def noise(self, seeds, stream):
        """Where the features of these seeds begin: (B, C, 8, 8)."""
        config = self.model.config
        if not config.draws:
            raise ValueError(f"the model in {self.folder} has no DiT: it can answer questions, but not draw")
        return draw_noise(seeds, (config.gen_hidden_size, config.grid, config.grid), stream)

    @torch.no_grad()
    def generate(self, rows, noise, steps=None, guidance=None, looks=None):
        """Rows of token ids, [IMG] and queries not among them, and noise (B, C, 8, 8) -> features (B, 64, C), fp32."""
        steps, guidance, model = self.setting("steps", steps), self.setting("cfg", guidance), self.model
        if len(rows) != len(noise):
            raise ValueError(f"{len(rows)} prompts need as many seeds, not {len(noise)}")
        ids, mask = self.padded(rows, 1 + model.config.n_query)                        # (B, L)
        with self.timed("LLM"):
            cond = model.condition(ids, mask, *self.seen(looks))                       # (B, queries, D)
        with self.timed("DiT", model.dit, steps):
            return model.generate_features(cond, steps, guidance, noise.to(self.device))

    def padded(self, rows, more):
        """Rows of ids -> ids and mask (B, L) on the device; ValueError if a row and `more` tokens exceed the context."""
        limit = self.config.get("text_config", self.config).get("max_position_embeddings", CONTEXT)
        if (longest := max(map(len, rows)) + more) > limit:
            raise ValueError(f"the prompt takes {longest} tokens with what comes after it, and the model reads {limit}: "
                             "shorten it")
        return [y.to(self.device) for y in pad(rows)]

    def negative_keys(self, seeds, steps, guidance):
        """What the negative features of these seeds depend on, and those keys among them that are still to be made."""
        keys = [(seed, self.setting("steps", steps), self.setting("cfg", guidance)) for seed in seeds]
        return keys, [key for key in dict.fromkeys(keys) if key not in self.negatives]

    def negative(self, seeds, steps=None, guidance=None):
        """What the decoder's guidance leads away from: features (B, 64, C) that the model makes of a single space.

        No chat template around it, as in the official pipeline. That one draws them once per process and keeps them, so
        that every picture depends on how the process began; here each seed has its own.
        """
        keys, new = self.negative_keys(seeds, steps, guidance)
        if new:
            made = self.generate([self.tokenizer.encode(" ")] * len(new), self.noise([k[0] for k in new], NEGATIVE),
                                 steps, guidance)
            self.negatives |= zip(new, made)
        return torch.stack([self.negatives[key] for key in keys])

    @torch.no_grad()
    def pixels(self, features, seeds, steps=None, guidance=None, size=None, negative=None):
        """Features (B, 64, C) and a seed for each -> pixels (B, 3, H, W) in [0, 1], fp32, on the CPU.

        size: (height, width), the decoder's own if None. negative (B, 64, C): that of `negative` if None.
        """
        if self.model.config.latents:                                # design VAE + FM: the DiT has drawn what the VAE decodes
            if size:
                raise ValueError("a model that draws VAE latents has one size of pictures: leave out --size")
            with self.timed("decoder"):
                z = features.transpose(1, 2).unflatten(2, (self.model.config.grid,) * 2)       # (B, C, h, w)
                return (self.decoder.vae.decode(z) / 2 + 0.5).clamp(0, 1).cpu()
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

    def images(self, prompts, seeds, steps=None, guidance=None, decoder_steps=None, decoder_guidance=None, size=None,
               images=None, expand=None):
        """One prompt and one seed for each picture -> pixels (B, 3, H, W) in [0, 1]; `images`, `expand`: see `features`.

        The features that the decoder's guidance leads away from are drawn in the same batch: the language model and the
        DiT come into memory once.
        """
        self.decoder                                                 # if there is none, say so before the work
        prompts = self.in_full(prompts, seeds, images, expand)
        (rows, looks), noise, n = self.rows(prompts, images), self.noise(seeds, FEATURES), len(prompts)
        keys, new = self.negative_keys(seeds, steps, guidance)
        if self.setting("decoder_cfg", decoder_guidance) == 1 or self.model.config.latents:
            keys, new = [], []
        if new:
            rows = rows + [self.tokenizer.encode(" ")] * len(new)
            noise = torch.cat([noise, self.noise([key[0] for key in new], NEGATIVE)])
        features = self.generate(rows, noise, steps, guidance, looks)
        self.negatives |= zip(new, features[n:])
        negative = torch.stack([self.negatives[key] for key in keys]) if keys else None
        return self.pixels(features[:n], seeds, decoder_steps, decoder_guidance, size, negative)

    def trajectory(self, prompt, seed, steps=None, guidance=None, expand=None):
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
            states.append(self.features([prompt], [seed], steps, guidance, expand=expand))
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
        eva = self.eva                                               # aspect kept and middle cut, as in training
        pixels = torch.cat([preprocess_clip(image, eva.config.image_size) for image in images])    # (B, 3, S, S)
        pixels = torch.cat([pixels, torch.zeros_like(pixels[:1])]).to(self.device, self.dtype)
        with self.timed("EVA"):
            features = eva.encode(pixels).float()                                                  # (B + 1, 64, C)
        seeds = [0] * len(images) if seeds is None else seeds
        negative = features[-1:].expand(len(images), -1, -1)
        return self.pixels(features[:-1], seeds, steps, guidance, negative=negative)

    # ---- pictures and questions -> text ------------------------------------------------------------------------------

    def look(self, image):
        """A PIL image as Qwen's ViT takes it: (patches (N, P), grid (1, 3)), its area between the folder's limits."""
        if self.model.visual is None:
            raise ValueError(f"the model in {self.folder} has no vision tower: it can't look at pictures")
        vision, limits = self.model.config.vision, {**self.read("preprocessor_config.json"), **self.limits}
        return preprocess_qwen(image, vision.patch_size, vision.spatial_merge_size, limits.get("min_pixels"),
                               limits.get("max_pixels"))

    def seen(self, looks):
        """Images as `look` gives them -> pixels (all patches, P) and grid_thw (images, 3) of a batch; None, None of none."""
        if not looks:
            return None, None
        patches, grids = map(torch.cat, zip(*looks))
        return patches.to(self.device, self.dtype), grids.to(self.device)

    def answer(self, image, question, max_new_tokens=64, temperature=0.0, on_text=None):
        """The answer to a question about a PIL image (or None: about nothing); see `reply`."""
        return self.reply([(question, None)], [[] if image is None else [image]], max_new_tokens, temperature, on_text)

    def answers(self, images, questions, max_new_tokens=64, temperature=0.0):
        """The answers to questions about PIL images (or None), one question each, as one batch: a list of strings."""
        return self.ask([([(question, None)], [[] if image is None else [image]])
                         for image, question in zip(images, questions, strict=True)], max_new_tokens, temperature)

    def reply(self, turns, images, max_new_tokens=64, temperature=0.0, on_text=None, **sampling):
        """What the model says next in a conversation: turns [(user, assistant)], the last assistant None; images, a list
        of PIL images for each turn. on_text(piece) hears it as it grows.

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
        text = self.ask([(turns, images)], max_new_tokens, temperature, hear if on_text else None, **sampling)[0]
        if on_text and len(text) > len(told):
            on_text(text[len(told):])
        return text

    @torch.no_grad()
    def ask(self, conversations, max_new_tokens, temperature=0.0, on_token=None, top_p=1.0, repetition_penalty=None,
            generator=None):
        """The next answer in each conversation (turns, images for each turn) of a batch: a list of strings.

        repetition_penalty None is the folder's own, of generation_config.json.
        """
        rows, looks = self.read_turns(conversations)
        ids, mask = self.padded(rows, max_new_tokens)                                  # (B, L)
        if repetition_penalty is None:
            repetition_penalty = self.read("generation_config.json").get("repetition_penalty", 1.0)
        with self.timed("LLM"):
            new = self.model.generate_text(ids, mask, *self.seen(looks), max_new_tokens=max_new_tokens, top_p=top_p,
                                           temperature=temperature, repetition_penalty=repetition_penalty,
                                           on_token=on_token, generator=generator)
        return [self.tokenizer.decode(row) for row in new]

    def read_turns(self, conversations):
        """Conversations as `ask` takes them -> token ids of each, and all their images as `look` gives them."""
        rows, looks = [], []
        for turns, images in conversations:
            if not turns[-1][0].strip():
                raise ValueError("the question is empty")
            shown = [[self.look(image) for image in turn] for turn in images]
            looks += [look for turn in shown for look in turn]
            rows.append(chat_ids(self.tokenizer, turns, [
                [len(patches) // self.model.config.vision.spatial_merge_size ** 2 for patches, _ in turn]
                for turn in shown])[0])
        return rows, looks

    @torch.no_grad()
    def agreement(self, images, prompts):
        """How far PIL images show what prompts say, in the language model's own eyes: (B,) fp32, on the CPU.

        log P("yes") - log P("no") as its answer to CLAIM begins (VQAScore, arXiv 2404.01291); either may be capitalised.
        """
        asked = [([(CLAIM.format(prompt), None)], [[image]]) for image, prompt in zip(images, prompts, strict=True)]
        rows, looks = self.read_turns(asked)
        ids, mask = self.padded(rows, 1)                                               # (B, L)
        with self.timed("LLM"):
            hidden = self.model.hidden(ids, mask, *self.seen(looks))                   # (B, L, D)
            last = hidden[torch.arange(len(ids)), last_real(mask.bool())]
            logits = self.model.llm.head(last).float()                                 # (B, V)
        yes, no = (logits[:, [self.tokenizer.encode(form)[0] for form in (word, word.capitalize())]].logsumexp(1)
                   for word in ("yes", "no"))
        return (yes - no).cpu()

    def best(self, prompts, seeds, k, **sampling):
        """Of k pictures of each prompt the one that agrees best with it: (pixels (B, 3, H, W), its seed for each).

        The model judges its own work: `agreement`. The pictures of seed s have the seeds k s to k s + k - 1, so that the
        chosen one can be drawn again alone. `sampling`: as `images` takes it.
        """
        tried = [[k * seed + j for seed in seeds] for j in range(k)]
        drawn = torch.stack([self.images(prompts, each, **sampling) for each in tried])                # (k, B, 3, H, W)
        liked = torch.stack([self.agreement(list(map(Image.fromarray, to_uint8(each))), prompts) for each in drawn])
        chosen = liked.argmax(0).tolist()                                              # B times one of k
        return torch.stack([drawn[j, i] for i, j in enumerate(chosen)]), [tried[j][i] for i, j in enumerate(chosen)]


    # ---- how much memory ---------------------------------------------------------------------------------------------

    def components(self):
        """{name: module} of what the folder holds, without reading more than headers."""
        model, folder = self.model, self.folder
        found = {"Qwen ViT": model.visual, "LLM": model.llm, "DiT": model.dit, "regressor": model.regressor}
        if (folder / "gen_vision_tower").is_dir() or any(component(key) == "gen_vision_tower" for key in read_headers(folder)):
            found["EVA-CLIP"] = self.eva
        if (folder / "diffusion-decoder").is_dir():
            found |= {"UNet": self.decoder.unet, "VAE": self.decoder.vae}
        return {name: module for name, module in found.items() if module is not None}

    def working_memory(self, name, n, size=None):
        """Bytes that a part needs beside its weights, roughly, for n pictures of a side of `size` pixels (None: the
        decoder's own): its largest intermediate results."""
        bytes, n, config = self.dtype.itemsize, min(n, BATCH), self.model.config
        if name in ("LLM", "Qwen ViT"):                              # 256 tokens or 1024 patches: SwiGLU's three, and residuals
            sizes = config.text if name == "LLM" else config.vision
            return (256 if name == "LLM" else 1024) * n * (3 * sizes.intermediate_size + 8 * sizes.hidden_size) * bytes
        if name == "DiT":                                            # the condition's keys and values in every layer, too
            return 128 * n * (3 * config.dit.ffn_dim + (8 + 2 * config.dit.n_layers) * config.dit.dim) * bytes
        if name == "regressor":
            return n * config.n_query * config.mse_channels * bytes
        if name == "EVA-CLIP":
            return n * self.eva.config.image_size ** 2 // self.eva.config.patch_size ** 2 * self.eva.config.mlp_hidden * 2 * bytes
        unet, vae = self.decoder.unet.config, self.decoder.vae
        side = size // vae.factor if size else unet.sample_size
        n = max(1, min(n, DECODER_PIXELS // (side * vae.factor) ** 2))
        if name == "UNet":                                           # and the largest weight once more, in another order
            largest = max(p.nbytes for p in self.decoder.unet.parameters())
            return int(UNET_WORK * 2 * n * side ** 2 * unet.block_out_channels[0] * bytes) + largest
        return int(VAE_WORK * n * (side * vae.factor) ** 2 * vae.config.block_out_channels[0] * 4)

    def peak_memory(self):
        """Most bytes that were in use so far: of the GPU, else of this process (Python and PyTorch themselves included)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024     # macOS counts bytes, Linux KiB


class Blueprint(Pipeline):
    """A Pipeline of an official size without files and without memory, for --dry-run: everything on the device "meta"."""

    def __init__(self, name, device="auto", dtype="auto", *_):
        self.folder, self.device, self.seconds = Path(name), pick_device(device), {}
        self.dtype = pick_dtype(dtype, self.device)
        with torch.device("meta"):
            sizes = DECODER_PRESETS["official"]
            self.model, self.eva = BLIP3o(preset(name)).to(self.dtype), EvaClip(sizes["clip"]).to(self.dtype)
            unet, vae = UNet(sizes["unet"]).to(self.dtype), VAE(sizes["vae"])
        self.decoder = PixelDecoder(unet, vae)

    def components(self):
        """{name: module}: all."""
        return {"Qwen ViT": self.model.visual, "LLM": self.model.llm, "DiT": self.model.dit, "EVA-CLIP": self.eva,
                "UNet": self.decoder.unet, "VAE": self.decoder.vae}


BLUEPRINTS = tuple(name for name in PRESETS if name != "nano")       # nano's vocabulary is its tokenizer's


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
    """--prompt: a file for each picture, picture i with seed + i; a grid of all if they are several. --best-of k: each is the
    one of k that the model itself likes best, and its file has its own seed.

    --draw: the same of an --image and a --prompt together. Returns the path of the last file.
    """
    seeds, about, drawn = range(args.seed, args.seed + args.n), settings(pipe, args), []
    image = None if args.image is None else load_image(args.image)
    for i in tqdm(range(0, args.n, BATCH), desc="batches", leave=False, disable=None if args.n > BATCH else True):
        batch = seeds[i:i + BATCH]
        sampling = {"steps": args.steps, "guidance": args.cfg, "decoder_steps": args.decoder_steps,
                    "decoder_guidance": args.decoder_cfg, "size": args.size and (args.size,) * 2, "expand": args.expand}
        if args.best_of > 1:
            pictures, batch = pipe.best([args.prompt] * len(batch), batch, args.best_of, **sampling)
        else:
            pictures = pipe.images([args.prompt] * len(batch), batch, **sampling, images=image and [image] * len(batch))
        drawn.append(pictures)
        for seed, picture in zip(batch, pictures):
            if told := pipe.expanded.get((args.prompt, seed)):
                print(f"seed {seed}: {told}", file=sys.stderr)
            path = save(picture, args.out, f"{slug(args.prompt)}-{seed}", {**about, "seed": seed})
    if args.n > 1:
        path = save(grid(torch.cat(drawn)), args.out, f"{slug(args.prompt)}-{seeds[0]}-to-{seeds[-1]}", {**about, "n": args.n})
    return str(path)


def strip(pipe, args):
    """--steps-strip: the way of one picture from noise, FRAMES of its steps from left to right.

    Upper row: what the decoder makes of the state x_t itself. Lower row: of the data that the DiT sees from there. The
    decoder's own noise is the same in all of them.
    """
    states, guesses = pipe.trajectory(args.prompt, args.seed, args.steps, args.cfg, args.expand)
    chosen = torch.linspace(0, len(states) - 1, min(FRAMES, len(states))).round().long()
    features = torch.cat([states[chosen], guesses[chosen]])                           # (2 FRAMES, 64, C)
    pictures = pipe.pixels(features, [args.seed] * len(features), args.decoder_steps, args.decoder_cfg,
                           args.size and (args.size,) * 2)
    about = {**settings(pipe, args), "frames": len(chosen)}
    save(grid(pictures, len(chosen)), args.out, f"{slug(args.prompt)}-{args.seed}-steps", about)
    print(f"left to right: after {', '.join(map(str, chosen.tolist()))} steps; upper row: the state itself, lower row: "
          "the picture it is heading for", file=sys.stderr)


def settings(pipe, args):
    """All that a picture depends on."""
    return {"prompt": args.prompt, "seed": args.seed, "ckpt": args.ckpt, **({"image": args.image} if args.image else {}),
            **({"size": args.size} if args.size else {}),
            **{name: pipe.setting(name, getattr(args, name)) for name in OFFICIAL}}


def reconstruct(pipe, args):
    """--image --reconstruct: the middle square of the picture, and beside it what its 64 features keep."""
    image = load_image(args.image)
    after = pipe.reconstruct([image], [args.seed], args.decoder_steps, args.decoder_cfg)[0]                # (3, H, W)
    before = torch.from_numpy(np.array(crop_square(image, after.shape[-1]))).permute(2, 0, 1) / 255
    save(grid(torch.stack([before, after]), 2), args.out, f"{slug(Path(args.image).stem)}-reconstructed",
         settings(pipe, args))


def tell(text):
    """Show a piece of an answer as it comes."""
    print(text, end="", flush=True)


def answer(pipe, args):
    """--image and maybe --prompt: the answer, on stdout, as it grows."""
    question = DESCRIBE if args.prompt is None else args.prompt
    pipe.reply([(question, None)], [[load_image(args.image)]], args.max_new_tokens, args.temperature, tell,
               top_p=args.top_p, repetition_penalty=args.repetition_penalty)
    print()


CHAT = """Write a message and press Enter. @path/to/picture.png anywhere in it shows a picture.
/image a red circle   draws; what you write next is about that picture
/edit make it blue    draws the last picture, drawn or shown, anew with a change
/new   begins a new conversation      /quit or Ctrl-D   ends"""


def chat(pipe, args):
    """--chat: a conversation, line by line from stdin. A mistake costs a line, not the conversation."""
    print(CHAT, file=sys.stderr)
    turns, images, drawn, last, new = [], [], 0, None, False         # last: the last picture; new: not asked about yet
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        text = line.strip()
        if not line or text == "/quit":
            return
        try:
            if text == "/new":
                turns, images, last, new = [], [], None, False
            elif text.split()[:1] in (["/image"], ["/edit"]):
                command, _, args.prompt = text.partition(" ")
                args.image = last if command == "/edit" else None
                if command == "/edit" and last is None:
                    raise ValueError("there is no picture to change yet: draw one with /image or show one with @")
                seed, drawn = args.seed + drawn, drawn + 1
                last, new = draw(pipe, argparse.Namespace(**{**vars(args), "seed": seed, "n": 1})), True
            elif text.startswith("/"):
                raise ValueError(f"there is no command {text.split()[0]}: use /image, /edit, /new or /quit")
            elif text:
                paths = re.findall(r"(?:^|(?<=\s))@(\S+)", text)
                if new and not paths:                                # the talk about a drawn picture begins with it
                    turns, images, paths = [], [], [last]
                shown = [load_image(path) for path in paths]
                last, new = paths[-1] if paths else last, False
                said = re.sub(r"(?:^|(?<=\s))@\S+\s?", "", text).strip() or DESCRIBE
                reply = pipe.reply([*turns, (said, None)], [*images, shown], args.max_new_tokens, args.temperature, tell,
                                   top_p=args.top_p, repetition_penalty=args.repetition_penalty)
                print()
                turns, images = [*turns, (said, reply)], [*images, shown]
        except ValueError as error:
            print(error, file=sys.stderr)


def caption(pipe, args):
    """--caption: a folder of pictures (or a pattern, or one file) -> out/00000.tar, ..., which train.py --data reads.

    out/captions.jsonl is what is done: a line for each picture, written with its batch. A run that was killed goes on behind
    the last whole line, and one with new pictures behind the old ones; a shard is a function of its thousand lines.
    """
    root, out = Path(args.caption), Path(args.out)
    found = root.rglob("*") if root.is_dir() else [root] if root.exists() else root.parent.glob(root.name)
    pictures = sorted(path for path in found if path.suffix.lower() in PICTURES)
    if not pictures:
        raise ValueError(f"there is no picture ({', '.join(PICTURES)}) at {root}")
    out.mkdir(parents=True, exist_ok=True)
    about = {key: getattr(args, key)
             for key in ("ckpt", "instruction", "short_instruction", "max_new_tokens", "temperature")}
    if (out / "captions.json").exists() and (old := json.loads((out / "captions.json").read_text("utf-8"))) != about:
        raise ValueError(f"{out} holds captions made with {old}: choose another --out, or the same settings")
    write_json(out / "captions.json", about)
    limit = pipe.read("preprocessor_config.json").get("max_pixels", CAPTION_PIXELS)
    pipe.limits.setdefault("max_pixels", min(limit, CAPTION_PIXELS))
    with open(out / "captions.jsonl", "a+b") as log:
        log.seek(0)
        whole = log.read().rpartition(b"\n")[0].splitlines()          # the last line may have been cut by a kill
        log.truncate(sum(len(line) + 1 for line in whole))
        done = {line["image"]: line for line in map(json.loads, whole)}
        told, written = [line for line in done.values() if "skipped" not in line], 0
        todo = [path for path in pictures if os.path.relpath(path, out) not in done]
        for i in tqdm(range(0, len(todo) + 1, BATCH), desc="batches", disable=None):         # the last one may be empty
            new = describe(pipe, args, todo[i:i + BATCH], out)
            log.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in new).encode())
            log.flush()
            os.fsync(log.fileno())
            done |= {line["image"]: line for line in new}
            told += [line for line in new if "skipped" not in line]
            last = i + BATCH > len(todo)                             # then the rest makes a smaller shard
            for written in range(written, -(-len(told) // SHARD) if last else len(told) // SHARD):
                write_shard(out, written, told[written * SHARD:(written + 1) * SHARD])
                written += 1
    bad = Counter(line["skipped"] for line in done.values() if "skipped" in line)
    print(f"{len(told)} pictures with captions in {written} shards; skipped: "
          f"{', '.join(f'{n} {cause}' for cause, n in bad.items()) or 'none'}", file=sys.stderr)


def describe(pipe, args, paths, out):
    """Captions of a batch of picture files: a dict for each, {"image" (relative to out), "caption", "short_caption"}, or
    "skipped" with the cause why there is none."""
    lines, images = [{"image": os.path.relpath(path, out)} for path in paths], {}
    for i, path in enumerate(paths):
        try:
            images[i] = load_image(path)
            smart_resize(images[i].height, images[i].width)          # is it too narrow to be seen?
        except ValueError as error:
            images.pop(i, None)
            lines[i]["skipped"] = error.cause if isinstance(error, BadSample) else "too narrow"
    for key, question, most in (("caption", args.instruction, args.max_new_tokens),
                                ("short_caption", args.short_instruction, min(SHORT_TOKENS, args.max_new_tokens))):
        told = pipe.ask([([(question, None)], [[image]]) for image in images.values()], most, args.temperature,
                        top_p=args.top_p, repetition_penalty=args.repetition_penalty) if images else []
        for i, text in zip(images, told):
            if len(pipe.tokenizer.encode(text)) >= most - 1:         # cut off: end with the last whole sentence, if any
                text = re.sub(r"(?s)(.*[.!?]).*", r"\1", text)
            if text.strip():
                lines[i][key] = text.strip()
            elif key == "caption":
                lines[i]["skipped"] = "empty caption"
    return lines


def write_shard(out, number, lines):
    """Write out/NNNNN.tar of these lines, whole, unless it is there: pictures as they are, key.txt and key.json.

    Shards are written in turn, so of those that are there only the last can lack samples that came later.
    """
    path, following = (out / f"{k:05d}.tar" for k in (number, number + 1))
    if path.exists() and (following.exists() or len(scan(path)[0]) == len(lines)):
        return
    shard = path.with_suffix(".tar.tmp")
    with open(shard, "wb") as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for i, line in enumerate(lines):
                picture, key = out / line["image"], f"{number * SHARD + i:09d}"
                texts = {name: line[name] for name in ("caption", "short_caption") if name in line}
                for suffix, content in ((picture.suffix.lower(), picture.read_bytes()), (".txt", line["caption"].encode()),
                                        (".json", json.dumps({**texts, "source": picture.name}).encode())):
                    member = tarfile.TarInfo(key + suffix)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        file.flush()
        os.fsync(file.fileno())
    os.replace(shard, path)
    print(path, flush=True)


def export(pipe, args):
    """--export diffusers DIR: unet, vae, scheduler and transformer in diffusers' layout, in the precision of --dtype.

    The transformer is a LuminaNextDiT2DModel. What BLIP3-o puts in front of it, caption_projection, lies beside it (keys of
    diffusers' PixArtAlphaTextProjection); its 3D RoPE, if it has that, is the caller's to pass: the class takes a table.
    """
    target, decoder = Path(args.export[1]), PixelDecoder.from_pretrained(args.ckpt, dtype=pipe.dtype)
    decoder.unet.save_pretrained(target / "unet")
    decoder.vae.save_pretrained(target / "vae")
    decoder.schedule.save_pretrained(target / "scheduler")
    if pipe.model.dit is not None:
        dit = BLIP3o.from_pretrained(args.ckpt, dtype=pipe.dtype, parts={"dit"}).dit
        c, projection = dit.config, dit.caption_projection
        write_json(target / "transformer" / "config.json", {
            "_class_name": "LuminaNextDiT2DModel", "sample_size": pipe.model.config.grid, "patch_size": c.patch_size,
            "in_channels": c.in_channels, "hidden_size": c.dim, "num_layers": c.n_layers, "num_attention_heads": c.n_heads,
            "num_kv_heads": c.n_kv_heads, "multiple_of": 1, "ffn_dim_multiplier": (c.ffn_dim + 0.5) / (8 * c.dim // 3),
            "norm_eps": c.norm_eps, "learn_sigma": False, "qk_norm": True, "cross_attention_dim": c.dim})
        save_weights(projection, target / "caption_projection" / "diffusion_pytorch_model.safetensors")
        del dit.caption_projection                                   # diffusers' class takes its output; has an idle pad_token
        dit.pad_token = torch.nn.Parameter(torch.zeros(c.dim, dtype=pipe.dtype))
        save_weights(dit, target / "transformer" / "diffusion_pytorch_model.safetensors")
    for folder in sorted(target.iterdir()):
        print(folder)


def dry_run(pipe, args):
    """--dry-run: what each part takes, and the most memory that drawing and answering need; nothing is read but headers."""
    sizes = {name: (sum(p.numel() for p in m.parameters()), sum(p.nbytes for p in m.parameters()))
             for name, m in pipe.components().items()}
    print(f"{args.ckpt} in {str(pipe.dtype).removeprefix('torch.')}, on {pipe.device.type}")
    print(f"{'':16}{'parameters':>16}{'GiB':>9}")
    for name, (count, bytes) in sizes.items():
        print(f"{name:16}{count:16,}{bytes / GIB:9.3f}")
    print(f"{'all':16}{sum(c for c, _ in sizes.values()):16,}{sum(b for _, b in sizes.values()) / GIB:9.3f}")
    print(f"\n{'peak, GiB':16}{'':>9}{'at once':>16}{'--offload':>12}")
    for task, parts in (("draw", ("LLM", "DiT", "UNet", "VAE")), ("answer", ("Qwen ViT", "LLM")),
                        ("reconstruct", ("EVA-CLIP", "UNet", "VAE"))):
        if all(name in sizes for name in parts):
            work = {name: pipe.working_memory(name, args.n, args.size) for name in parts}
            together = sum(sizes[name][1] for name in parts) + max(work.values())
            apart = max(sizes[name][1] + work[name] for name in parts)
            print(f"{task:25}{(pipe.peak_memory() + together) / GIB:16.3f}{(pipe.peak_memory() + apart) / GIB:12.3f}")


# What each command does.
COMMANDS = {"draw": draw, "strip": strip, "answer": answer, "reconstruct": reconstruct, "chat": chat, "caption": caption,
            "export": export, "dry-run": dry_run}


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
    add("--best-of", type=int, default=1, help="draw so many for each picture and keep the one that the model, asked, finds to "
        "show the --prompt best")
    add("--expand", action=argparse.BooleanOptionalAction, help="let the language model tell the --prompt in full before it is "
        "drawn (as the checkpoint does; official ones don't)")
    add("--steps", type=int, help="Euler steps of the DiT (the checkpoint's, else 30)")
    add("--cfg", type=float, help="guidance of the DiT, 1 for none (the checkpoint's, else 3)")
    add("--decoder-steps", type=int, help="steps of the pixel decoder (the checkpoint's, else 50)")
    add("--decoder-cfg", type=float, help="guidance of the pixel decoder, 1 for none (the checkpoint's, else 3)")
    add("--size", type=int, help="side of drawn pictures in pixels (the decoder's own: 1024 for official weights)")
    add("--draw", action="store_true", help="draw from --image and --prompt together instead of answering")
    add("--chat", action="store_true", help="a conversation on the terminal, with pictures both ways")
    add("--caption", metavar="IMAGES", help="caption a folder of pictures; --out gets tar shards that train.py reads")
    add("--instruction", default=LONG, help="--caption: what to ask for the long caption")
    add("--short-instruction", default=SHORT, help="--caption: what to ask for the short one")
    add("--max-new-tokens", type=int, default=128, help="longest answer")
    add("--temperature", type=float, default=0.0, help="of answers; 0 always takes the likeliest token")
    add("--top-p", type=float, default=1.0, help="with --temperature: draw from the likeliest tokens of this mass")
    add("--repetition-penalty", type=float, help="above 1: use no token twice without need (the checkpoint's, else 1)")
    add("--min-pixels", type=int, help="smaller pictures are enlarged before the language model sees them")
    add("--max-pixels", type=int, help="larger pictures are reduced before the language model sees them")
    add("--ckpt", default=str(Path(__file__).parent / "weights" / "nano"), help="model folder (weights/nano)")
    add("--eva", help="folder with EVA-CLIP and the diffusion-decoder, if --ckpt has none (as train.py's)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", default="auto", help=f"auto, {', '.join(DTYPES)}")
    add("--offload", action="store_true", help="keep only the part in memory that works: for small machines")
    add("--compile", action="store_true", help="torch.compile DiT and UNet: slower for one picture, faster for many")
    add("--dry-run", action="store_true", help="print what the parts take of memory; --ckpt 4b and 8b need no files")
    add("--export", nargs=2, metavar=("diffusers", "DIR"), help="write DiT, UNet and VAE in diffusers' layout")
    add("--out", default="runs/samples", help="folder for pictures")
    args = parser.parse_args(argv)

    wrong = [  # (is it so?, what to say)
        (args.prompt is None and args.image is None and not (args.chat or args.dry_run or args.export or args.caption),
         "say what to do: --prompt draws, --image with --prompt answers, --chat talks"),
        *((getattr(args, name) and (args.prompt is not None or args.image is not None),
           f"--{name} takes no --prompt and no --image") for name in ("chat", "caption")),
        (args.export is not None and args.export[0] != "diffusers", f"--export writes for diffusers, not {args.export and args.export[0]}"),
        (args.size is not None and (args.image is not None and not args.draw), "--size is for pictures that are drawn of a --prompt"),
        (args.draw and (args.image is None or args.prompt is None), "--draw needs an --image and a --prompt"),
        (args.compile and args.offload, "--compile needs the parts to stay in memory: leave out --offload"),
        (args.temperature < 0 or not 0 < args.top_p <= 1, "--temperature can't be negative, and --top-p lies between 0 and 1"),
        (args.repetition_penalty is not None and args.repetition_penalty <= 0, "--repetition-penalty must be positive"),
        (args.prompt is not None and not args.prompt.strip(), "the prompt is empty"),
        (args.reconstruct and args.image is None, "--reconstruct needs an --image"),
        (args.reconstruct and args.prompt is not None, "--reconstruct takes no --prompt"),
        (args.steps_strip and args.image is not None, "--steps-strip draws a --prompt and takes no --image"),
        (args.n > 1 and (args.steps_strip or args.chat or args.image is not None and not args.draw),
         "--n is for pictures that are drawn of a --prompt"),
        (args.best_of > 1 and (args.prompt is None or args.image is not None or args.steps_strip),
         "--best-of is for pictures that are drawn of a --prompt alone"),
        ((args.seed + args.n) * args.best_of > MAX_SEED or args.seed < 0, f"seeds must lie between 0 and {MAX_SEED - 1}"),
        *((value is not None and value < 1, f"--{name.replace('_', '-')} must be at least 1, not {value}")
          for name, value in vars(args).items()
          if name in ("n", "steps", "decoder_steps", "size", "max_new_tokens", "min_pixels", "max_pixels", "best_of")),
        *((value is not None and not 0 <= value < math.inf, f"--{name.replace('_', '-')} can't be {value}")
          for name, value in vars(args).items() if name in ("cfg", "decoder_cfg")),
    ]
    for so, what in wrong:
        if so:
            raise ValueError(what)
    for name in "dry_run", "export", "chat", "caption":
        if getattr(args, name):
            return name.replace("_", "-"), args
    if args.image is not None and not args.draw:
        return "reconstruct" if args.reconstruct else "answer", args
    return "strip" if args.steps_strip else "draw", args


def main(argv=None):
    """Run one command; returns the exit code: 0, 2 after a mistake (one sentence on stderr), 130 after Ctrl-C."""
    try:
        name, args = parse(argv)
        kind = Blueprint if name == "dry-run" and args.ckpt in BLUEPRINTS and not Path(args.ckpt).exists() else Pipeline
        pipe = kind(args.ckpt, args.device, args.dtype, args.offload, args.compile, args.eva)
        pipe.limits = {key: getattr(args, key) for key in ("min_pixels", "max_pixels") if getattr(args, key)}
        COMMANDS[name](pipe, args)
        if pipe.seconds:
            print(", ".join(f"{part} {seconds:.1f} s" for part, seconds in pipe.seconds.items())
                  + f"; at most {pipe.peak_memory() / GIB:.2f} GiB of memory", file=sys.stderr)
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
