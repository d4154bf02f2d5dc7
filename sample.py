"""Every use of a trained model, from the command line.

    python sample.py --prompt "a red circle above a blue square" --n 4     images
    python sample.py --prompt "a red circle" --steps-strip                 one image on its way from noise
    python sample.py --prompt "a red circle | a blue star" --steps-gif     images on their way, as a GIF
    python sample.py --explain "a red circle left of a blue star"          a look inside, as a page
    python sample.py --prompt "a red circle" --contact-sheet               all that it does, in one image
    python sample.py --image cat.png --prompt "What is this?"              an answer, token by token
    python sample.py --image cat.png --reconstruct                         image -> 64 features -> image
    python sample.py --image cat.png --prompt "the same in snow" --draw    an image from an image and a text
    python sample.py --chat                                                text and images, both ways
    python sample.py --caption IMAGES --ckpt FOLDER --out shards/          images become training data
    python sample.py --ckpt FOLDER --dry-run                               what fits into this machine?
    python sample.py --ckpt FOLDER --export diffusers DIR                  DiT, UNet and VAE for diffusers

From prompt to pixels, top to bottom in Pipeline: upsample_prompts (where the checkpoint wants it) ->
prompt_rows (template, tokens) -> query_states (LLM, 64 queries) -> generate (flow.py steps through dit.py)
-> pixels (UNet, VAE) -> PNG. eval.py uses the same `Pipeline`. Answers and the names of written
files go to stdout, progress and timings to stderr.

B images, L tokens, C channels of a CLIP feature, D width of the LLM, H W pixels.
"""
import argparse
import glob
import hashlib
import html
import json
import math
import os
import re
import shutil
import sys
import tarfile
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import data
from checkpoint import (
    COUNT,
    FRACTION,
    Int8,
    Interval,
    Parser,
    activation_dtype,
    atomic_write,
    below,
    empty,
    file_lock,
    fill,
    folder_parts,
    from_json,
    map_large_tensors,
    model_digest,
    model_folder,
    number,
    open_file,
    parse_json,
    read_file,
    read_json,
    require_settings,
    run_command,
    save_weights,
    section,
    sentence,
    stacked_layers,
    typed,
    write_json,
)
from clip_decoder import EvaClip, PixelDecoder
from flow import timesteps
from model import CHOICES, SAMPLING, BLIP3o, last_real, read_sampling

# Of the official pipeline; a checkpoint names its own in config.json, under nano_blip3o.sampling.
OFFICIAL = {"steps": 30, "cfg": 3.0, "decoder_steps": 50, "decoder_cfg": 3.0, "upsample": False,
            "sampler": "euler", "cfg_interval": [0.0, 1.0], "decoder_sampler": "euler",
            "decoder_spacing": "leading"}
SAMPLERS = ("sampler", "cfg_interval", "decoder_sampler", "decoder_spacing")     # set for all of a Pipeline
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# One seed drives four independent streams of noise, MAX_SEED apart: torch's CPU generator uses only 32 bits
# of a seed.
FEATURES, DECODER, NEGATIVE, TEXT = 0, 1, 2, 3
MAX_SEED = 10 ** 9
BATCH = 16                              # images or conversations of a batch
DECODER_PIXELS = 4 * 1024 ** 2          # of one batch of the decoder
PROMPT_IMAGE = 448                      # side of an image inside a prompt
CONTEXT = 32768                         # context length of a model whose config.json doesn't state it
UPSAMPLED_TOKENS, NUCLEUS = 128, 0.9    # longest upsampled prompt, and the top-p that it is sampled with
GIF_PROMPTS = 4                         # of --steps-gif, at most
LEAST = 256                             # pixels that a side of a saved image has at least
OUT = "runs/samples"                    # --out
LINE = 100_000                          # characters of a line of --chat
TEXTS = ("prompt", "explain", "instruction", "short_instruction")
LONG = "Describe this image in one paragraph of about 90 words."
SHORT = "Describe this image in one short sentence."
SHORT_TOKENS = 32                       # longest short caption
CAPTION_PIXELS = 1024 * 28 ** 2         # larger images are reduced before they are captioned
SHARD = 1000                            # captioned images in a shard
NO_IMAGES = (".txt", ".json", ".jsonl", ".tar")          # files that may well lie beside images
GIB = 2 ** 30


# ---- how a folder samples answers -------------------------------------------------------------------------

@dataclass(frozen=True)
class AnswerConfig:
    """Fields of generation_config.json, defaults as in transformers. Without do_sample: greedy."""
    do_sample: bool = False
    temperature: float = field(default=1.0, metadata={"interval": Interval(0, 1000)})
    top_p: float = field(default=1.0, metadata={"interval": Interval(above=0, most=1)})
    top_k: int = field(default=50, metadata={"interval": Interval(0, 10 ** 9)})      # 0: of all tokens
    repetition_penalty: float = field(default=1.0, metadata={"interval": Interval(above=0, most=1000)})


# Fields of transformers' GenerationConfig that change answers, with the only values implemented. Ids of
# tokens are read by model.py; lengths come from the command line; the rest is about speed and output.
ANSWER_FIXED = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "encoder_repetition_penalty", "typical_p", "top_h",
                     "guidance_scale", "num_return_sequences"), (1,)),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
                     "min_p", "epsilon_cutoff", "eta_cutoff", "penalty_alpha", "diversity_penalty"), (0,)),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias",
                     "constraints", "force_words_ids", "stop_strings", "forced_bos_token_id",
                     "forced_eos_token_id", "exponential_decay_length_penalty", "watermarking_config",
                     "dola_layers", "token_healing"), ([], {}, False))}


class TooLong(ValueError):
    """A prompt or a conversation that the model's context can't hold."""


# ---- the pipeline: what a model folder can do -------------------------------------------------------------

