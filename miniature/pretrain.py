"""Training the parts that the paper takes from others: stages clip, vae and 0 of a model without parents,
and what `train.py --stage all` trains in which order.

    clip    EVA-CLIP tower, with a text tower and heads that are thrown away afterwards
    vae     pixels <-> latents
    0       language model and vision tower from random weights

The paper has EVA-CLIP, SDXL's VAE and Qwen2.5-VL for these. The stages have train.Stage's form; train.py
picks them. B batch, L tokens, C width of the image features, E of the contrastive embedding, S side of an
image.
"""
import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Tokenizers
from torch import nn

import data
import train
from checkpoint import folder_parts
from clip_decoder import PRESETS, VAE, EvaClip, pool, sincos_positions
from miniature import world
from miniature.tasks import world_texts

VOCABULARY = 640                              # upper limit of the nano tokenizer's size
REAL_VOCABULARY = 4096                        # and of one for --data
REAL_LATENTS = 8                              # channels of a fresh VAE for --data
CONTEXT = 128                                 # longest caption, in tokens, that the text tower reads


# ---- train.py --stage all -------------------------------------------------------------------------------

def plan(given):
    """For train.py --stage all: the flags of each run that it consists of, in order: [{name: value}]. It
    trains the parts that neither --init nor --eva has, into OUT/model, and stage 1. ValueError for a command
    line that makes no sense."""
    for name, why in (("fresh", "it trains what --init and --eva lack"), ("save", "it writes OUT/model"),
                      ("resume", "it goes on by itself"), ("dry_run", "that describes one stage"),
                      ("world", "the miniature has its own command, miniature/speedrun.sh")):
        if given.get(name):
            raise ValueError(f"--stage all doesn't take --{name.replace('_', '-')}: {why}")
    if not given.get("data"):
        raise ValueError("--stage all trains on your images: name them with --data")
    out = Path(given.get("out") or "runs/all")
    init, eva = (train.existing_model(given[name], name) if given.get(name) else None
                 for name in ("init", "eva"))
    model = str(out / "model")
    parts = folder_parts(init) | folder_parts(eva)
    has_llm, has_clip = "llm" in folder_parts(init), "clip" in parts
    missing = {"clip": not has_clip, "vae": not {"vae", "unet"} & parts, "decoder": "unet" not in parts,
               "0": not has_llm, "1": True}
    stages = [stage for stage in ("clip", "vae", "decoder", "0", "1") if missing[stage]]
    if missing["decoder"] and (has_clip or not missing["vae"]):
        has = ", ".join(sorted(parts & {"clip", "vae", "unet"}))
        raise ValueError(f"EVA-CLIP, VAE and UNet belong together: --init and --eva have only {has}. Train "
                         "the others with --stage decoder, or leave the folder out")
    idle = [name for name in given if not any(stage in train.FLAGS[name].stages for stage in stages)]
    if idle:
        raise ValueError(f"--{idle[0].replace('_', '-')} has no effect: --init and --eva leave only stage "
                         f"{' and '.join(stages)} to be trained")
    runs = []
    for stage in stages:
        flags = {name: value for name, value in given.items() if stage in train.FLAGS[name].stages}
        flags |= {"stage": stage, "out": str(out / stage), "save": model}
        flags["init"] = init if has_llm and stage in ("clip", "vae", "1") else model
        flags["fresh"] = flags["init"] == model          # what lies there is this very run's
        if stage == "1":
            flags["eva"] = model if missing["clip"] else eva or init
        runs.append(flags)
    return runs


# ---- the tokenizer --------------------------------------------------------------------------------------

def train_tokenizer(texts, vocab_size):
    """A byte-level BPE of Qwen2's form, learnt from an iterable of strings; at most vocab_size entries,
    SPECIAL last."""
    bpe = Tokenizers(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(data.QWEN_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - len(data.SPECIAL), initial_alphabet=alphabet, show_progress=False))
    bpe.add_special_tokens([AddedToken(token, normalized=False) for token in data.SPECIAL])
    return data.Tokenizer(bpe)


def world_tokenizer():
    """The nano tokenizer: learnt from conversations about the world, and prompts to generate."""
    return train_tokenizer(world_texts(1500), VOCABULARY)


def save_tokenizer(spec, folder):
    """For train.py --stage all: write a tokenizer learnt from the captions of --data into a model folder; of
    very many captions, from 20,000 that are spread evenly."""
    source, texts = data.open_source(spec), []
    for i in range(0, len(source), max(1, len(source) // 20_000)):
        with suppress(data.BadSample):
            texts += source.read(i, texts_only=True)[1].get("captions", [])
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer([data.DESCRIBE, data.SYSTEM, *texts], REAL_VOCABULARY).save(folder)


# ---- stage clip -----------------------------------------------------------------------------------------

class TextBlock(nn.Module):
    """Pre-norm transformer block of the text tower; `mask` (B, L) is True at real tokens."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x, mask):
        """x (B, L, C), mask (B, L) -> (B, L, C)."""
        B, L, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, L, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                     # each (B, h, L, hd)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])  # all see all real tokens
        x = x + self.proj(y.transpose(1, 2).reshape(B, L, C))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class TextTower(nn.Module):
    """Token ids and mask (B, L) -> a vector per text (B, E): bidirectional, mean over real tokens."""

    def __init__(self, vocab_size, width, layers, embed_dim, context):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(context, width) * 0.02)
        self.blocks = nn.ModuleList(TextBlock(width, max(1, width // 32)) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, ids, mask):
        """Raises ValueError where the texts are longer than the context."""
        L, context = ids.shape[1], len(self.positional_embedding)
        if context < L:
            raise ValueError(f"a caption of {L} tokens is longer than the text tower's context of {context}")
        x = self.token_embedding(ids) + self.positional_embedding[:L]            # (B, L, C)
        for block in self.blocks:
            x = block(x, mask)
        w = mask.to(x.dtype).unsqueeze(-1)                                       # (B, L, 1)
        return self.head((self.norm(x) * w).sum(1) / w.sum(1).clamp(min=1))      # (B, E)


class CLIP(nn.Module):
    """An EVA-CLIP tower and what trains it from scratch: a text tower (contrastive), linear heads, a scale
    loss.

    Only `.visual` is BLIP3-o's encoder; norm, head and text are CLIP's contrastive half (Radford et al.
    2021), pixel_head and place_head help in training.
    """

    def __init__(self, config, vocab_size, text_width=96, text_layers=2, embed_dim=64, context=CONTEXT):
        super().__init__()
        C, side = config.width, math.isqrt(config.n_query)
        if config.image_size % side:
            raise ValueError(f"image_size {config.image_size} does not divide into {side} x {side} features")
        self.visual = EvaClip(config)
        self.norm = nn.LayerNorm(C, eps=1e-6)
        self.head = nn.Linear(C, embed_dim)
        self.text = TextTower(vocab_size, text_width, text_layers, embed_dim, context)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.pixel_head = nn.Linear(C, 3 * (config.image_size // side) ** 2)
        self.place_head = nn.Linear(C, 16)
        places = 2 * sincos_positions(16, side)                                  # (64, 16), unit scale
        self.register_buffer("places", places, persistent=False)

    def encode_image(self, pixels):
        """pixels (B, 3, S, S), CLIP-normalised -> unit vectors (B, E)."""
        return F.normalize(self.head(self.norm(self.visual(pixels, with_cls=True)[1])), dim=-1)

    def encode_text(self, ids, mask):
        """ids (B, L), mask (B, L) True at real tokens -> unit vectors (B, E)."""
        return F.normalize(self.text(ids, mask), dim=-1)

    def forward(self, pixels, ids, mask, noise):
        """Losses of a batch of pairs, each a mean: {"contrastive", "pixels", "places", "scale"}.

        noise (B, 64, C) is added to the pooled features before the linear heads read them.

        contrastive: symmetric InfoNCE (CLIP): every image finds its caption in the batch, and the reverse.
        pixels: MSE of each feature's own block of the normalised image, predicted linearly from the noisy
        feature. The flow will add errors of that size, so shapes and colours have to lie in directions of
        large variance (the noise-augmented decoders of representation autoencoders). Contrastive training
        alone collapses small towers to a few dimensions.
        places: the same for where a feature lies in the grid: the pixel decoder's cross-attention sees a set
        of features, and learns only from themselves which is which.
        scale: per channel, mean^2 + (std - 1)^2: the raw features then have the unit scale that flow
        matching from unit noise wants, and no statistics have to be stored beside the weights.
        """
        tokens, cls = self.visual(pixels, with_cls=True)
        z = pool(tokens, self.visual.config.n_query)                             # (B, 64, C)
        image, text = F.normalize(self.head(self.norm(cls)), dim=-1), self.encode_text(ids, mask)
        logits = self.logit_scale.clamp(max=math.log(100)).exp() * image @ text.T        # (B, B)
        target = torch.arange(len(logits), device=logits.device)
        contrastive = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        noisy = z + noise.to(z)
        flat = z.flatten(0, 1)                                                   # (B*64, C)
        blocks = image_blocks(pixels, math.isqrt(z.shape[1]))
        return {"contrastive": contrastive,
                "pixels": F.mse_loss(self.pixel_head(noisy), blocks),
                "places": F.mse_loss(self.place_head(noisy), self.places.expand(len(z), -1, -1)),
                "scale": (flat.mean(0) ** 2 + (flat.std(0) - 1) ** 2).mean()}


def image_blocks(pixels, grid):
    """Cut images (B, 3, S, S) into a grid of square blocks, row-major: (B, grid^2, 3 * (S/grid)^2)."""
    return F.pixel_unshuffle(pixels, pixels.shape[-1] // grid).flatten(2).transpose(1, 2)


class ClipCollate:
    """Examples -> pixels, caption tokens and feature noise (B, 64, C) of standard deviation `std`."""

    def __init__(self, tokenizer, config, std=0.3):
        self.tokenizer, self.shape, self.std = tokenizer, (config.n_query, config.width), std

    def __call__(self, examples):
        ids, mask = data.pad([self.tokenizer.encode(e.prompt)[:CONTEXT] for e in examples])
        return {**train.collate_images(examples), "text_ids": ids, "text_mask": mask,
                "noise": self.std * train.unit_normal(examples, *self.shape)}


class ClipStage(train.Stage):
    """EVA-CLIP from scratch: contrastive, plus what makes its features fit for a flow; see CLIP."""
    long_captions = True

    def __init__(self, args):
        super().__init__()
        self.tokenizer = train.tokenizer_of(args.init)
        config = PRESETS["nano"]["clip"]
        self.size, self.trained = config.image_size, CLIP(config, self.tokenizer.vocab_size)
        continues = "clip" in folder_parts(args.init) and not args.fresh
        self.parts = {"EVA-CLIP": train.origin(args, continues)}
        if continues:
            self.trained.visual = EvaClip.from_pretrained(args.init)
        self.compile_target = self.trained.visual
        self.collate = ClipCollate(self.tokenizer, self.trained.visual.config)

    def forward(self, batch):
        losses = self.trained(batch["pixels"], batch["text_ids"], batch["text_mask"], batch["noise"])
        return {"pixels": 3 * losses["pixels"], "places": losses["places"],
                "contrastive": 0.3 * losses["contrastive"], "scale": 0.3 * losses["scale"]}

    def export(self, folder):
        self.tokenizer.save(folder)
        self.trained.visual.save_pretrained(folder, torch.float16)

    def probe(self, batch):
        image = self.trained.encode_image(batch["pixels"])
        text = self.trained.encode_text(batch["text_ids"], batch["text_mask"])
        correct = (image @ text.T).argmax(1) == torch.arange(len(image), device=image.device)
        places = self.trained.place_head(self.trained.visual.encode(batch["pixels"]))
        return {"_top1": correct.float().mean(),
                "_psnr": train.psnr(self.preview(batch)[0], train.to_unit_range(batch["pixels"])),
                "_place_error": F.mse_loss(places, self.trained.places.expand_as(places))}

    def preview(self, batch):
        side = math.isqrt(self.trained.visual.config.n_query)
        blocks = self.trained.pixel_head(self.trained.visual.encode(batch["pixels"])).transpose(1, 2)
        decoded = F.pixel_shuffle(blocks.unflatten(2, (side, side)), self.size // side)
        return [train.to_unit_range(decoded), train.to_unit_range(batch["pixels"])]


# ---- stage vae ------------------------------------------------------------------------------------------

class VaeCollate:
    """Examples -> pixels and the unit normal noise of a latent sample (B, latent, S/f, S/f)."""

    def __init__(self, size, vae):
        self.shape = vae.config.latent_channels, size // vae.factor, size // vae.factor

    def __call__(self, examples):
        return {**train.collate_images(examples), "noise": train.unit_normal(examples, *self.shape)}


class VaeStage(train.Stage):
    """The VAE: L1 reconstruction plus a little KL (Rombach et al. 2022, without the GAN, which plain
    shapes don't need)."""

    def __init__(self, args):
        super().__init__()
        self.size = PRESETS["nano"]["clip"].image_size
        has_vae, config = "vae" in folder_parts(args.init) and not args.fresh, PRESETS["nano"]["vae"]
        if args.data:                # images of the world are plain: four channels keep 36 dB of them
            config = replace(config, latent_channels=REAL_LATENTS)
        self.trained = VAE.from_pretrained(args.init) if has_vae else VAE(config)
        self.parts = {"VAE": train.origin(args, has_vae)}
        self.compile_target = self.trained.to(memory_format=torch.channels_last)
        self.collate = VaeCollate(self.size, self.trained)

    def forward(self, batch):
        target = data.to_signed(batch["pixels"]).to(memory_format=torch.channels_last)
        reconstruction, kl = self.trained(target, noise=batch["noise"])
        return {"l1": F.l1_loss(reconstruction, target), "mse": F.mse_loss(reconstruction, target),
                "kl": 1e-6 * kl}

    def export(self, folder):
        self.trained.save_pretrained(Path(folder) / "diffusion-decoder" / "vae", torch.float16)

    def probe(self, batch):
        return {"_psnr": train.psnr(self.preview(batch)[0], train.to_unit_range(batch["pixels"]))}

    def calibrate(self, batch):
        """Set the VAE's scaling_factor to 1 / std of these images' raw latents: unit-variance latents for
        the UNet."""
        std = float(self.trained.moments(data.to_signed(batch["pixels"]))[0].std())
        self.trained.config = replace(self.trained.config, scaling_factor=1 / std)

    def preview(self, batch):
        latents = self.trained.encode(data.to_signed(batch["pixels"]))
        return [(self.trained.decode(latents) / 2 + 0.5).clamp(0, 1), train.to_unit_range(batch["pixels"])]


# ---- stage 0 from random weights ------------------------------------------------------------------------

def whiten(patch_embed, config, size, n=512):
    """Set the vision tower's first layer so that the world's patches come out of it white, in their
    principal components (as the first convolution of Jordan's CIFAR-10 speedrun, arXiv 2404.00498).

    Random weights pass on little but the mean colour of a patch, whose variance is 2,500 times that of
    edges: shapes are then learnt late.
    """
    renders = np.stack([world.render(world.make_scene(0, i), size) for i in range(n)])
    patches, _ = data.to_patches(data.to_pixels(renders), config.patch_size, config.spatial_merge_size)
    second_moments = (patches.T @ patches).double() / len(patches)               # (3 t p p, 3 t p p)
    values, vectors = torch.linalg.eigh(second_moments)                          # ascending
    top = slice(-config.hidden_size, None)
    scale = (values[top] + 1e-5 * values[-1]).rsqrt()                            # noise stays small
    weight = (vectors[:, top] * scale).T.to(patch_embed.proj.weight)
    patch_embed.proj.weight.data.copy_(weight.view_as(patch_embed.proj.weight))


class FreshUnderstandingStage(train.UnderstandingStage):
    """Stage 0 of the miniature, where a vision tower may start from random weights."""

    def __init__(self, args):
        super().__init__(args)
        if args.fresh or "visual" not in folder_parts(args.init):
            whiten(self.trained.visual.patch_embed, self.trained.config.vision, self.size)