class Pipeline:
    """The parts of one model folder, each read from disk when first used, and what they do together.

    device    "auto" is CUDA where there is one, else the CPU
    dtype     "auto" is bf16 on CUDA, else fp32; "int8": large linear layers in int8, all else as "auto"; the
              VAE is always fp32
    offload   True: keep only one component in memory at a time; "layers": of its stacked layers also one;
              both change how this process allocates, see checkpoint.map_large_tensors
    compiled  torch.compile the DiT and the UNet
    eva       the folder with EVA-CLIP and the diffusion-decoder, if it is another one

    Steps, guidance and upsampling left at None are those of `sampling`, a dict of OFFICIAL's names: the
    checkpoint's own, else the official ones. SAMPLERS are set there alone. Whoever has a live model assigns
    `model`, `eva` or `decoder` instead of having it read. Up to rounding, an image depends on its prompt,
    its seed and the settings alone: not on its batch, nor on what was generated before. Raises ValueError
    for a folder that holds no model, or a device that isn't there.
    """

    def __init__(self, folder, device="auto", dtype="auto", offload=False, compiled=False, eva=None):
        if offload not in (False, True, "layers"):
            raise ValueError(f"offload is False, True or 'layers', not {offload!r}")
        if offload:
            map_large_tensors()         # not otherwise: it takes small models more time
        self.folder, self.offload, self.compiled = model_folder(folder), offload, compiled
        self.eva_folder = model_folder(eva or folder)
        self.config = self.read("config.json")
        if not self.config:
            raise ValueError(f"there is no model in {folder}: it has no config.json")
        self.device = pick_device(device)
        self.precision = pick_dtype(dtype, self.device)              # of the weights, maybe Int8
        self.dtype = activation_dtype(self.precision)
        file = self.folder / "config.json"
        upsample = section(self.config, "nano_blip3o", file).get("upsample_prompts", False)
        upsample = typed(upsample, bool, None, f"{file}: nano_blip3o.upsample_prompts")
        self.sampling = OFFICIAL | {"upsample": upsample} | read_sampling(self.config, file)
        self.limits = {}                # min_pixels, max_pixels instead of the folder's own
        self.resident = []              # the modules that are in memory
        self.seconds = {}               # part -> time spent in it
        self.negatives = {}             # what `negative_keys` says -> features (64, C); see `negative`
        self.upsampled = {}             # (prompt, seed, and an image's hash if any) -> upsampled prompt

    def read(self, name):
        """The object in a JSON file of the folder; {} where there is no such file."""
        file = self.folder / name
        return read_json(file) if file.is_file() else {}

    def setting(self, name, value=None):
        """One of OFFICIAL: the value if given, else the checkpoint's."""
        return self.sampling[name] if value is None else value

    # -- the parts, read when they are first called --

    @cached_property
    def tokenizer(self):
        """The tokenizer; ValueError if it isn't the one that the language model was made for."""
        tokenizer, config = data.Tokenizer.from_pretrained(self.folder), self.model.config
        # [IMG] and its two companions are for generation; a language model may have rows to spare.
        size, rows = tokenizer.vocab_size if config.generates else tokenizer.n_text, config.text.vocab_size
        if size > rows or (config.generates and size != rows):
            raise ValueError(f"{self.folder / 'tokenizer.json'} makes {size} tokens, but the language model "
                             f"has {rows}: they belong to different models")
        return tokenizer

    @cached_property
    def model(self):
        """Vision tower, LLM, queries and DiT, as far as the folder has them."""
        model = BLIP3o.from_pretrained(self.folder, "meta", self.precision)
        for name in ("visual", "llm", "dit", "regressor"):
            module = getattr(model, name)
            if module is not None:
                module.sources = below(model.sources, f"{name}.")
                self.load_when_called(module, compile_target=name == "dit")
        queries = {name: tensor for name, tensor in model.sources.items() if name == "latent_queries"}
        fill(model, queries, self.device)
        return model

    @property
    def pixel_limits(self):
        """{"min_pixels", "max_pixels"} of what the language model sees, as far as anybody says them."""
        vision = self.model.config.vision
        if vision is None:
            raise ValueError(f"the model in {self.folder} has no vision tower: it can't read images")
        own = data.read_pixel_limits(self.folder, vision.patch_size, vision.spatial_merge_size)
        limits = own | self.limits
        if limits.get("min_pixels", 0) > limits.get("max_pixels", math.inf):
            raise ValueError(f"min_pixels {limits['min_pixels']} is above max_pixels {limits['max_pixels']} "
                             f"(--min-pixels, --max-pixels, or {self.folder}'s own)")
        return limits

    @cached_property
    def answer_config(self):
        """How the folder samples answers; ValueError if generation_config.json asks for more."""
        file = self.folder / "generation_config.json"
        raw = {name: value for name, value in self.read(file.name).items() if value is not None}
        require_settings(raw, ANSWER_FIXED, file)
        return from_json(AnswerConfig, raw, file)

    @cached_property
    def eva(self):
        """The image encoder."""
        return self.load_when_called(EvaClip.from_pretrained(self.eva_folder, "meta", self.precision))

    @cached_property
    def digest(self):
        """A hash of the folders that images depend on; see checkpoint.model_digest."""
        return model_digest(*dict.fromkeys((self.folder, self.eva_folder)))

    @cached_property
    def decoder(self):
        """The pixel decoder; ValueError if the folder has none."""
        if "unet" not in folder_parts(self.eva_folder):
            raise ValueError(f"there is no diffusion-decoder in {self.eva_folder} to decode features with: "
                             "--eva names a folder that has one")
        decoder = PixelDecoder.from_pretrained(self.eva_folder, "meta", self.precision)
        config, takes = self.model.config, decoder.unet.config.cross_attention_dim
        if config.generates and not config.latents and takes != config.gen_hidden_size:
            raise ValueError(f"the diffusion-decoder in {self.eva_folder} takes features of {takes} "
                             f"channels, the model in {self.folder} makes {config.gen_hidden_size}: name "
                             "another folder with --eva")
        self.load_when_called(decoder.unet, compile_target=True)
        self.load_when_called(decoder.vae)
        return decoder

    def load_when_called(self, module, compile_target=False):
        """Lazy loading: a module on the device "meta" gets the weights that its `sources` name when it is
        called. With offload, what was in memory before leaves it; with "layers" the module's stacked layers,
        too, come and leave as they are called. Returns the module.
        """
        names = stacked_layers(module) if self.offload == "layers" else []
        layers = [below(module.sources, f"{name}.") for name in names]
        inside = tuple(f"{name}." for name in names)
        module.sources = {key: tensor for key, tensor in module.sources.items()
                          if not key.startswith(inside)}

        self.fill_when_called(module, module.sources, self.resident, compile_target)
        turns = []
        for name, tensors in zip(names, layers):
            self.fill_when_called(module.get_submodule(name), tensors, turns)
        return module

    def fill_when_called(self, module, tensors, resident, compile_target=False):
        """`fill` a module at the first forward of it or of a child, and put it into the list `resident`:
        with offload instead of what is there, and again whenever it was emptied."""
        def enter(*_):
            if not next(module.parameters()).is_meta:                # the first is in no stack
                return
            with self.timed("load"):
                while self.offload and resident:
                    empty(resident.pop())
                fill(module, tensors, self.device)
                resident.append(module)
            if not self.offload:
                for hook in hooks:
                    hook.remove()
                if self.compiled and compile_target:
                    # Static shapes: no step recompiles. Only forward: progress bars' hooks can't be traced.
                    module.forward = torch.compile(module.forward, dynamic=False)
        hooks = [m.register_forward_pre_hook(enter) for m in (module, *module.children())]

    @contextmanager
    def timed(self, part, module=None, calls=None):
        """Add the time of the block, without that of blocks inside it, to seconds[part]; given a module, a
        bar counts its forward passes up to `calls`."""
        start, before = time.perf_counter(), sum(self.seconds.values())
        with tqdm(total=calls, desc=part, leave=False, disable=None if module else True) as bar:
            def count(*_):
                bar.update()            # its result is not returned: that would replace the module's output
            hook = module.register_forward_hook(count) if module else None
            try:
                yield
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)  # else its time is charged to the next part
                elif self.device.type == "mps":
                    torch.mps.synchronize()
            finally:
                if hook:
                    hook.remove()
        inside = sum(self.seconds.values()) - before
        self.seconds[part] = self.seconds.get(part, 0) + time.perf_counter() - start - inside

    # -- prompt -> features -> pixels --

    def images(self, prompts, seeds, steps=None, guidance=None, decoder_steps=None, decoder_guidance=None,
               size=None, images=None, upsample=None):
        """One prompt and one seed for each image -> pixels (B, 3, H, W) in [0, 1], fp32, on the CPU.

        images, upsample: see `features`; size: see `image_size`. The negative features of the decoder's
        guidance are generated in the same batch: the language model and the DiT come into memory once.
        """
        self.image_size(size)           # fail early
        rows, vision = self.final_rows(prompts, seeds, images, upsample)
        guided = self.guides_decoder(decoder_guidance)
        features = self.generate(rows, seeds, steps, guidance, vision, seeds if guided else ())
        negative = self.negative(seeds, steps, guidance) if guided else None
        return self.pixels(features, seeds, decoder_steps, decoder_guidance, size, negative)

    def features(self, prompts, seeds, steps=None, guidance=None, images=None, upsample=None):
        """One prompt and one seed for each image -> CLIP features (B, 64, C), fp32.

        images: PIL images that are part of the prompts, one for each, as in the official text + image form.
        upsample: generate from `upsample_prompts`, see `final_rows`.
        """
        rows, vision = self.final_rows(prompts, seeds, images, upsample)
        return self.generate(rows, seeds, steps, guidance, vision)

    def final_prompts(self, prompts, seeds, images, upsample):
        """The prompts that images are generated from: upsampled if wanted. None: as the checkpoint does,
        changes of images only where it learnt that, with `chat_images`."""
        if not all(prompt.strip() for prompt in prompts):
            raise ValueError("the prompt is empty")
        taught = images is None or self.model.config.chat_images
        wanted = self.setting("upsample", None) and taught if upsample is None else upsample
        return self.upsample_prompts(prompts, seeds, images) if wanted else prompts

    def final_rows(self, prompts, seeds, images, upsample):
        """`prompt_rows` of `final_prompts`. A model that was taught to describe an image after its change
        generates it from that description alone: query states would follow what the image shows now."""
        texts = self.final_prompts(prompts, seeds, images, upsample)
        if images is not None and self.model.config.chat_images:
            images = [image if text == prompt else None
                      for image, text, prompt in zip(images, texts, prompts, strict=True)]
        return self.prompt_rows(texts, images)

    @torch.no_grad()
    def upsample_prompts(self, prompts, seeds, images=None):
        """Prompts -> upsampled prompts: "a red star" becomes "a large red star in the middle on a grey
        background", or something else with another seed. The language model decides what they leave open.

        images: a PIL image in each prompt, which is then a change: the answer describes the image after it.
        The DiT would have to decide it all independently at every position. Prompt upsampling is DALL-E 3's
        (Betker et al. 2023, section 3.5). An answer that is no description leaves a prompt as it is.
        """
        question = data.UPSAMPLE if images is None else data.UPSAMPLE_EDIT
        shown = [[]] * len(prompts) if images is None else [[image] for image in images]
        keys = [(prompt, seed, *map(image_hash, each))
                for prompt, seed, each in zip(prompts, seeds, shown, strict=True)]
        missing = {key: each for key, each in zip(keys, shown) if key not in self.upsampled}
        for i in range(0, len(missing), BATCH):
            batch = list(missing)[i:i + BATCH]
            conversations = [([(question.format(key[0]), None)], [missing[key]]) for key in batch]
            generators = [text_generator(key[1]) for key in batch]
            texts = self.ask(conversations, UPSAMPLED_TOKENS, 1.0, top_p=NUCLEUS, generator=generators)
            none = ("", *self.requests.values())                     # answers that describe nothing
            self.upsampled |= {key: key[0] if text.strip() in none else text.strip()
                               for key, text in zip(batch, texts)}
        return [self.upsampled[key] for key in keys]

    def declined(self, prompts, image=None):
        """What the language model says about each prompt of which it knows no image: a list, None for all
        others. A model that was taught to ask for an image does so where it knows one; see `requests`.
        image: a PIL image, of which the prompts are changes."""
        distinct, said = list(dict.fromkeys(prompts)) if self.requests else [], {}
        for i in range(0, len(distinct), BATCH):
            batch = distinct[i:i + BATCH]
            said |= zip(batch, self.answers([image] * len(batch), batch, UPSAMPLED_TOKENS))
        texts, accepted = [said.get(prompt, "").strip() for prompt in prompts], ("", *self.requests.values())
        return [None if text in accepted else text for text in texts]

    def prompt_rows(self, prompts, images=None):
        """Prompts and their images (or None) -> their token ids in the template of generation, and the
        images' `vision_inputs`."""
        rows, vision = [], []
        for prompt, image in zip(prompts, images or [None] * len(prompts), strict=True):
            count = 0
            if image is not None:       # its aspect ratio is not kept: matches official
                vision.append(self.vision_inputs(image.resize((PROMPT_IMAGE, PROMPT_IMAGE))))
                count = self.image_tokens(vision[-1])
            rows.append(data.prompt_ids(self.tokenizer, prompt, count))
        return rows, vision

    def condition(self, prompts, images=None):
        """Prompts, as they are, and maybe a PIL image in each -> the DiT's condition (B, n_query, D)."""
        return self.query_states(*self.prompt_rows(prompts, images))

    @torch.no_grad()
    def query_states(self, rows, vision=None):
        """Rows of token ids, without [IMG] and queries, and their vision inputs -> (B, n_query, D)."""
        inputs = self.batch(rows, vision, 1 + self.model.config.n_query)
        with self.timed("LLM"):
            return self.model.condition(*inputs)

    def batch(self, rows, vision, more):
        """Rows of ids and their vision inputs -> ids and mask (B, L), pixels (all patches, P) and grid_thw
        (images, 3), both None of no images. ValueError if `more` tokens after a row exceed the context."""
        file, name = self.folder / "config.json", "max_position_embeddings"
        said = section(self.config, "text_config", file).get(name, self.config.get(name))
        limit = typed(said, int | None, COUNT, f"{file}: {name}") or CONTEXT
        longest = max(map(len, rows)) + more
        if longest > limit:
            raise TooLong(f"the prompt takes {longest - more} tokens, up to {more} come after it, and the "
                          f"model reads {limit}: shorten {'it' if longest - more > more else 'the answer'}")
        ids, mask = (y.to(self.device) for y in data.pad(rows))
        if not vision:
            return ids, mask, None, None
        patches, grids = map(torch.cat, zip(*vision))
        return ids, mask, patches.to(self.device, self.dtype), grids.to(self.device)

    @torch.no_grad()
    def generate(self, rows, seeds, steps=None, guidance=None, vision=None, negatives=(), trajectory=None):
        """Rows of token ids (see `query_states`) and a seed for each -> features (B, 64, C), fp32.

        negatives: seeds whose `negative` features are made in the same batch, if they aren't known yet.
        trajectory: a list that receives the sampler's states; see flow.euler_sample.
        """
        if len(rows) != len(seeds):
            raise ValueError(f"{len(rows)} prompts need as many seeds, not {len(seeds)}")
        keys = dict.fromkeys(self.negative_keys(negatives, steps, guidance))
        missing = [key for key in keys if key not in self.negatives]
        noise = torch.cat([self.noise(seeds, FEATURES), self.noise([key[0] for key in missing], NEGATIVE)])
        rows = rows + [self.tokenizer.encode(" ")] * len(missing)    # without the template: matches official
        cond = self.query_states(rows, vision)                                       # (B, n_query, D)
        steps, guidance = self.setting("steps", steps), self.setting("cfg", guidance)
        with self.timed("DiT", self.model.dit, steps):
            features = self.model.generate_features(
                cond, steps, guidance, noise.to(self.device), trajectory=trajectory,
                sampler=self.sampling["sampler"], interval=self.sampling["cfg_interval"])
        self.negatives |= zip(missing, features[len(seeds):].clone())    # no views that keep the batch
        return features[:len(seeds)]

    def noise(self, seeds, stream):
        """The noise (B, C, grid, grid) from which the features of these seeds are generated."""
        config = self.model.config
        if not config.generates:
            raise ValueError(f"the model in {self.folder} has no DiT: it can answer questions, but not "
                             "generate images")
        return draw_noise(seeds, (config.gen_hidden_size, config.grid, config.grid), stream)

    def guides_decoder(self, guidance=None):
        """Is the decoder guided, so that it takes `negative` features?"""
        return self.setting("decoder_cfg", guidance) != 1 and not self.model.config.latents

    def negative_keys(self, seeds, steps, guidance):
        """What the negative features of each seed depend on."""
        settings = (self.setting("steps", steps), self.setting("cfg", guidance), self.sampling["sampler"],
                    *self.sampling["cfg_interval"])
        return [(seed, *settings) for seed in seeds]

    def negative(self, seeds, steps=None, guidance=None):
        """Negative features (B, 64, C) for the decoder's guidance, generated from a single space.

        The official pipeline makes them once per process and keeps them, so every image depends on the first
        one; here each seed has its own.
        """
        keys = self.negative_keys(seeds, steps, guidance)
        if not all(key in self.negatives for key in keys):
            self.generate([], [], steps, guidance, negatives=seeds)
        return torch.stack([self.negatives[key] for key in keys])

    def pixels(self, features, seeds, steps=None, guidance=None, size=None, negative=None):
        """What the model generated, (B, n, C), and a seed for each -> pixels (B, 3, H, W) in [0, 1]."""
        if self.model.config.latents:
            return self.decode_latents(features, size)
        return self.decode_features(features, seeds, steps, guidance, size, negative)

    def image_size(self, size=None):
        """(height, width) of images: `size`, the decoder's own if None. ValueError for what it can't make:
        it knows the size that it was trained at, and half and twice that roughly."""
        own = self.decoder.unet.config.sample_size * self.decoder.vae.factor
        if size is None:
            return own, own
        if not own <= 2 * min(size) <= 2 * max(size) <= 4 * own:
            raise ValueError(f"the decoder was trained on images of {own} x {own} pixels: the size must lie "
                             f"between {own // 2} and {2 * own}, not at {max(size)}")
        self.decoder.latent_shape(1, size)                           # divisible?
        return size

    @torch.no_grad()
    def decode_features(self, features, seeds, steps=None, guidance=None, size=None, negative=None):
        """CLIP features (B, 64, C) and a seed for each -> pixels (B, 3, H, W) in [0, 1], fp32, on the CPU.

        size: (height, width), the decoder's own if None. negative (B, 64, C): that of `negative` if None.
        """
        steps, guidance = self.setting("decoder_steps", steps), self.setting("decoder_cfg", guidance)
        if negative is None and guidance != 1:
            negative = self.negative(seeds)
        decoder = self.decoder
        factor, channels = decoder.vae.factor, decoder.unet.config.in_channels
        height, width = self.image_size(size)
        noise = draw_noise(seeds, (channels, height // factor, width // factor), DECODER)
        batch = max(1, DECODER_PIXELS // (height * width))
        parts, images = [slice(i, i + batch) for i in range(0, len(features), batch)], []
        with self.timed("decoder", decoder.unet, steps * len(parts)):
            for part in parts:
                neg = None if negative is None else negative[part]
                image = decoder.decode(features[part], neg, steps, guidance, noise[part], (height, width),
                                       sampler=self.sampling["decoder_sampler"],
                                       spacing=self.sampling["decoder_spacing"])
                images.append(image.cpu())
        return torch.cat(images)

    @torch.no_grad()
    def decode_latents(self, latents, size):
        """VAE latents (B, h w, C), which the design VAE + FM generates -> pixels (B, 3, H, W) in [0, 1]."""
        if size:
            raise ValueError("a model that generates VAE latents has one image size: leave out --size")
        with self.timed("decoder"):
            z = latents.transpose(1, 2).unflatten(2, (self.model.config.grid,) * 2)  # (B, C, h, w)
            return (self.decoder.vae.decode(z) / 2 + 0.5).clamp(0, 1).cpu()

    def trajectory(self, prompt, seed, steps=None, guidance=None, upsample=None):
        """The sampler's trajectory of one image: (states, predictions), both (steps + 1, 64, C).

        states are the points x_t from noise to result; predictions are the data that lie ahead of each,
        x_t + (1 - t) v, in the direction of the step from there: with Euler that of the DiT's velocity.
        """
        if self.model.dit is None:
            raise ValueError(f"the model in {self.folder} has no DiT: there are no steps from noise to show")
        rows, _ = self.prompt_rows(self.final_prompts([prompt], [seed], None, upsample))
        states = []                                                                  # (1, C, 8, 8) each
        self.generate(rows, [seed], steps, guidance, trajectory=states)
        x = torch.cat(states).flatten(2).transpose(1, 2)                             # (steps + 1, 64, C)
        t = timesteps(len(x) - 1, self.model.config.shift, x.device).view(-1, 1, 1)
        v = (x[1:] - x[:-1]) / (t[1:] - t[:-1])
        return x, torch.cat([x[:-1] + (1 - t[:-1]) * v, x[-1:]])

    @torch.no_grad()
    def reconstruct(self, images, seeds=None, steps=None, guidance=None):
        """PIL images -> what 64 features keep of them, (B, 3, H, W) in [0, 1]; without LLM and DiT.

        Guidance leads away from the features of an all-zero normalised image: matches official.
        """
        size = self.eva.config.image_size
        pixels = torch.cat([data.preprocess_clip(image, size) for image in images])  # (B, 3, S, S)
        pixels = torch.cat([pixels, torch.zeros_like(pixels[:1])]).to(self.device, self.dtype)
        with self.timed("EVA"):
            features = self.eva.encode(pixels).float()                               # (B + 1, 64, C)
        seeds = [0] * len(images) if seeds is None else seeds
        negative = features[-1:].expand(len(images), -1, -1)
        return self.decode_features(features[:-1], seeds, steps, guidance, negative=negative)

    # -- images and questions -> text --

    def vision_inputs(self, image):
        """A PIL image as Qwen's ViT takes it: (patches (N, P), grid (1, 3)), within the pixel limits."""
        limits, vision = self.pixel_limits, self.model.config.vision
        return data.preprocess_qwen(image, vision.patch_size, vision.spatial_merge_size, **limits)

    def image_tokens(self, inputs):
        """The number of tokens that an image with these vision inputs takes in a prompt."""
        return len(inputs[0]) // self.model.config.vision.spatial_merge_size ** 2

    def answer(self, image, question, max_new_tokens=64, temperature=0.0, on_text=None):
        """The answer to a question about a PIL image (or None: about nothing); see `reply`."""
        images = [] if image is None else [image]
        return self.reply([(question, None)], [images], max_new_tokens, temperature, on_text)

    def answers(self, images, questions, max_new_tokens=64, temperature=0.0):
        """The answers to questions about PIL images (or None), one each, as one batch: a list of strings."""
        conversations = [([(question, None)], [[] if image is None else [image]])
                         for image, question in zip(images, questions, strict=True)]
        return self.ask(conversations, max_new_tokens, temperature)

    def reply(self, turns, images, max_new_tokens=64, temperature=0.0, on_text=None, **sampling):
        """What the model says next in a conversation: turns [(user, assistant)], the last assistant None;
        images, a list of PIL images for each turn. on_text(piece) is called with each new piece of the text.

        A token of a byte-level BPE may end within a character: pieces wait until their characters are whole.
        One of `requests` is returned, but is no text for on_text.
        """
        ids, sent = [], ""

        def send(step):
            nonlocal sent
            if step[0] is not None:
                ids.append(step[0])
                text = "" if ids[0] in self.requests else self.tokenizer.decode(ids)
                text = text.rstrip("\ufffd")                        # what half a character decodes to
                if len(text) > len(sent):
                    on_text(text[len(sent):])
                    sent = text
        on_token = send if on_text else None
        text = self.ask([(turns, images)], max_new_tokens, temperature, on_token, **sampling)[0]
        if on_text and text not in self.requests.values() and len(text) > len(sent):
            on_text(text[len(sent):])
        return text

    @property
    def requests(self):
        """{id: answer} of the control tokens by which the model asks to generate an image instead of saying
        something: data.IMG, from the message, and data.EDIT, from the last image, too. {}: it wasn't taught.
        """
        names = (data.IMG, data.EDIT) if self.model.config.chat_images else ()
        return {self.tokenizer.special[name]: name for name in names}

    @torch.no_grad()
    def ask(self, conversations, max_new_tokens, temperature=0.0, on_token=None, top_p=1.0,
            repetition_penalty=None, generator=None):
        """The next answer in each conversation (turns, images for each turn) of a batch: a list of strings.

        temperature None: temperature, top_p and top_k are the folder's own, of generation_config.json;
        repetition_penalty None: that, too. An answer ends with a stop token, or as messages end; one that
        begins with one of `requests` is that alone.
        """
        own, top_k = self.answer_config, 0
        if temperature is None:
            temperature, top_p, top_k = own.temperature * own.do_sample, own.top_p, own.top_k
        inputs = self.batch(*self.conversation_rows(conversations), max_new_tokens)
        if repetition_penalty is None:
            repetition_penalty = own.repetition_penalty
        stop_ids = self.model.stop_ids() + self.tokenizer.control(self.tokenizer.format.end)
        with self.timed("LLM"):
            answers = self.model.generate_text(
                *inputs, max_new_tokens, temperature, top_p, repetition_penalty, stop_ids,
                on_token=on_token, generator=generator, top_k=top_k)
        requests = [self.requests.get(int(ids[0]) if len(ids) else None) for ids in answers]
        return [request or self.tokenizer.decode(ids) for request, ids in zip(requests, answers)]

    def conversation_rows(self, conversations):
        """Conversations as `ask` takes them -> token ids of each, and the vision inputs of all images."""
        rows, vision = [], []
        for turns, images in conversations:
            if not turns[-1][0].strip():
                raise ValueError("the question is empty")
            inputs = [[self.vision_inputs(image) for image in turn] for turn in images]
            counts = [[self.image_tokens(each) for each in turn] for turn in inputs]
            rows.append(data.chat_ids(self.tokenizer, turns, counts)[0])
            vision += sum(inputs, [])
        return rows, vision

    @torch.no_grad()
    def vqa_score(self, images, prompts):
        """How well PIL images match prompts by the language model's own judgement: (B,) fp32, on the CPU.

        log P("yes") - log P("no"), capitalised or not, as its answer to data.MATCH begins (VQAScore, arXiv
        2404.01291).
        """
        conversations = [([(data.MATCH.format(prompt), None)], [[image]])
                         for image, prompt in zip(images, prompts, strict=True)]
        ids, mask, *shown = self.batch(*self.conversation_rows(conversations), 1)    # (B, L)
        with self.timed("LLM"):
            hidden = self.model.hidden(ids, mask, *shown)                            # (B, L, D)
            last = hidden[torch.arange(len(ids)), last_real(mask.bool())]            # (B, D)
            logits = self.model.llm.head(last).float()                               # (B, V)
        yes = [self.tokenizer.encode(word)[0] for word in ("yes", "Yes")]
        no = [self.tokenizer.encode(word)[0] for word in ("no", "No")]
        return (logits[:, yes].logsumexp(1) - logits[:, no].logsumexp(1)).cpu()

    def best_of(self, prompts, seeds, k, **sampling):
        """Of k images of each prompt the one of highest `vqa_score`: (pixels (B, 3, H, W), their B seeds).

        The candidates of seed s have the seeds k s to k s + k - 1, so that the chosen one can be generated
        again alone. sampling: as `images` takes it.
        """
        candidates = [[k * seed + j for seed in seeds] for j in range(k)]            # k lists of B seeds
        pixels = [self.images(prompts, each, **sampling) for each in candidates]     # k times (B, 3, H, W)
        images = [list(map(Image.fromarray, to_uint8(each))) for each in pixels]
        scores = torch.stack([self.vqa_score(each, prompts) for each in images])     # (k, B)
        best = list(enumerate(scores.argmax(0).tolist()))
        return torch.stack([pixels[j][i] for i, j in best]), [candidates[j][i] for i, j in best]

    # -- how much memory --

    def peak_memory(self):
        """Most bytes in use so far: of the GPU, else of this process; None where the system doesn't say."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            import resource  # not on Windows
        except ImportError:
            return None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024     # macOS counts bytes, Linux KiB


# ---- devices, noise, image files --------------------------------------------------------------------------

def pick_device(name):
    """"auto", or a torch device's name -> torch.device; ValueError where this machine has no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device("cpu" if name == "cpu:0" else name)    # files are mapped into "cpu" alone
    except RuntimeError:
        raise ValueError(f"there is no device called {name!r}: use auto, cpu, cuda or mps") from None
    no_gpu = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    if no_gpu or (device.type == "mps" and not torch.backends.mps.is_available()):
        raise ValueError(f"this machine has no device {name!r} that PyTorch can use: try --device cpu")
    try:
        torch.zeros(1, device=device).item()     # "meta" holds no numbers, other kinds may not be there
    except torch.OutOfMemoryError:
        raise
    except Exception:                            # each kind raises its own
        raise ValueError(f"nothing can be computed on the device {name!r} here: try --device cpu") from None
    return device


def pick_dtype(name, device):
    """"auto", "int8" or a name of DTYPES -> torch dtype, or Int8."""
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    named = {"auto": auto, **DTYPES, "int8": Int8(auto)}
    if name not in named:
        raise ValueError(f"there is no dtype {name!r}: use {', '.join(named)}")
    return named[name]


def draw_noise(seeds, shape, stream):
    """Unit normal noise (B, *shape), fp32, on the CPU: row i comes from seeds[i] alone, on every machine."""
    if not all(0 <= seed < MAX_SEED for seed in seeds):
        raise ValueError(f"a seed lies between 0 and {MAX_SEED - 1}")
    noise = torch.empty(len(seeds), *shape)
    for row, seed in zip(noise, seeds):
        row.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed + stream * MAX_SEED)))
    return noise


def to_uint8(pixels):
    """Pixels (..., 3, H, W) in [0, 1] -> uint8 array (..., H, W, 3), rounded half to even."""
    return (pixels * 255).round().to(torch.uint8).movedim(-3, -1).cpu().numpy()


def image_hash(image):
    """What tells a PIL image from others of another size or with other pixels."""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


def image_grid(pixels, columns=None, least=192):
    """Images (B, 3, H, W) row by row on white -> one (3, H', W'); as good as square if columns is None.

    Small ones are enlarged by a whole number, pixel by pixel, until their sides have `least` pixels.
    """
    B, _, H, W = pixels.shape
    columns = columns or math.ceil(math.sqrt(B))
    cells = enlarged(pixels, math.ceil(least / min(H, W)))                           # (B, 3, f H, f W)
    cells = F.pad(cells, (2, 2, 2, 2), value=1.0)
    cells = F.pad(cells, (0, 0, 0, 0, 0, 0, 0, -B % columns), value=1.0)          # (rows columns, 3, h, w)
    return cells.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


def enlarged(pixels, factor):
    """Pixels (..., H, W) -> (..., factor H, factor W): each becomes a square."""
    return pixels.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def slug(text):
    """Text -> the beginning of a file name."""
    return re.sub(r"[\W_]+", "-", text.lower())[:48].strip("-") or "picture"


def save_image(pixels, folder, name, about):
    """Write pixels (3, H, W) in [0, 1] to folder/name.png, print where, return the path; see `unused_path`.

    `about`, a dict of what the image was made from, is kept in the file. Where a side has less than LEAST
    pixels, each becomes a square of several; data.load_image undoes that.
    """
    if not torch.isfinite(pixels).all():
        raise ValueError("the image has NaN or infinite pixels: the weights are broken, or too large "
                         "for this --dtype (try fp32)")
    about, note, scale = json.dumps(about), PngInfo(), math.ceil(LEAST / min(pixels.shape[1:]))
    path = unused_path(folder, f"{name}.png", about)
    note.add_text("nano_blip3o", about)
    if scale > 1:
        note.add_text(data.ENLARGED, str(scale))
    with atomic_write(path) as temporary:
        Image.fromarray(to_uint8(enlarged(pixels, scale))).save(temporary, "PNG", pnginfo=note)
    print(path, flush=True)
    return path


def unused_path(folder, name, about):
    """folder/name, a path to write to. A file of that name made from anything else than `about`, a JSON
    string, is never overwritten: the new one is called name-v2, and so on."""
    first = path = Path(folder, name)
    number = 1
    while os.path.lexists(path) and made_from(path) != about:
        number += 1
        path = first.with_name(f"{first.stem}-v{number}{first.suffix}")
    return path


def made_from(path):
    """The `about` that a written PNG, GIF or page keeps, as a string; None in whatever isn't ours."""
    try:
        with open_file(path) as file:
            if Path(path).suffix == ".html":
                head = file.read(10 ** 5).decode(errors="ignore")
                return html.unescape(re.search('<meta name="nano_blip3o" content="(.*)">', head)[1])
            with Image.open(file, formats=["PNG", "GIF"]) as image:
                return image.info.get("nano_blip3o") or image.info["comment"].decode()
    except Exception:                            # broken bytes make PIL raise half a dozen kinds
        return None


# ---- commands: images -------------------------------------------------------------------------------------

def print_declined(pipe, prompts, image=None):
    """Say so if the model knows no image of a prompt, or of a change of an image; what it generates all the
    same may be anything."""
    for prompt, text in zip(prompts, pipe.declined(prompts, image)):
        if text is None:
            continue
        line = f'"{prompt}" is outside of what this model knows. It says: {text}'
        print(data.printable(" ".join(line.split())), file=sys.stderr)


def sampling(args):
    """How to sample, as Pipeline.images takes it."""
    return {"steps": args.steps, "guidance": args.cfg, "decoder_steps": args.decoder_steps,
            "decoder_guidance": args.decoder_cfg, "size": args.size and (args.size,) * 2,
            "upsample": args.upsample}


def draw(pipe, args):
    """--prompt: a file for each image, image i with seed + i; a grid of all if they are several.

    --best-of k: each is the best of k candidates, and its file name has that one's own seed; the grid's has
    those of the first and the last file. --draw: the same from an --image and a --prompt together. Returns
    the path of the last file.
    """
    image = None if args.image is None else data.load_image(args.image)
    seeds, about, name = range(args.seed, args.seed + args.n), settings(pipe, args), slug(args.prompt)
    images, saved = [], []
    starts = range(0, args.n, BATCH)
    for i in tqdm(starts, desc="batches", leave=False, disable=None if len(starts) > 1 else True):
        batch = seeds[i:i + BATCH]
        prompts, shown = [args.prompt] * len(batch), image and [image] * len(batch)
        if args.best_of > 1:
            pixels, batch = pipe.best_of(prompts, batch, args.best_of, **sampling(args))
        else:
            pixels = pipe.images(prompts, batch, **sampling(args), images=shown)
        images.append(pixels)
        texts = pipe.final_prompts(prompts, batch, shown, args.upsample)             # still known
        for seed, text, each in zip(batch, texts, pixels):
            if text != args.prompt:
                print(f"seed {seed}: {text}", file=sys.stderr)
            path = save_image(each, args.out, f"{name}-seed{seed}", {**about, "seed": seed})
            saved.append(seed)
    if args.n > 1:
        name = f"{name}-grid-of-{args.n}-seed{saved[0]}-to-seed{saved[-1]}"
        path = save_image(image_grid(torch.cat(images)), args.out, name, {**about, "n": args.n})
    return str(path)


def prompts_of(args):
    """The prompts of a command line: --steps-gif takes several, separated by " | "."""
    text = args.prompt if args.explain is None else args.explain
    return [prompt.strip() for prompt in text.split(" | ")] if args.steps_gif else [text]


def view(pipe, args):
    """--steps-strip, --steps-gif, --contact-sheet: see evals/show.py."""
    from evals import show
    save = show.steps_strip if args.steps_strip else show.steps_gif if args.steps_gif else show.contact_sheet
    save(pipe, args)


def explain(pipe, args):
    """--explain: a page about what happens between a prompt and its image, which needs no network."""
    from evals.explain import explain_page
    args = argparse.Namespace(**{**vars(args), "prompt": args.explain})
    about = json.dumps({**settings(pipe, args), "ckpt": Path(args.ckpt).name, "explain": True})    # to share
    page, _ = explain_page(pipe, args.prompt, args.seed, about, **sampling(args))
    path = unused_path(args.out, f"{slug(args.prompt)}-seed{args.seed}-explained.html", about)
    with atomic_write(path) as temporary:
        temporary.write_text(page, "utf-8")
    print(path, flush=True)


def settings(pipe, args):
    """The settings that are recorded in the PNG: all that its pixels depend on."""
    about = {"prompt": args.prompt, "seed": args.seed, "ckpt": args.ckpt, "best_of": args.best_of,
             "model": pipe.digest,          # another one may have come under this name
             "dtype": str(pipe.precision).removeprefix("torch."), "device": pipe.device.type}
    names = ("eva", "image", "size", "min_pixels", "max_pixels")
    about |= {name: getattr(args, name) for name in names if getattr(args, name)}
    if args.image is not None:          # another image may have come under this name
        about["image_sha256"] = hashlib.sha256(read_file(args.image)).hexdigest()
    return about | {name: pipe.setting(name, getattr(args, name)) for name in OFFICIAL}


def reconstruct(pipe, args):
    """--image --reconstruct: the middle square of the image, and beside it what its 64 features keep."""
    image = data.load_image(args.image)
    after = pipe.reconstruct([image], [args.seed], args.decoder_steps, args.decoder_cfg)[0]       # (3, H, W)
    before = torch.from_numpy(np.array(data.crop_square(image, after.shape[-1]))).permute(2, 0, 1) / 255
    name = f"{slug(Path(args.image).stem)}-reconstructed"
    save_image(image_grid(torch.stack([before, after]), 2), args.out, name, settings(pipe, args))


# ---- commands: text ---------------------------------------------------------------------------------------

def text_generator(seed):
    """The random numbers of one answer, or of one conversation."""
    return torch.Generator().manual_seed(seed % MAX_SEED + TEXT * MAX_SEED)


def print_reply(pipe, args, turns, images, generator):
    """Print the next answer of a conversation as it grows, unless it is one of pipe.requests; returns it."""
    show = partial(print, end="", flush=True)
    text = pipe.reply(turns, images, args.max_new_tokens, args.temperature, show, top_p=args.top_p,
                      repetition_penalty=args.repetition_penalty, generator=generator)
    if text not in pipe.requests.values():
        print()
    return text


def answer(pipe, args):
    """--image and maybe --prompt: the answer, on stdout, as it grows."""
    question = data.DESCRIBE if args.prompt is None else args.prompt
    turns, images = [(question, None)], [[data.load_image(args.image)]]
    if print_reply(pipe, args, turns, images, [text_generator(args.seed)]) in pipe.requests.values():
        print("this asks for an image instead of an answer: --draw generates it", file=sys.stderr)


CHAT = """Write a message and press Enter. @path/to/image.png anywhere in it shows an image,
@"my cat.png" one with a space in its name.
{}/image a red circle   generates; what you write next is about that image
/edit make it blue    edits the last image, generated or shown, or one that @ shows
/new   begins a new conversation      /quit or Ctrl-D   ends      Ctrl-C   stops an answer"""
JUST_ASK = "Ask for an image, or for a change of the last one, in your own words, or with a command:\n"
EXAMPLES = {"/image": "a red circle", "/edit": "make it blue"}
# @path, @"path" or @'path', after white space or a bracket; spaces may be escaped, as terminals do.
SHOWN = re.compile(r"""(?<![^\s(\[])@(?:"([^"]+)"|'([^']+)'|((?:\\ |\S)+))\s?""")


def shown_images(text):
    """(the paths of the images that @ shows in a message, the message without them)"""
    paths = []

    def take(match):
        double, single, plain = match.groups()
        path = os.path.expanduser(double or single or plain.replace("\\ ", " "))
        name = path
        if plain and not os.path.lexists(path):
            name = path.rstrip(".,;:!?)]}'\"")                      # "what is @cat.png?"
        if not os.path.lexists(name) and "://" not in name:
            raise ValueError(f'there is no image file {name[:200]!r} to show with @: a name with spaces '
                             'stands in quotes, as in @"my cat.png"')
        paths.append(name)
        return path[len(name):]
    return paths, SHOWN.sub(take, text).strip()


class Chat:
    """The state of --chat: the conversation so far, and the last image, generated or shown."""

    def __init__(self, pipe, args):
        self.pipe, self.args, self.generated = pipe, args, 0
        self.generator = [text_generator(args.seed)]
        self.restart()

    def restart(self):
        """Forget the conversation and the last image."""
        self.turns, self.images = [], []        # [(user, assistant)], the images of each turn
        self.last, self.unasked = None, False   # path of the last image; generated, and not asked about yet?

    def context(self, paths):
        """The conversation that a message with these images goes on with: its turns, their images, and the
        paths of the message's own. A generated image comes back with the message that follows it."""
        if paths or not self.unasked or self.pipe.model.visual is None:
            return self.turns, self.images, paths
        if self.pipe.requests:
            return self.turns, self.images, [self.last]
        return [], [], [self.last]                  # the model knows no such turn: the talk begins with it

    def generate(self, prompt, answer, paths=()):
        """Generate from the text of a message with these images (answer data.IMG), or from the last image,
        too, if there is one (data.EDIT); each time with the next seed. Remember both if the model knows
        such turns."""
        shown = [data.load_image(path) for path in self.context(paths)[2]] if self.pipe.requests else []
        image = (paths or [self.last])[-1] if answer == data.EDIT else None
        seed = (self.args.seed + self.generated) % MAX_SEED
        changes = {"prompt": prompt, "image": image, "seed": seed, "n": 1}
        self.generated += 1
        self.last = draw(self.pipe, argparse.Namespace(**{**vars(self.args), **changes}))
        self.unasked = True
        if self.pipe.requests:
            self.turns = [*self.turns, (prompt, answer if image else data.IMG)]
            self.images = [*self.images, shown]

    def say(self, text):
        """Print the answer to a message, with @paths of images in it, or generate the image that the model
        asks for instead; remember both once that is done."""
        paths, message = shown_images(text)
        if len(paths) > BATCH:
            raise ValueError(f"a message shows at most {BATCH} images")
        turns, images, paths = self.context(paths)
        shown = [data.load_image(path) for path in paths]
        message = message or data.DESCRIBE
        try:
            reply = print_reply(self.pipe, self.args, [*turns, (message, None)], [*images, shown],
                                self.generator)
        except TooLong as error:
            raise TooLong(f"{error}, or begin a /new conversation") from None
        if reply in self.pipe.requests.values():
            self.generate(message, reply, paths)
            return
        self.turns, self.images = [*turns, (message, reply)], [*images, shown]
        self.last, self.unasked = paths[-1] if paths else self.last, False

    def read(self, text):
        """One line of the user; ValueError for a mistake."""
        if len(text) >= LINE or not is_text(text):
            raise ValueError(f"a line must be UTF-8 text of less than {LINE:,} characters")
        text = text.removeprefix("\ufeff").strip()                 # a byte order mark
        command, prompt = (*text.split(None, 1), "", "")[:2]
        if command in EXAMPLES and not prompt:
            raise ValueError(f"the prompt is empty: say what you want, as in {command} {EXAMPLES[command]}")
        if command == "/new":
            self.restart()
        elif command == "/image":
            paths = []
            with suppress(ValueError):                               # @home is a word
                paths, _ = shown_images(prompt)
            if paths:
                raise ValueError("/image generates from words alone: /edit changes an image that @ shows")
            self.generate(prompt, data.IMG)
        elif command == "/edit":
            paths, prompt = shown_images(prompt)
            if not paths and self.last is None:
                raise ValueError("there is no image to edit yet: generate one with /image, or show one with "
                                 f"@, as in /edit {EXAMPLES['/edit']} @cat.png")
            self.generate(prompt, data.EDIT, paths)
        elif command.startswith("/"):
            raise ValueError(f"there is no command {command}: use /image, /edit, /new or /quit")
        elif command:
            self.say(text)


def read_line():
    """The next line of stdin, "" at its end; of a longer one than LINE only the beginning."""
    line = sys.stdin.readline(LINE) if sys.stdin else ""
    if len(line) < LINE or line.endswith("\n"):
        return line
    for _ in range(1000):
        if sys.stdin.readline(LINE)[-1:] in ("", "\n"):
            return line
    raise ValueError("what comes in has no lines")


def chat(pipe, args):
    """--chat: a conversation, line by line from stdin. A mistake costs a line, and Ctrl-C an answer, but not
    the conversation; Ctrl-C between two answers ends it."""
    print(CHAT.format(JUST_ASK * bool(pipe.requests)), file=sys.stderr)
    conversation = Chat(pipe, args)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = read_line()
        if not line or line.strip() == "/quit":
            return
        try:
            conversation.read(line)
        except KeyboardInterrupt:
            print("\n(stopped)", file=sys.stderr)
        except BrokenPipeError:                 # nobody reads the answers
            raise
        except Exception as error:              # whatever a line has led to
            print(sentence(error), file=sys.stderr)


# ---- commands: captions for a folder of images ------------------------------------------------------------

def caption(pipe, args):
    """--caption: a folder of images (or a pattern, or one file) -> out/00000.tar, ..., for train.py --data.

    out/captions.jsonl is what is done: a line for each image, written with its batch. A run that was killed
    goes on behind the last whole line, and one with new images behind the old ones; a shard is a function of
    its SHARD lines.
    """
    out, (paths, others) = Path(args.out), find_images(Path(args.caption))
    # A model that stage 0 taught to talk knows one request for a description, and none for a short one.
    own, short = (data.DESCRIBE, None) if pipe.model.config.chat_images else (LONG, SHORT)
    args.instruction, args.short_instruction = args.instruction or own, args.short_instruction or short
    limit = pipe.pixel_limits.get("max_pixels", CAPTION_PIXELS)
    pipe.limits.setdefault("max_pixels", min(limit, CAPTION_PIXELS))
    with file_lock(out / "captions.jsonl"), open(out / "captions.jsonl", "a+b") as log:
        lines, shards = read_log(log), 0
        keep_settings(out / "captions.json", args, lines)
        done = {line["image"] for line in lines}
        todo = [path for path in paths if os.path.relpath(path, out) not in done]
        for i in tqdm(range(0, len(todo) + 1, BATCH), desc="batches", disable=None):  # the last may be empty
            batch = caption_batch(pipe, args, todo[i:i + BATCH], len(lines), out)
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in batch)
            log.write(text.encode(errors="backslashreplace"))        # JSON's escape of half a character
            log.flush()
            os.fsync(log.fileno())
            lines += batch
            captioned = [line for line in lines if "skipped" not in line]
            last = i + BATCH > len(todo)        # then the rest makes a smaller shard
            complete = math.ceil(len(captioned) / SHARD) if last else len(captioned) // SHARD
            while shards < complete:
                write_shard(out, shards, captioned[shards * SHARD:(shards + 1) * SHARD])
                shards += 1
    skipped = Counter(line["skipped"] for line in lines if "skipped" in line)
    causes = ", ".join(f"{n} {cause}" for cause, n in (skipped + others).items()) or "none"
    print(f"{len(captioned)} images with captions in {shards} shards; skipped: {causes}", file=sys.stderr)


def find_images(root):
    """(the image files, sorted; how many other ones of each suffix there are) in a folder and its
    subfolders, or that one file, or those that match it. Hidden ones are left alone."""
    if root.is_dir():
        files = [path for path in data.files_below(root)
                 if not data.hidden(path.relative_to(root).as_posix())]
    else:
        files = [root] if os.path.lexists(root) else map(Path, glob.glob(str(root), recursive=True))
    files = sorted(path for path in files if not path.is_dir() and path.suffix.lower() not in NO_IMAGES)
    paths = [path for path in files if path.suffix.lower() in data.IMAGE_SUFFIXES]
    others = Counter(path.suffix.lower() or "without suffix" for path in files
                     if path.suffix.lower() not in data.IMAGE_SUFFIXES)
    if not paths:
        found = ", ".join(f"{n} {name}" for name, n in others.items())
        raise ValueError(f"there is no image ({', '.join(data.IMAGE_SUFFIXES)}) at {root}"
                         + f", but {found}" * bool(found))
    return paths, others


def keep_settings(file, args, lines):
    """Write the settings of --caption to a file; ValueError if it holds others, and there are lines of
    theirs."""
    names = ("ckpt", "dtype", "instruction", "short_instruction", "max_new_tokens", "temperature", "top_p",
             "repetition_penalty", "min_pixels", "max_pixels", "seed")
    about = {name: getattr(args, name) for name in names}
    before = about | read_json(file) if lines and file.exists() else about       # older files hold fewer
    other = {name: value for name, value in before.items() if value != about.get(name, ...)}
    if other:
        said = ", ".join(f"no {flags([name])}" if value is None else f"{flags([name])} {value}"
                         for name, value in other.items())
        raise ValueError(f"{file.parent} holds captions made with {said}: say the same again, or choose "
                         "another --out")
    write_json(file, about)


def read_log(log):
    """The whole lines of an open captions.jsonl, as dicts; a last one that was cut by a kill is removed.

    Raises ValueError, and changes nothing, if there is a line that `caption` can't have written.
    """
    log.seek(0)
    content, lines = log.read(), []
    end = content.rfind(b"\n") + 1
    for i, text in enumerate(content[:end].split(b"\n")[:-1], 1):
        line = parse_json(text, where := f"line {i} of {log.name}")
        texts = all(isinstance(value, str) and is_text(value) for name, value in line.items()
                    if name != "image")
        if not (texts and isinstance(line.get("image"), str) and line.keys() & {"caption", "skipped"}
                and line["image"].lower().endswith(data.IMAGE_SUFFIXES)):
            raise ValueError(f"{where} is none that --caption writes: mend it, or remove it")
        lines.append(line)
    log.truncate(end)
    return lines


def caption_batch(pipe, args, paths, first, out):
    """Captions of a batch of image files: a dict for each, {"image" (relative to out), "caption",
    "short_caption"}, or "skipped" with the cause why there is none. first: the number of the first line,
    which its random numbers come from."""
    lines, images = [{"image": os.path.relpath(path, out)} for path in paths], {}
    for i, path in enumerate(paths):
        try:
            image = data.load_image(path)
            data.smart_resize(image.height, image.width)             # refuses what is too narrow for the ViT
            images[i] = image
        except ValueError as error:
            lines[i]["skipped"] = error.cause if isinstance(error, data.BadSample) else "too narrow"
    for key, question, most in (("caption", args.instruction, args.max_new_tokens),
                                ("short_caption", args.short_instruction,
                                 min(SHORT_TOKENS, args.max_new_tokens))):
        if question is None:
            continue
        conversations = [([(question, None)], [[image]]) for image in images.values()]
        generators = [text_generator(args.seed + first + i) for i in images]
        texts = pipe.ask(conversations, most, args.temperature, top_p=args.top_p, generator=generators,
                         repetition_penalty=args.repetition_penalty) if images else []
        for i, text in zip(images, texts):
            if len(pipe.tokenizer.encode(text)) >= most - 1:  # cut off: end with the last sentence, if any
                text = re.sub(r"(?s)(.*[.!?]).*", r"\1", text)
            text = text.replace("\0", "").strip()                     # data.py refuses NUL in captions
            if text:
                lines[i][key] = text
            elif key == "caption":
                lines[i]["skipped"] = "empty caption"
    return lines


def write_shard(out, number, lines):
    """Write out/NNNNN.tar of these lines, whole, unless it is there: images as they are, texts, records.

    Shards are written in turn, so of those that are there only the last can lack samples that came later: it
    grows, and what it holds stays, even where the image's file is gone.
    """
    path, following = (out / f"{k:05d}.tar" for k in (number, number + 1))
    if path.exists() and (following.exists() or len(data.scan_shard(path)[0]) == len(lines)):
        return
    with atomic_write(path) as temporary:
        if path.exists():
            shutil.copyfile(path, temporary)
        with tarfile.open(temporary, "a") as tar:
            held = set(tar.getnames())
            for i, line in enumerate(lines):
                key = f"{number * SHARD + i:09d}"
                if f"{key}.txt" not in held:
                    add_sample(tar, key, line, out / line["image"])
    print(path, flush=True)


def add_sample(tar, key, line, image):
    """Add an image file and what a line of captions.jsonl says of it to an open shard; what can't be read is
    said, and left out."""
    try:
        image_bytes = read_file(image)
    except (OSError, ValueError) as error:
        print(f"left out of {tar.name}: {sentence(error)}", file=sys.stderr)
        return
    record = {name: line[name] for name in ("caption", "short_caption") if name in line}
    record["source"] = image.name
    for suffix, content in ((image.suffix.lower(), image_bytes), (".txt", line["caption"].encode()),
                            (".json", json.dumps(record).encode())):
        member = tarfile.TarInfo(key + suffix)
        member.size = len(content)
        tar.addfile(member, BytesIO(content))


# ---- commands: export -------------------------------------------------------------------------------------

def export(pipe, args):
    """--export diffusers DIR: unet, vae, scheduler and transformer in diffusers' layout, in --dtype."""
    target = Path(args.export[1])
    for name in ("unet", "vae", "scheduler", "transformer", "caption_projection"):
        if (target / name).exists():
            raise ValueError(f"{target} has a folder {name} already: choose another one, or delete that")
    decoder = PixelDecoder.from_pretrained(pipe.eva_folder, dtype=pipe.dtype)
    decoder.unet.save_pretrained(target / "unet")
    decoder.vae.save_pretrained(target / "vae")
    decoder.schedule.save_pretrained(target / "scheduler")
    if pipe.model.dit is not None:
        dit = BLIP3o.from_pretrained(args.ckpt, dtype=pipe.dtype, parts={"dit"}).dit
        export_transformer(dit, pipe.model.config.grid, target)
    for folder in sorted(target.iterdir()):
        print(folder)


def export_transformer(dit, grid, target):
    """Write a DiT as diffusers' LuminaNextDiT2DModel. What BLIP3-o puts in front of it, caption_projection,
    lies beside it (keys of diffusers' PixArtAlphaTextProjection); its 3D RoPE, if it has that, is the
    caller's to pass: the class takes a table."""
    c, file = dit.config, "diffusion_pytorch_model.safetensors"
    write_json(target / "transformer" / "config.json", {
        "_class_name": "LuminaNextDiT2DModel", "sample_size": grid, "patch_size": c.patch_size,
        "in_channels": c.in_channels, "hidden_size": c.dim, "num_layers": c.n_layers,
        "num_attention_heads": c.n_heads, "num_kv_heads": c.n_kv_heads, "multiple_of": 1,
        "ffn_dim_multiplier": (c.ffn_dim + 0.5) / (8 * c.dim // 3), "norm_eps": c.norm_eps,
        "learn_sigma": False, "qk_norm": True, "cross_attention_dim": c.dim})
    save_weights(dit.caption_projection, target / "caption_projection" / file)
    del dit.caption_projection          # diffusers' class takes its output, and has an idle pad_token
    dit.pad_token = torch.nn.Parameter(torch.zeros(c.dim, dtype=next(dit.parameters()).dtype))
    save_weights(dit, target / "transformer" / file)


# ---- command line -----------------------------------------------------------------------------------------

# By the flag that asks for it.
COMMANDS = {"prompt": draw, "draw": draw, "steps_strip": view, "steps_gif": view, "contact_sheet": view,
            "explain": explain, "image": answer, "reconstruct": reconstruct, "chat": chat,
            "caption": caption, "export": export}

# The flags that each command reads: any other would have no effect with it, and is refused.
RUN = {"ckpt", "device", "dtype", "offload"}
DECODE = {*RUN, "eva", "compile", "decoder_steps", "decoder_cfg", "decoder_sampler", "decoder_spacing",
          "seed", "out"}
GENERATE = {*DECODE, "steps", "cfg", "sampler", "cfg_interval", "size"}
TALK = {*RUN, "max_new_tokens", "temperature", "top_p", "repetition_penalty", "min_pixels", "max_pixels",
        "seed"}
DRAW = GENERATE | {"prompt", "n", "best_of", "upsample", "min_pixels", "max_pixels"}
READS = {
    "prompt": DRAW,
    "draw": GENERATE | {"prompt", "n", "image", "draw", "upsample", "min_pixels", "max_pixels"},
    "steps_strip": GENERATE | {"prompt", "steps_strip", "upsample"},
    "steps_gif": GENERATE | {"prompt", "steps_gif", "upsample"},
    "contact_sheet": GENERATE | {"prompt", "contact_sheet", "upsample"},
    "explain": GENERATE - {"compile"} | {"explain", "upsample"},    # hooks don't see inside compiled modules
    "image": TALK | {"prompt", "image"},
    "reconstruct": DECODE | {"image", "reconstruct"},
    "chat": GENERATE | TALK | {"chat", "upsample"},
    "caption": TALK | {"caption", "instruction", "short_instruction", "out"},
    "export": {"ckpt", "device", "dtype", "eva", "export"},     # --dtype auto depends on the device
    "dry_run": DRAW | {"dry_run"}}       # said after a command that generates
NAMES = {"prompt": "on images from a --prompt", "image": "on answers about an --image"}

PIXELS = Interval(1, 16384 * 28 ** 2)   # up to the limit of the released preprocessor


def add_image_flags(add):
    """what to generate, and how"""
    add("--prompt", help="what to generate; with --image, a question about it")
    add("--image", help="an image file to ask about or to reconstruct")
    add("--draw", action="store_true", help="generate from --image and --prompt instead of answering")
    add("--reconstruct", action="store_true", help="send --image through the 64 features and back")
    add("--steps-strip", action="store_true", help="show the sampling steps of one image as a strip")
    add("--steps-gif", action="store_true", help="show them as an animation (GIF); up to four prompts, "
        "separated by ' | ', stand side by side: --prompt \"a red star | a blue circle\"")
    add("--contact-sheet", action="store_true", help="show in one image what the model does with a prompt: "
        "generate, from noise, change, describe, reconstruct")
    add("--explain", metavar="PROMPT", help="write a page that shows what happens between a prompt and its "
        "image: tokens, attention, steps (HTML, opens from disk)")
    add("--n", type=number(int, Interval(1, 10 ** 4)), default=1,
        help="number of images, with seeds from --seed on")
    add("--seed", type=number(int, Interval(0, MAX_SEED - 1)), default=0,
        help="of the noise, and of answers with --temperature")
    add("--best-of", type=number(int, Interval(1, 1000)), default=1, help="of so many images keep the one "
        "that the model itself scores best (VQAScore)")
    add("--upsample", action=argparse.BooleanOptionalAction, help="let the language model say in full what "
        "the --prompt asks for before it is used (as the checkpoint does; official ones don't)")
    add("--steps", type=number(*SAMPLING["steps"]),
        help="Euler steps of the DiT (the checkpoint's, else 30)")
    add("--cfg", type=number(*SAMPLING["cfg"]),
        help="guidance of the DiT, 1 for none (the checkpoint's, else 3)")
    add("--sampler", choices=CHOICES["sampler"], help="of the DiT's steps: ab2 (Adams-Bashforth) has "
        "order 2, at the same cost (the checkpoint's, else euler)")
    add("--cfg-interval", type=number(float, FRACTION), nargs=2, metavar=("LO", "HI"), help="guidance of "
        "the DiT from time LO to HI alone, 0 noise, 1 image: other steps cost half (the checkpoint's, else "
        "0 1)")
    add("--decoder-steps", type=number(*SAMPLING["decoder_steps"]),
        help="steps of the pixel decoder (the checkpoint's, else 50)")
    add("--decoder-cfg", type=number(*SAMPLING["decoder_cfg"]),
        help="guidance of the pixel decoder (the checkpoint's, else 3)")
    add("--decoder-sampler", choices=CHOICES["decoder_sampler"],
        help="of the pixel decoder's steps: dpm++2m has order 2 (the checkpoint's, else euler)")
    add("--decoder-spacing", choices=CHOICES["decoder_spacing"],
        help="of their times (the checkpoint's, else leading)")
    add("--size", type=number(int, Interval(8, 8192)), help="side of generated images in pixels, from half "
        "to twice the decoder's own (official: 1024; nano: 64), where alone they look right: away from it "
        "objects are repeated, cut or deformed")


def add_text_flags(add):
    """what to answer, and how"""
    add("--chat", action="store_true", help="a conversation on the terminal, with images both ways")
    add("--caption", metavar="IMAGES", help="caption a folder; --out gets tar shards that train.py reads")
    add("--instruction", help=f"--caption: what to ask for the long caption ({LONG!r})")
    add("--short-instruction", help=f"--caption: what to ask for the short one ({SHORT!r})")
    add("--max-new-tokens", type=number(int, COUNT), default=128, help="longest answer")
    add("--temperature", type=number(float, Interval(0, 100)), help="of answers; 0 always takes the "
        "likeliest token (the checkpoint's sampling, else 0)")
    add("--top-p", type=number(float, Interval(above=0, most=1)), default=1.0,
        help="with --temperature: of the likeliest tokens of this mass")
    add("--repetition-penalty", type=number(float, Interval(0.01, 100)),
        help="above 1: repeat no token without need (the checkpoint's)")
    add("--min-pixels", type=number(int, PIXELS),
        help="smaller images are enlarged before the language model sees them")
    add("--max-pixels", type=number(int, PIXELS),
        help="larger images are reduced before the language model sees them")


def add_model_flags(add):
    """which model, and where it runs"""
    nano = Path(__file__).parent / "weights" / "nano"
    add("--ckpt", default=str(nano), help="model folder (weights/nano)")
    add("--eva", help="folder with EVA-CLIP and the diffusion-decoder, if --ckpt has none (as train.py's)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    add("--dtype", default="auto", help=f"auto, {', '.join(DTYPES)}; or int8: large linear layers take a "
        "byte a weight, all else is as auto")
    add("--offload", nargs="?", const=True, default=False, choices=("layers",), help="keep only the part in "
        "memory that works; layers: only the layer that works (the VAE stays whole): takes least, but each "
        "step and each token reads all layers again")
    add("--compile", action="store_true", help="torch.compile DiT and UNet: faster for many images")
    add("--dry-run", action="store_true", help="print what memory it takes; --ckpt 4b and 8b need no files")
    add("--export", nargs=2, metavar=("diffusers", "DIR"), help="DiT, UNet and VAE in diffusers' layout")
    add("--out", default=OUT, help=f"folder for images and captions ({OUT})")


def command_of(given):
    """The command that the given flags mean, by the flag that asks for it; None if they mean none."""
    names = ["dry_run", "export", "chat", "caption", "explain"]
    if "image" in given:
        names += ["draw", "reconstruct", "image"]
    elif "prompt" in given:
        names += ["steps_strip", "steps_gif", "contact_sheet", "prompt"]
    return next((name for name in names if name in given), None)


def mistakes(command, args, given):
    """(is it so?, what to say) for each command line whose flags don't go together. args: the values of all;
    given: those that aren't at their defaults, where a flag changes nothing."""
    yield command is None, "say what to do: --prompt generates, --image with --prompt answers, --chat talks"
    for name, value in given.items():
        values = value if isinstance(value, list) else [value]
        texts = [text for text in values if isinstance(text, str)]
        yield not all(text.strip() for text in texts), f"{flags([name])} is empty"
        yield name in TEXTS and not is_text(value), f"{flags([name])} isn't UTF-8 text"
    yield (args.draw and (command == "prompt" or command == "draw" and args.prompt is None),
           "--draw needs an --image and a --prompt")
    yield (args.reconstruct and command in ("prompt", "steps_strip", "steps_gif", "contact_sheet"),
           "--reconstruct needs an --image")
    prompts = prompts_of(args) if command == "steps_gif" else ()
    yield not all(prompts), "one of the prompts that | separates is empty"
    yield len(prompts) > GIF_PROMPTS, f"--steps-gif shows at most {GIF_PROMPTS} prompts side by side"
    idle = sorted(given.keys() - READS.get(command, given.keys()))
    yield idle, f"no effect {NAMES.get(command, f'with {flags([command])}')}: leave out {flags(idle)}"
    limits = sorted(given.keys() & {"min_pixels", "max_pixels"}) if command == "prompt" else []
    yield limits and args.best_of == 1, f"no effect without --best-of: leave out {flags(limits)}"
    yield (args.export and args.export[0] != "diffusers",
           f"--export writes for diffusers, not {args.export and args.export[0]}")
    yield args.export and args.dtype == "int8", "--export writes no int8: leave out --dtype int8"
    yield args.compile and args.offload, "--compile needs the parts to stay in memory: leave out --offload"
    yield "top_p" in given and not args.temperature, "no effect without --temperature: leave out --top-p"
    yield 0 < (args.temperature or 0) < 1e-3, "--temperature below 0.001 is greedy: say 0"
    low, high = args.cfg_interval or (0, 1)
    yield low > high, f"--cfg-interval takes its earlier time first, not {low:g} {high:g}"
    yield ((args.min_pixels or 0) > (args.max_pixels or math.inf),
           f"--min-pixels {args.min_pixels} is above --max-pixels {args.max_pixels}")
    yield ((args.seed + args.n) * args.best_of > MAX_SEED,
           f"--seed, --n and --best-of lead to seeds above {MAX_SEED - 1}")


def flags(names):
    """Names of arguments, as they stand on the command line."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def is_text(value):
    """Is a string text that can be encoded? Bytes that aren't UTF-8 become half characters."""
    return not re.search(r"[\ud800-\udfff]", value)


def parse(argv):
    """Command line -> (command, args); ValueError for flags that don't go together, or have no effect."""
    parser = Parser("sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for add_flags in (add_image_flags, add_text_flags, add_model_flags):
        add_flags(parser.add_argument_group(add_flags.__doc__).add_argument)
    args = parser.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if value != parser.get_default(name)}
    command = command_of(given)
    for wrong, words in mistakes(command, args, given):
        if wrong:
            raise ValueError(words)
    return command, args


def check_model(pipe, args):
    """ValueError for flags that images of this model don't depend on, and sizes that its decoder can't
    make; a warning for a size that it wasn't trained at."""
    config, idle = pipe.model.config, []
    if config.latents:                      # the design VAE + FM: no UNet
        idle += ["decoder_steps", "decoder_cfg", "decoder_sampler", "decoder_spacing", "size"]
    if pipe.model.dit is None:              # a linear map, or a model that only answers
        idle += ["steps", "cfg", "sampler", "cfg_interval"]
    idle = [name for name in idle if getattr(args, name) is not None]
    if idle:
        raise ValueError(f"no effect on the images of {args.ckpt}: leave out {flags(idle)}")
    if args.cfg_interval and pipe.setting("cfg", args.cfg) in (0, 1):
        raise ValueError("no effect with --cfg 0 or 1: leave out --cfg-interval")
    if args.size:
        (own, _), size = pipe.image_size(), args.size
        pipe.image_size((size, size))
        if size != own:
            print(f"the decoder was trained on images of {own} x {own} pixels: at {size} x {size} objects "
                  "may be repeated, cut or deformed", file=sys.stderr)


@contextmanager
def output_folder(folder):
    """Make a folder and write to it before the work; at the end of the block it goes if it is empty.

    Raises OSError or ValueError where nothing can be written.
    """
    folder, made = Path(folder), []
    try:
        if os.path.lexists(folder) and not folder.is_dir():
            raise ValueError(f"{folder} exists, and is no folder to write to: choose another one")
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
        yield
    finally:
        for path in made:
            with suppress(OSError):         # not empty
                path.rmdir()


def main(argv=None):
    """Run one command; returns its exit code: 0, 2 after a mistake (one sentence on stderr), 130: Ctrl-C."""
    if hasattr(sys.stdin, "reconfigure"):   # no byte that comes in is fatal
        sys.stdin.reconfigure(errors="surrogateescape")
    return run_command("sample.py", partial(run, argv))


def open_pipeline(args):
    """The Pipeline that a command line names, with the limits and samplers that it says."""
    pipe = Pipeline(args.ckpt, args.device, args.dtype, args.offload, args.compile, args.eva)
    pipe.limits = {key: getattr(args, key) for key in ("min_pixels", "max_pixels") if getattr(args, key)}
    pipe.sampling |= {name: getattr(args, name) for name in SAMPLERS if getattr(args, name)}
    return pipe


def run(argv):
    """What the command line asks for; ValueError if that makes no sense."""
    name, args = parse(argv)
    if name == "dry_run":
        from evals.estimate import estimate_sampling
        return estimate_sampling(args)
    pipe = open_pipeline(args)
    if "size" in READS[name]:               # it generates images
        check_model(pipe, args)
    sampled = pipe.answer_config.do_sample if args.temperature is None else args.temperature
    if name in ("image", "caption") and args.seed and not sampled:
        raise ValueError("no effect without --temperature: leave out --seed")
    target = args.export[1] if name == "export" else args.out
    with nullcontext() if name == "image" else output_folder(target):
        if "size" in READS[name] and name != "chat":
            print_declined(pipe, prompts_of(args), args.image and data.load_image(args.image))
        COMMANDS[name](pipe, args)
    if pipe.seconds:
        times = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in pipe.seconds.items())
        peak = pipe.peak_memory()
        memory = "unknown" if peak is None else f"{peak / GIB:.2f} GiB"
        print(f"{times}; peak memory: {memory}", file=sys.stderr)


if __name__ == "__main__":
    from sample import main as run_as_module  # not __main__: evals/show.py imports `sample`, too
    sys.exit(run_as_module())
