"""BLIP3o: Qwen2.5-VL reads a prompt, 64 learnt queries attend to it, a DiT turns them into image features.

    images -> VisionTower -> image tokens --+
    prompt -> embeddings -------------------+--> Transformer --> logits (answers)
    [IMG] and the latent queries -----------+         |
                                                      +--> condition (B, n_query, D) --> NextDiT --+
                                                                                                   |
                                                                           features (B, 64, C) <---+

The language model follows Qwen2.5-VL (arXiv 2502.13923; class Qwen2_5_VLForConditionalGeneration in
transformers); the same `Transformer` runs Llama-3.2 and SmolLM2. Parameter names are those of released
checkpoints below their prefixes.
Shapes: B batch, L tokens, D width of the language model, H heads, hd dim of one head, V vocabulary, N image
patches of all images in a call, C feature channels.

Token ids, masks, labels and grid_thw may be on the CPU for weights on any device. What depends on their
values (padding, placeholders, windows, labels) is computed where they are, and only index tensors move, so
that a training step on a GPU never waits for the device.
"""
import json
import math
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import checkpoint
from checkpoint import (
    FRACTION,
    WEIGHTS,
    Interval,
    component,
    from_json,
    no_weights,
    official_name,
    our_name,
    read_headers,
    read_json,
    require_settings,
    same_tensor,
    section,
    sizes,
    typed,
)
from dit import DiTConfig, NextDiT, RMSNorm, attend, frequencies, maybe_checkpoint
from flow import SAMPLERS, euler_sample, flow_matching_loss, guide, random_tensor

# ---- configuration ----------------------------------------------------------------------------------------

TOKEN_ID = {"interval": Interval(-1, 2 ** 31 - 1)}  # -1: none, as in early Llama's pad_token_id
FROM_ZERO = {"interval": Interval(0, 10 ** 6)}


@dataclass
class TextConfig:
    """Sizes of the language model; names are those of the official config.json."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None = None        # None: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = False
    qkv_bias: bool = True              # Qwen2.5 has biases on q, k, v; Llama has none
    # M-RoPE: number of frequencies for time, row, column; None: 1-D RoPE
    mrope_section: list[int] | None = field(default=None, metadata=FROM_ZERO)
    rope_scaling: dict | None = None   # Llama-3's RoPE scaling, as in its config.json

    def __post_init__(self):
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads "
                                 f"{self.num_attention_heads}, unless head_dim is given")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: RoPE rotates pairs")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")
        axes = self.mrope_section
        if axes is not None and (len(axes) != 3 or 2 * sum(axes) != self.head_dim):
            raise ValueError(f"mrope_section {axes} must be three numbers whose sum is half of "
                             f"{self.head_dim} dims")


@dataclass
class VisionConfig:
    """Sizes of Qwen2.5-VL's vision tower, the released ones by default."""
    depth: int = 32
    hidden_size: int = 1280
    num_heads: int = 16
    intermediate_size: int = 3420
    patch_size: int = 14
    temporal_patch_size: int = 2       # a still image is repeated to 2 frames
    spatial_merge_size: int = 2        # 2 x 2 patches become one token of the language model
    window_size: int = 112             # side of an attention window, in pixels
    fullatt_block_indexes: list[int] = field(                   # blocks without windows
        default_factory=lambda: [7, 15, 23, 31], metadata=FROM_ZERO)
    out_hidden_size: int = 3584

    def __post_init__(self):
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 4 x num_heads "
                             f"{self.num_heads}")
        if self.window_size % (self.patch_size * self.spatial_merge_size):
            raise ValueError(f"window_size {self.window_size} must be a multiple of patch_size "
                             f"{self.patch_size} x spatial_merge_size {self.spatial_merge_size}")


@dataclass
class BLIP3oConfig:
    """The whole model. vision None: it takes no images. dit and mse_channels None: it generates none.

    The three designs of section 3.3: with a `dit`, flow matching generates CLIP features (CLIP + FM,
    BLIP3-o's choice) or, if `latents`, VAE latents on their own grid (VAE + FM). With `mse_channels`, a
    linear layer, the regressor, maps each query state to one CLIP feature, without noise (CLIP + MSE).
    """
    text: TextConfig
    vision: VisionConfig | None = None
    dit: DiTConfig | None = None
    n_query: int | None = field(default=None, metadata=FROM_ZERO)  # None: 64 where it generates, else 0
    query_std: float = field(default=1.0, metadata=FROM_ZERO)  # standard deviation of fresh queries
    grid: int = 8                      # an image has grid x grid features
    latents: bool = False              # the DiT generates VAE latents, not CLIP features
    mse_channels: int | None = None    # width of the CLIP features that a regressor predicts, without a DiT
    shift: float = 1.0                 # time shift of the flow (flow.shift_time); official: 1
    upsample_prompts: bool = False     # the LLM upsamples prompts before generation; official: no
    chat_images: bool = False          # the LLM answers [IMG] where an image is asked for; official: no
    image_token_id: int = field(default=151655, metadata=TOKEN_ID)  # <|image_pad|>, one vision token
    vision_start_token_id: int = field(default=151652, metadata=TOKEN_ID)
    eos_token_id: int | list[int] = field(default=151645, metadata=TOKEN_ID)  # generation_config.json's, too
    pad_token_id: int = field(default=151643, metadata=TOKEN_ID)

    def __post_init__(self):
        if self.n_query is None:
            self.n_query = 64 if self.generates else 0
        if self.generates and not self.n_query:
            raise ValueError("a model that generates needs queries (model.latent_queries), not n_query 0")
        if self.n_query and self.text.vocab_size < 3:
            raise ValueError(f"vocab_size {self.text.vocab_size} has no room for [IMG], [/IMG], <image>")
        if self.vision is not None and self.vision.out_hidden_size != self.text.hidden_size:
            raise ValueError(f"the vision tower's out_hidden_size {self.vision.out_hidden_size} must equal "
                             f"the language model's hidden_size {self.text.hidden_size}")
        if self.dit is not None and self.dit.cond_dim != self.text.hidden_size:
            raise ValueError(f"the DiT's cond_dim {self.dit.cond_dim} must equal the language model's "
                             f"hidden_size {self.text.hidden_size}")
        if self.mse_channels is not None and (self.dit is not None or self.n_query != self.grid ** 2):
            raise ValueError(f"CLIP + MSE maps a query to each of the {self.grid ** 2} cells, without DiT: "
                             f"not with {self.n_query} queries and {'a' if self.dit else 'no'} DiT")

    @property
    def generates(self):
        """Whether the model can generate image features."""
        return self.dit is not None or self.mse_channels is not None

    @property
    def parts(self):
        """Which of visual, llm, queries, dit and regressor the model has, as a set."""
        present = {"visual": self.vision, "llm": self.text, "queries": self.n_query, "dit": self.dit,
                   "regressor": self.mse_channels}
        return {part for part, value in present.items() if value}

    @property
    def gen_hidden_size(self):
        """C, the width of one image feature."""
        return self.mse_channels or self.dit.in_channels

    @property
    def img_token_id(self):
        """[IMG], the token before the queries; the vocabulary ends with [IMG], [/IMG], <image>."""
        return self.text.vocab_size - 3


PRESETS = {
    "4b": dict(  # BLIP3o-Model-4B: Qwen2.5-VL-3B and a DiT of 1.4B
        text=dict(vocab_size=151668, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
                  num_attention_heads=16, num_key_value_heads=2, mrope_section=[16, 24, 24],
                  tie_word_embeddings=True),
        vision=dict(out_hidden_size=2048), dit=dict(cond_dim=2048, rope="2d")),
    "8b": dict(  # BLIP3o-Model-8B: Qwen2.5-VL-7B and the same DiT
        text=dict(vocab_size=151668, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                  num_attention_heads=28, num_key_value_heads=4, mrope_section=[16, 24, 24]),
        vision=dict(out_hidden_size=3584), dit=dict(cond_dim=3584, rope="2d")),
    "nano": dict(  # small enough for a laptop; vocabulary size and token ids come from the caller
        text=dict(hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
                  head_dim=32, num_key_value_heads=2, mrope_section=[4, 6, 6], tie_word_embeddings=True,
                  rope_theta=10.0),    # with 1e6, M-RoPE can't tell the 4 columns of an image apart
        vision=dict(depth=4, hidden_size=96, num_heads=4, intermediate_size=256, patch_size=8,
                    window_size=32, fullatt_block_indexes=[1, 3], out_hidden_size=128),
        dit=dict(in_channels=48, patch_size=1, dim=192, n_layers=6, n_heads=6, n_kv_heads=2, ffn_dim=512,
                 cond_dim=128, rope="3d"),
        n_query=16, query_std=0.02, shift=5.0),
}


def preset(name, vocab_size=None, **changes):
    """The BLIP3oConfig of PRESETS[name]; vocab_size and `changes` replace its fields."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    spec = {**PRESETS[name], **changes}
    dit = spec.pop("dit")
    text = spec.pop("text") | ({} if vocab_size is None else {"vocab_size": vocab_size})
    if "vocab_size" not in text:
        raise ValueError(f"preset {name!r} needs a vocab_size")
    vision = VisionConfig(**spec.pop("vision"))
    return BLIP3oConfig(TextConfig(**text), vision, dit and DiTConfig(**dit), **spec)


# ---- parts that the vision tower and the language model share ---------------------------------------------

class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, dim, hidden, bias):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=bias)
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def cos_sin(angles):
    """Angles (..., hd/2) -> cos and sin (..., hd): angle k rotates dims k and k + hd/2 of a head."""
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate_half_split(x, cos, sin):
    """Rotate the pairs (k, k + hd/2) of x (..., hd) by cos, sin (..., hd): computed in the promoted dtype,
    returned in x's. dit.py rotates pairs (2j, 2j + 1): each follows its own released weights."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)


# ---- vision tower -----------------------------------------------------------------------------------------

def patch_layout(grid_thw, config):
    """Position of every patch: grid_thw (n_images, 3), in patches -> row, col, frame, window, each (N,).

    Patches are ordered by image, frame, cell of 2 x 2 merged patches, patch of the cell, cells and patches
    in raster order. `frame` and `window` are ids unique across images; windows at the right and lower border
    may be smaller (Qwen2.5-VL, 2.1.1).
    """
    m = config.spatial_merge_size
    side = config.window_size // config.patch_size  # of a window, in patches
    t, h, w = grid_thw.unbind(1)  # each (n_images,)
    across = (w + side - 1) // side  # windows in a row
    windows = across * ((h + side - 1) // side)  # windows in a frame
    # Ids of the first patch, frame and window of each image:
    first_patch, first_frame, first_window = (n.cumsum(0) - n for n in (t * h * w, t, t * windows))
    image = torch.repeat_interleave(torch.arange(len(t), device=t.device), t * h * w)  # (N,)
    h, w, across, windows = h[image], w[image], across[image], windows[image]  # (N,) from here on

    index = torch.arange(len(image), device=t.device) - first_patch[image]  # in its image
    frame, index = index // (h * w), index % (h * w)  # index in its frame
    cell, inside = index // m ** 2, index % m ** 2
    row = cell // (w // m) * m + inside // m
    col = cell % (w // m) * m + inside % m
    window = first_window[image] + frame * windows + row // side * across + col // side
    return row, col, first_frame[image] + frame, window


def group_by_size(segment, device):
    """Group windows by size, so that those of equal size go through attention as one batch without a mask:
    segment (N,), the window (or frame) id of every patch -> a list of patch indices (n windows, size), one
    tensor per size, and the inverse permutation (N,), on `device`."""
    order, counts = segment.argsort(stable=True), segment.bincount()
    size = counts[segment[order]]  # (N,), the size of each patch's window
    groups = [order[size == s].view(-1, s) for s in counts.unique().tolist()]
    inverse = torch.cat([rows.flatten() for rows in groups]).argsort()
    return [rows.to(device, non_blocking=True) for rows in groups], inverse.to(device, non_blocking=True)


class VisionAttention(nn.Module):
    """Attention among the patches of each window (or frame), not causal."""

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, cos, sin, groups, inverse):
        """x (N, D), cos and sin (N, 1, hd), groups and inverse from `group_by_size` -> (N, D)."""
        q, k, v = self.qkv(x).view(len(x), 3, self.num_heads, -1).unbind(1)  # each (N, H, hd)
        qkv = rotate_half_split(q, cos, sin), rotate_half_split(k, cos, sin), v
        out = []
        for rows in groups:  # (n, size)
            o = attend(*(y[rows].transpose(1, 2) for y in qkv))  # (n, H, size, hd)
            out.append(o.transpose(1, 2).reshape(-1, x.shape[1]))
        return self.proj(torch.cat(out)[inverse])


class VisionBlock(nn.Module):
    """Pre-norm attention and SwiGLU, both with biases: (N, D) -> (N, D)."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, 1e-6)
        self.norm2 = RMSNorm(config.hidden_size, 1e-6)
        self.attn = VisionAttention(config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x, cos, sin, groups, inverse):
        x = x + self.attn(self.norm1(x), cos, sin, groups, inverse)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Flattened patches (N, 3 t p p) -> (N, D): a linear layer, which checkpoints store as a Conv3d."""

    def __init__(self, config):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(3, config.hidden_size, kernel, stride=kernel, bias=False)

    def forward(self, pixels):
        weight = self.proj.weight.flatten(1)  # (D, 3 t p p)
        return F.linear(pixels.to(weight.dtype), weight)


class PatchMerger(nn.Module):
    """Merges the 2 x 2 patches of a cell: (N, D) -> (N / 4, out_hidden_size)."""

    def __init__(self, config):
        super().__init__()
        self.width = config.hidden_size * config.spatial_merge_size ** 2
        self.ln_q = RMSNorm(config.hidden_size, 1e-6)
        self.mlp = nn.Sequential(nn.Linear(self.width, self.width), nn.GELU(),
                                 nn.Linear(self.width, config.out_hidden_size))

    def forward(self, x):
        return self.mlp(self.ln_q(x).view(-1, self.width))


class VisionTower(nn.Module):
    """Qwen2.5-VL's ViT: patches of any number of images of any size -> tokens of the language model."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(self, pixels, grid_thw):
        """pixels (N, 3 t p p), grid_thw (n_images, 3) -> (N / 4, out_hidden_size), image by image, cells in
        raster order. Patches are flattened from (channel, frame, row, column), in `patch_layout`'s order."""
        config, m, device = self.config, self.config.spatial_merge_size, pixels.device
        if int(grid_thw.prod(1).sum()) != len(pixels) or bool((grid_thw[:, 1:] % m).any()):
            raise ValueError(f"grid_thw {grid_thw.tolist()} doesn't fit {len(pixels)} patches "
                             f"merged {m} x {m}")
        row, col, frame, window = patch_layout(grid_thw, config)
        row, col = row.to(device, non_blocking=True), col.to(device, non_blocking=True)
        freqs = frequencies(config.hidden_size // config.num_heads // 2, 10000.0, device)  # (hd/4,)
        angles = torch.cat([row[:, None] * freqs, col[:, None] * freqs], dim=-1)  # (N, hd/2)
        cos, sin = (y[:, None] for y in cos_sin(angles))  # (N, 1, hd), fp32
        windowed, whole = group_by_size(window, device), group_by_size(frame, device)

        x = self.patch_embed(pixels)  # (N, D)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, *(whole if i in config.fullatt_block_indexes else windowed))
        return self.merger(x)


# ---- language model ---------------------------------------------------------------------------------------

def text_frequencies(config, device):
    """Rotary frequencies of the language model, (hd/2,); Llama-3's scaling divides low ones by `factor`."""
    freqs = frequencies(config.head_dim, config.rope_theta, device)
    scaling = config.rope_scaling
    if scaling is None:
        return freqs
    # Turns within the original context: frequencies with few are divided, those with many are kept.
    turns = freqs * scaling["original_max_position_embeddings"] / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return freqs * (keep + (1 - keep) / scaling["factor"])


def plain_positions(mask):
    """mask (B, L) -> the index of each real token among those of its row, (B, L)."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def mrope_positions(ids, mask, grid_thw, config):
    """Qwen2.5-VL's positions (t, row, column) of every token, (3, B, L), and each row's delta, (B,).

    ids and mask (B, L); grid_thw (n_images, 3) in the order of the images in the batch, still images only.
    Text advances all three axes by 1. An image keeps t and spreads its cells over rows and columns; the text
    after it continues after the longer side. The next token has position (real tokens in its row) + delta.
    """
    spots = (ids == config.image_token_id) & mask  # (B, L), image placeholders
    m = config.vision.spatial_merge_size
    h, w = (grid_thw[:, 1:].to(ids.device) // m).unbind(1)  # each (n_images,), in merged cells
    placeholders, cells = int(spots.sum()), int((h * w).sum())
    if placeholders != cells:
        raise ValueError(f"the prompts hold {placeholders} image placeholders, the images {cells}")
    image = torch.repeat_interleave(torch.arange(len(h), device=ids.device), h * w)  # (placeholders,)
    index = torch.arange(len(image), device=ids.device) - ((h * w).cumsum(0) - h * w)[image]  # in its image
    # Position increment after each token: 1 for text; for an image 0, but max(h, w) at its last cell.
    step = mask.long()
    step[spots] = torch.where(index == (h * w)[image] - 1, torch.maximum(h, w)[image], 0)
    positions = (step.cumsum(1) - step).repeat(3, 1, 1)
    positions[1, spots] += index // w[image]
    positions[2, spots] += index % w[image]
    return positions, step.sum(1) - mask.sum(1)


def visible_tokens(length, past, mask, device):
    """Attention mask (1 or B, 1, L, P + L) bool of L = length new tokens after P = past ones, or None for
    plain causal attention, which is fastest. mask (B, P + L) bool marks real tokens, None means all."""
    if mask is None and length == 1:
        return None  # one new token attends to all before it
    # Padding after the last real token needs no mask: real tokens come before it.
    if past == 0 and (mask is None or bool((mask[:, 1:] <= mask[:, :-1]).all())):
        return None
    i = torch.arange(past, past + length, device=device)[:, None]
    j = torch.arange(past + length, device=device)
    visible = (j <= i)[None, None]
    if mask is None:
        return visible
    # Padding attends to itself: a softmax over nothing is NaN in some kernels.
    return (visible & mask.to(device, non_blocking=True)[:, None, None]) | (i == j)


class KVCache:
    """Keys and values of past tokens. capacity None concatenates (differentiable); a number of tokens
    preallocates memory and writes in place (for text that grows token by token)."""

    def __init__(self, capacity=None):
        self.capacity, self.layers, self.length = capacity, {}, 0

    def extend(self, layer, length, k, v):
        """Put k and v (B, heads, L, hd) after the first P = length tokens, and return those of all P + L.
        Idempotent, as activation checkpointing requires."""
        end = length + k.shape[2]
        if self.capacity is None:
            if length:
                past_k, past_v = (past[:, :, :length] for past in self.layers[layer])
                k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
            self.layers[layer] = k, v
            return k, v
        if layer not in self.layers:
            B, heads, _, hd = k.shape
            self.layers[layer] = [y.new_empty(B, heads, self.capacity, hd) for y in (k, v)]
        for past, new in zip(self.layers[layer], (k, v)):
            past[:, :, length:end] = new
        return [past[:, :, :end] for past in self.layers[layer]]

    def expand(self, rows):
        """Share the past of one row among `rows` rows: views, no copies."""
        self.layers = {layer: [y.expand(rows, -1, -1, -1) for y in past]
                       for layer, past in self.layers.items()}


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config):
        super().__init__()
        D, hd = config.hidden_size, config.head_dim
        self.head_dim = hd
        self.repeats = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(D, config.num_attention_heads * hd, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * hd, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * hd, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * hd, D, bias=False)

    def forward(self, x, cos, sin, visible, extend):
        """x (B, L, D), cos and sin (B, 1, L, hd), visible (see visible_tokens) -> (B, L, D); extend(k, v)
        puts the P cached tokens in front, None without cache."""
        L = x.shape[1]
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, L, hd)
                   for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        q, k = rotate_half_split(q, cos, sin), rotate_half_split(k, cos, sin)
        if extend is not None:
            k, v = extend(k, v)  # (B, kv heads, P + L, hd)
        if L == 1:  # decoding: heads that share a kv head become its queries, so nothing needs repeating
            q = q.reshape(len(x), k.shape[1], self.repeats, self.head_dim)
        else:  # repeated by hand: not all fused CUDA kernels with a mask support GQA
            k, v = (y.repeat_interleave(self.repeats, dim=1) for y in (k, v))
        o = attend(q, k, v, attn_mask=visible, is_causal=visible is None and L > 1)
        return self.o_proj(o.reshape(len(x), -1, L, self.head_dim).transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU: (B, L, D) -> (B, L, D)."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, bias=False)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, visible, extend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, visible, extend)
        return x + self.mlp(self.post_attention_layernorm(x))


class TokenEmbedding(nn.Embedding):
    """Ids (B, L) on any device -> embeddings (B, L, D). Ids move inside the call, because with
    sample.Pipeline's lazy loading the weights' device is unknown before it."""

    def forward(self, ids):
        return super().forward(ids.to(self.weight.device, non_blocking=True))


class Transformer(nn.Module):
    """A causal language model: Qwen2.5 (biases on q, k, v; M-RoPE) or Llama-3.2 (neither)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # see dit.maybe_checkpoint
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, ids):
        """Ids (B, L) -> embeddings (B, L, D), in the dtype of the activations."""
        return self.embed_tokens(ids).to(self.norm.weight.dtype)

    def head(self, hidden):
        """Hidden states (..., D) -> logits (..., V)."""
        if self.config.tie_word_embeddings:
            return F.linear(hidden, self.embed_tokens.weight.to(hidden.dtype))  # int8 models have bf16 here
        return self.lm_head(hidden)

    def rope(self, positions, dtype):
        """positions (B, L), or (3, B, L) for M-RoPE -> cos and sin (B, 1, L, hd)."""
        angles = positions[..., None].float() * text_frequencies(self.config, positions.device)
        if positions.ndim == 3:  # angles (3, B, L, hd/2): first section by t, second by row, third by column
            sections = angles.split(self.config.mrope_section, dim=-1)
            angles = torch.cat([section[axis] for axis, section in enumerate(sections)], dim=-1)
        return [y[:, None].to(dtype) for y in cos_sin(angles)]

    def forward(self, embeds, positions, mask=None, cache=None):
        """embeds (B, L, D), positions (B, L) or (3, B, L) -> hidden states after the final norm, (B, L, D).

        mask (B, P + L) bool marks real tokens, None means all; padding may be anywhere. `cache`, a KVCache,
        holds the P past tokens and receives the new ones; it may come from a pass without gradient.
        """
        past = 0 if cache is None else cache.length
        visible = visible_tokens(embeds.shape[1], past, mask, embeds.device)
        cos, sin = self.rope(positions.to(embeds.device, non_blocking=True), embeds.dtype)
        x = embeds
        for i, layer in enumerate(self.layers):
            extend = None if cache is None else partial(cache.extend, i, past)
            x = maybe_checkpoint(layer, self.checkpointing, x, cos, sin, visible, extend)
        if cache is not None:
            cache.length += embeds.shape[1]
        return self.norm(x)


# ---- the unified model ------------------------------------------------------------------------------------

def last_real(mask):
    """mask (B, L) -> index of the last real token of each row, (B,)."""
    return (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)


def penalise(scores, seen, penalty):
    """Repetition penalty > 1 (arXiv 1909.05858) on scores (B, V) of the tokens in seen (B, V) bool."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def pick_token(scores, temperature, top_p, generator, top_k=0):
    """scores (B, V) -> the next token (B,): the best at temperature 0, else a sample from the nucleus of the
    top_k best ones (0: of all). ValueError if the best is NaN or infinite.
    generator: one for all rows, or a list of one per row, which makes rows independent of their batch."""
    best = scores.amax(-1, keepdim=True)
    if not best.isfinite().all():
        raise ValueError("the language model's scores are NaN or infinite: the weights are broken, or too "
                         "large for this --dtype (try fp32)")
    if temperature == 0:
        return scores.argmax(-1)
    scores = (scores - best) / max(temperature, 1e-30)
    scores, order = scores.sort(dim=-1, descending=True)
    probs = scores[:, :top_k or None].softmax(-1)
    probs[probs.cumsum(-1) - probs > top_p] = 0  # keep the nucleus
    parts = zip(probs.split(1), generator) if isinstance(generator, list) else [(probs, generator)]
    choices = [torch.multinomial(p.to(g.device if g else p.device), 1, generator=g) for p, g in parts]
    return order.gather(1, torch.cat(choices).to(scores.device))[:, 0]


class BLIP3o(nn.Module):
    """Understands (`logits`, `generate_text`) and generates images (`condition`, `generate_features`).
    Components that a task doesn't need may be None: visual, llm, latent_queries, dit, regressor."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.visual = None if config.vision is None else VisionTower(config.vision)
        self.llm = Transformer(config.text)
        self.apply(self._init)
        self.latent_queries, self.dit, self.regressor = None, None, None
        if config.n_query:
            self.add_queries(config.n_query, config.query_std)
            self.add_generator(config)

    @staticmethod
    def _init(module):
        """As Qwen2.5: matrices and embeddings are normal with std 0.02, biases 0, norms 1."""
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv3d)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    # -- from a language model to BLIP3o, in this order --

    def resize_vocabulary(self, rows):
        """Resize embeddings, LM head and config.text.vocab_size to `rows`; no-op if that is their size.

        The last three rows become [IMG], [/IMG] and <image>. They and all other new rows start as the mean
        of the old ones; the official training never changes them.
        """
        text = self.config.text
        if len(self.llm.embed_tokens.weight) != rows:
            self.llm.embed_tokens.num_embeddings = rows
            self.llm.embed_tokens.weight = resized(self.llm.embed_tokens.weight, rows)
            if not text.tie_word_embeddings:
                self.llm.lm_head.out_features = rows
                self.llm.lm_head.weight = resized(self.llm.lm_head.weight, rows)
        text.vocab_size = self.llm.config.vocab_size = rows

    def add_queries(self, n_query, std):
        """Fresh queries of standard deviation `std`; if there are n_query already, they are kept."""
        weight = self.llm.embed_tokens.weight
        if self.latent_queries is None or self.latent_queries.shape[1] != n_query:
            queries = torch.randn(1, n_query, weight.shape[1]) * std
            self.latent_queries = nn.Parameter(queries.to(weight))
        self.config.n_query, self.config.query_std = n_query, std

    def add_generator(self, config):
        """Switch to `config`, a BLIP3oConfig, and create its DiT or regressor. Raises ValueError if the
        vocabulary or the queries don't have its sizes."""
        weight, queries = self.llm.embed_tokens.weight, self.latent_queries
        n_query = 0 if queries is None else queries.shape[1]
        if (len(weight), n_query) != (config.text.vocab_size, config.n_query):
            raise ValueError(f"the model has {len(weight)} tokens and {n_query} queries, the new config "
                             f"{config.text.vocab_size} and {config.n_query}: resize and add them first")
        self.config, self.llm.config = config, config.text
        # Not initialised by `_init`: the DiT has its own initialisation, the regressor PyTorch's.
        self.dit = None if config.dit is None else NextDiT(config.dit).to(weight)
        self.regressor = None
        if config.mse_channels is not None:
            self.regressor = nn.Linear(config.text.hidden_size, config.mse_channels).to(weight)

    # -- understanding --

    def embed(self, ids, mask, pixels=None, grid_thw=None):
        """Embeddings (B, L, D) of ids (B, L), with image placeholders replaced by the image tokens of pixels
        and grid_thw (see VisionTower); without grid_thw, pixels (count, D) are the image tokens."""
        spots = (ids == self.config.image_token_id) & mask
        spots = spots.flatten().nonzero()[:, 0]  # (count,)
        if pixels is None or not len(pixels):
            if len(spots):
                raise ValueError(f"the prompts hold {len(spots)} image placeholders, but pixels is empty")
            return self.llm.embed(ids)
        if self.visual is None and grid_thw is not None:
            raise ValueError("this model has no vision tower, so it can't take pixels")
        tokens = pixels if grid_thw is None else self.visual(pixels, grid_thw)  # (count, D)
        if len(spots) != len(tokens):
            raise ValueError(f"the prompts hold {len(spots)} image placeholders, the images {len(tokens)}")
        embeds = self.llm.embed(ids)
        spots = spots.to(embeds.device, non_blocking=True)  # not a bool mask, which would synchronise
        return embeds.flatten(0, 1).index_put((spots,), tokens.to(embeds.dtype)).view_as(embeds)

    def positions(self, ids, mask, grid_thw):
        """Positions for understanding, (B, L) or (3, B, L), and the next token's, (B,)."""
        if grid_thw is None or self.config.text.mrope_section is None:
            return plain_positions(mask), mask.sum(1)
        positions, delta = mrope_positions(ids, mask, grid_thw, self.config)
        return positions, mask.sum(1) + delta

    def hidden(self, ids, mask=None, pixels=None, grid_thw=None):
        """Hidden states (B, L, D) of the language model, with M-RoPE positions; arguments as in `logits`."""
        mask = real_tokens(ids, mask)
        embeds = self.embed(ids, mask, pixels, grid_thw)  # first: refuses images that the model can't take
        positions, _ = self.positions(ids, mask, grid_thw)
        return self.llm(embeds, positions, mask)

    def logits(self, ids, mask=None, pixels=None, grid_thw=None):
        """ids (B, L), mask (B, L) bool of real tokens, images as in VisionTower -> logits (B, L, V)."""
        return self.llm.head(self.hidden(ids, mask, pixels, grid_thw))

    @torch.no_grad()
    def generate_text(self, ids, mask=None, pixels=None, grid_thw=None, max_new_tokens=128, temperature=0.0,
                      top_p=1.0, repetition_penalty=1.0, stop_ids=None, on_token=None, generator=None,
                      top_k=0):
        """Answers to prompts (B, L): a list of B tensors with the new ids, without the stop token.

        Padding may be on either side. Temperature 0 is greedy. stop_ids defaults to eos and pad. on_token,
        if given, is called at every step with a list of B ids, None for rows that have ended.
        """
        mask, cache = real_tokens(ids, mask), KVCache(ids.shape[1] + max_new_tokens)
        embeds = self.embed(ids, mask, pixels, grid_thw)  # (B, L, D)
        positions, next_position = self.positions(ids, mask, grid_thw)
        hidden = self.llm(embeds, positions, mask, cache)  # (B, L, D)
        device = hidden.device
        stop_ids = torch.tensor(self.stop_ids() if stop_ids is None else list(stop_ids), device=device)
        hidden = hidden[torch.arange(len(ids), device=device), last_real(mask).to(device)]  # (B, D)
        seen = torch.zeros(len(ids), self.config.text.vocab_size, device=device)
        seen = seen.scatter_add_(1, ids.to(device), mask.to(seen)) > 0  # (B, V), tokens of the prompt
        padded = not bool(mask.all())
        mask, next_position = mask.to(device), next_position.to(device)
        new, done = [[] for _ in ids], torch.zeros(len(ids), dtype=torch.bool, device=device)
        for i in range(max_new_tokens):
            scores = penalise(self.llm.head(hidden).float(), seen, repetition_penalty)  # (B, V)
            token = pick_token(scores, temperature, top_p, generator, top_k)  # (B,)
            done |= torch.isin(token, stop_ids)
            step = [None if end else t for t, end in zip(token.tolist(), done.tolist())]
            for row, t in zip(new, step):
                row.extend([] if t is None else [t])
            if on_token is not None:
                on_token(step)
            if i == max_new_tokens - 1 or all(t is None for t in step):
                break
            seen.scatter_(1, token[:, None], True)
            mask = F.pad(mask, (0, 1), value=True)
            embeds = self.llm.embed(token)[:, None]  # (B, 1, D)
            hidden = self.llm(embeds, next_position[:, None], mask if padded else None, cache)[:, 0]
            next_position = next_position + 1
        return [torch.tensor(row, dtype=torch.long, device=ids.device) for row in new]

    def stop_ids(self):
        """The ids that end an answer: eos (one or several) and pad."""
        eos = self.config.eos_token_id
        return [*(eos if isinstance(eos, (list, tuple)) else [eos]), self.config.pad_token_id]

    # -- generation --

    def condition(self, ids, mask=None, pixels=None, grid_thw=None):
        """The query states (B, n_query, D) after the prompts ids (B, L): what the DiT conditions on.

        [IMG] and the queries follow the last real token of each row, wherever its padding is. Positions are
        plain even with images: the official code passes no M-RoPE positions here. Queries attend to the
        prompt and to the queries before them; the prompt can't attend to the queries. So while only they are
        trained, it needs no gradient and runs first, into a KVCache: the same gradient for far less work.
        The prefix of all prompts, the template, runs once.
        """
        mask = real_tokens(ids, mask)
        end, img = last_real(mask)[:, None] + 1, self.config.img_token_id
        ids = F.pad(ids, (0, 1), value=img).scatter(1, end, img)  # (B, L + 1)
        mask = F.pad(mask, (0, 1), value=False).scatter(1, end, True)
        modules = [part for part in (self.llm, self.visual) if part is not None]
        trained = any(p.requires_grad for part in modules for p in part.parameters())
        cache, positions, past = KVCache(), plain_positions(mask), 0
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            if pixels is None and len(ids) > 1:  # equal prompts keep their last token: no pass is empty
                past = int(((ids == ids[:1]) & mask).all(0).cumprod(0)[:-1].sum())
            if past:
                self.llm(self.llm.embed(ids[:1, :past]), positions[:1, :past], None, cache)
                cache.expand(len(ids))
            embeds = self.embed(ids[:, past:], mask[:, past:], pixels, grid_thw)
            self.llm(embeds, positions[:, past:], mask, cache)
        n = self.latent_queries.shape[1]
        positions = mask.sum(1, keepdim=True) + torch.arange(n, device=ids.device)  # (B, n_query)
        queries = self.latent_queries.to(self.llm.norm.weight.dtype).expand(len(ids), -1, -1)
        return self.llm(queries, positions, F.pad(mask, (0, n), value=True), cache)

    @torch.no_grad()
    def generate_features(self, cond, steps=30, guidance=3.0, noise=None, generator=None, trajectory=None,
                          sampler="euler", interval=(0, 1)):
        """Image features (B, grid^2, C) for cond (B, n_query, D), from noise (B, C, grid, grid).

        Noise is drawn in the condition's dtype unless given. A list given as `trajectory` receives all
        states (B, C, grid, grid) of flow.euler_sample, whose `sampler` it is; interval: the times of
        guidance, see flow.guide. A regressor reads cond alone.
        """
        if self.regressor is not None:
            return self.regressor(cond)
        if noise is None:
            shape = (len(cond), self.config.gen_hidden_size, self.config.grid, self.config.grid)
            noise = random_tensor(torch.randn, shape, generator, cond.device).to(cond)

        def prepare(both):  # `guide` puts the null conditions in front of the B conditions
            return self.dit.cache_condition(both, n_uniform=len(both) - len(cond))

        velocity = guide(lambda x, t, cache: self.dit(x, t, cache=cache), cond, None, guidance, prepare,
                         interval)
        features = euler_sample(velocity, noise, steps, self.config.shift, trajectory, sampler)
        return features.flatten(2).transpose(1, 2)  # (B, C, grid, grid) -> row-major cells

    # -- training --

    def forward(self, ids, mask=None, features=None, labels=None, pixels=None, grid_thw=None, drop=0.1,
                dropped=None, x0=None, t=None, generator=None, cond=None):
        """Losses: "flow" or "mse" with features (B, grid^2, C), "text" with labels (B, L).

        "flow" (B,), section 3.2: the DiT's velocity error given the query states, see flow_matching_loss.
        x0, t and dropped may hold k entries per sample, (B k, ...): query states are then computed once and
        used k times, and there are (B k,) losses. cond (B, n_query, D): the query states, if they are known.
        "mse" (B,), section 3.3: the regressor's error.
        "text" (n,): cross-entropy of the n tokens whose label isn't -100, given those before them.
        """
        losses = {}
        if features is not None:
            cond = self.condition(ids, mask, pixels, grid_thw) if cond is None else cond
            if self.regressor is not None:
                losses["mse"] = (self.regressor(cond).float() - features.float()).square().flatten(1).mean(1)
            else:
                side = self.config.grid
                x1 = features.float().transpose(1, 2).unflatten(2, (side, side))  # (B, C, grid, grid)
                k = 1 if x0 is None else len(x0) // len(x1)
                x1, cond = x1.repeat_interleave(k, 0), cond.repeat_interleave(k, 0)
                losses["flow"] = flow_matching_loss(self.dit, x1, cond, self.config.shift, drop, dropped, x0,
                                                    t, generator)
        if labels is not None:
            losses["text"] = self.text_loss(self.hidden(ids, mask, pixels, grid_thw), labels)
        return losses

    def text_loss(self, hidden, labels):
        """Cross-entropy (n,) of the n labels (B, L) that aren't -100, given the hidden states (B, L, D)."""
        targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()  # (B L,), what each position predicts
        labelled = (targets != -100).nonzero()[:, 0]  # (n,)
        targets = targets[labelled].to(hidden.device, non_blocking=True)
        labelled = labelled.to(hidden.device, non_blocking=True)
        hidden = hidden.flatten(0, 1)[labelled]  # (n, D); logits are V wide: only where they are needed
        return F.cross_entropy(self.llm.head(hidden).float(), targets, reduction="none")

    # -- files --

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32, parts=None):
        """Read a folder in the official layout: ours, BLIP3o-Model-4B/8B, Qwen2.5-VL, Llama or SmolLM2.

        parts: a subset of {"visual", "llm", "queries", "dit", "regressor"}, None for all in the folder; the
        others become None and aren't read. On device "meta" only headers are read (see load_strict), except
        an LM head stored beside tied embeddings: they are untied if they differ, as in transformers. Raises
        ValueError unless files and config.json match exactly, and for settings that aren't implemented.
        """
        folder = Path(folder)
        stored = read_headers(folder)
        if not stored:
            raise ValueError(no_weights(folder, "model"))
        config = read_config(folder, stored)
        parts = config.parts if parts is None else set(parts)
        absent = sorted(parts - config.parts)
        if absent:
            raise ValueError(f"{folder} has no {' and no '.join(absent)}; it has "
                             f"{', '.join(sorted(config.parts))}")

        head = stored.get("lm_head.weight")
        named = {our_name(key): tensor for key, tensor in stored.items()}
        embeddings = named.get("llm.embed_tokens.weight")
        if head and embeddings and config.text.tie_word_embeddings and "llm" in parts:
            config.text.tie_word_embeddings = same_tensor(head, embeddings)

        def build():
            model = cls(config)
            for part in config.parts - parts:
                setattr(model, {"queries": "latent_queries"}.get(part, part), None)
            return model

        tensors = {}
        for key, tensor in stored.items():
            name, part = our_name(key), component(key)
            # Some tied checkpoints store the head too, a copy of the embeddings.
            extra = name is None or key == "lm_head.weight" and config.text.tie_word_embeddings
            # load_strict reports the keys that config.json doesn't know.
            if not extra and (part in parts or part not in config.parts):
                tensors[name] = tensor
        if embeddings and checkpoint.unties(dtype) and config.text.tie_word_embeddings and "llm" in parts:
            config.text.tie_word_embeddings = False
            tensors["llm.lm_head.weight"] = embeddings
        return checkpoint.load_strict(build, tensors, folder, device, dtype)

    def save_pretrained(self, folder, dtype=None):
        """Write model.safetensors and config.json in the official layout, each atomically.

        Weights are stored as `dtype`; None keeps theirs. Everything else in the folder stays: other files,
        unknown keys of config.json, tensors of components that this model lacks. Raises ValueError if it
        holds shards, whose index would contradict the new file, and for a model in int8.
        """
        folder, state = Path(folder), self.state_dict()
        checkpoint.refuse_int8(state)
        tensors = {official_name(name): tensor.detach().to("cpu", dtype or tensor.dtype)
                   for name, tensor in state.items()}
        stored_as = next(iter(tensors.values())).dtype
        if (folder / WEIGHTS).exists():
            own = {component(key) for key in tensors}
            own |= {"dit", "regressor"} if own & {"dit", "regressor"} else set()  # one generator at a time
            for key, stored in read_headers(folder / WEIGHTS).items():
                if component(key) not in own:
                    tensors[key] = checkpoint.read_tensor(stored)
        checkpoint.save_weights(tensors, folder / WEIGHTS)
        write_config(folder, self, str(stored_as).removeprefix("torch."))


def real_tokens(ids, mask):
    """mask (B, L) as bool on the device of ids (B, L); None means that all tokens are real."""
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device, torch.bool)


def resized(weight, rows):
    """A weight (V, D) -> (rows, D); new rows, and always the last three, are the mean of the kept ones."""
    kept = weight.detach()[:rows - 3]
    mean = kept.float().mean(0, keepdim=True).to(kept.dtype)
    return nn.Parameter(torch.cat([kept, mean.expand(rows - len(kept), -1)]), weight.requires_grad)


# ---- config.json ------------------------------------------------------------------------------------------

FORMAT = 2  # version of the settings under "nano_blip3o"
NANO_KEYS = ("n_query", "query_std", "grid", "shift", "upsample_prompts", "chat_images", "latents",
             "mse_channels")
GENERATOR_KEYS = ("dit", "grid", "shift", "latents", "mse_channels")
FOREIGN_KEYS = ("clip", "sampling")  # read by clip_decoder.py and sample.py
RETIRED = {"queries_supervised": (False,)}  # settings of older code -> the values that change nothing
TOKEN_IDS = ("image_token_id", "vision_start_token_id", "eos_token_id", "pad_token_id")
CHOICES = {"sampler": SAMPLERS, "decoder_sampler": ("euler", "dpm++2m"),
           "decoder_spacing": ("leading", "trailing", "karras")}
SAMPLING = {"steps": (int, Interval(1, 10_000)), "cfg": (float, Interval(0, 1000)),
            "decoder_steps": (int, Interval(1, 1000)), "decoder_cfg": (float, Interval(0, 1000)),
            "cfg_interval": (list[float], FRACTION), "upsample": (bool, None),
            **dict.fromkeys(CHOICES, (str, None))}  # under nano_blip3o.sampling: type and range

# Every field that transformers' class of a model_type reads is read here, too, or fixed to the values for
# which this code computes the same, or harmless (test_all.py lists them all); others are ignored, as there.
COMMON = {"hidden_act": ("silu", "swish"), "is_causal": (True, None), "partial_rotary_factor": (1, None)}
BIASES = {"attention_bias": (False, None), "mlp_bias": (False, None)}  # Llama's
VISION_FIXED = {
    "model_type": ("qwen2_5_vl_vision", "qwen2_5_vl", None), "hidden_act": ("silu", "swish"),
    "in_channels": (3,), **dict.fromkeys(("head_dim", "num_attention_heads", "num_hidden_layers"), (None,)),
    "rope_parameters": (None, *({"rope_type": kind, "rope_theta": 10000} for kind in ("axial", "default")))}


class Family(NamedTuple):
    """What transformers' class of a model_type assumes."""
    fixed: dict       # the fields that it reads and this code doesn't -> the values that change nothing
    defaults: dict    # of fields on which config.json is silent
    overrides: dict   # of fields of Windows that it doesn't read
    qkv_bias: bool    # whether q, k and v may have biases


QWEN_VL = Family(COMMON, {"rope_theta": 1e6, "max_position_embeddings": 32768, "max_window_layers": 80}, {},
                 True)
FAMILIES = {
    "qwen2_5_vl": QWEN_VL, "qwen2_5_vl_text": QWEN_VL, "blip3o_qwen": QWEN_VL,
    "blip3o_qwen_inference": QWEN_VL,
    "qwen2": Family(COMMON, {"rope_theta": 1e4, "max_position_embeddings": 32768, "max_window_layers": 28},
                    {}, True),
    "llama": Family(COMMON | BIASES, {"rope_theta": 1e4, "max_position_embeddings": 2048},
                    {"use_sliding_window": False, "layer_types": None}, False),
    "mistral": Family(COMMON, {"rope_theta": 1e4, "max_position_embeddings": 131072},
                      {"use_sliding_window": True, "max_window_layers": 0, "layer_types": None}, False)}


@dataclass
class Windows:
    """The fields of config.json from which transformers makes sliding windows."""
    max_position_embeddings: int
    max_window_layers: int | None = field(default=None, metadata=FROM_ZERO)
    use_sliding_window: bool | None = False
    sliding_window: int | None = field(default=4096, metadata=FROM_ZERO)
    layer_types: list[str] | None = None

    def refuse(self, path, layers):
        """ValueError if one of `layers` layers sees less than the context that the model was made for."""
        kinds, window = set(self.layer_types or []), self.sliding_window if self.use_sliding_window else None
        if not kinds and window is not None and (self.max_window_layers or 0) < layers:
            kinds = {"sliding_attention"}
        other = sorted(kinds - {"full_attention", "sliding_attention"})
        if other:
            raise ValueError(f"{path} asks for {', '.join(other)} in layer_types, which is not implemented")
        if "sliding_attention" in kinds and (window is None or window < self.max_position_embeddings):
            raise ValueError(f"{path} asks for sliding windows of {window} tokens (sliding_window, "
                             "use_sliding_window, layer_types), fewer than its max_position_embeddings "
                             f"{self.max_position_embeddings}, which is not implemented")


@dataclass
class Llama3Rope:
    """Llama-3's RoPE scaling in config.json; see `text_frequencies`."""
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self):
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"low_freq_factor {self.low_freq_factor} must be below high_freq_factor "
                             f"{self.high_freq_factor}")


def read_config(folder, stored):
    """BLIP3oConfig from config.json, and from the shapes in stored = read_headers(folder) what it lacks."""
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} has no config.json")
    raw = read_json(path)
    ours = our_settings(path, raw)
    nested = section(raw, "text_config", path)  # newer files nest the language model's fields
    for model_type in (raw.get("model_type"), nested.get("model_type") or "llama"):
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise ValueError(f"{path} has the model_type {json.dumps(model_type)[:60]}; implemented are "
                             f"{', '.join(FAMILIES)}")
    text = raw | {name: value for name, value in nested.items() if value is not None}
    vision = section(raw, "vision_config", path)
    require_settings(vision, VISION_FIXED, f"{path}: vision_config")
    dit = None
    if any(component(key) == "dit" for key in stored):
        where = f"{path}: nano_blip3o.dit" if ours["dit"] else f"the DiT in {folder}"
        dit = from_json(DiTConfig, ours["dit"] or dit_sizes(where, stored), where)
    settings = {name: ours[name] for name in NANO_KEYS if name in ours} | {"n_query": 0}
    for part in (text, raw):
        settings |= {name: part[name] for name in TOKEN_IDS if part.get(name) is not None}
    if "model.latent_queries" in stored:
        settings["n_query"] = sizes(stored, "model.latent_queries", 3, folder)[1]
    config = from_json(BLIP3oConfig, settings | {
        "text": text_config(path, raw, text, stored, bool(vision)), "dit": dit,
        "vision": from_json(VisionConfig, vision, f"{path}: vision_config") if vision else None}, path)
    config.eos_token_id = with_generation_ids(folder / "generation_config.json", config.eos_token_id)
    features = section(ours, "clip", f"{path}: nano_blip3o").get("n_query")
    if dit and not config.latents and features not in (None, config.grid ** 2):
        raise ValueError(f"{path}: nano_blip3o.grid {config.grid} makes {config.grid ** 2} features, the "
                         f"decoder takes clip.n_query {features}")
    return config


def with_generation_ids(path, eos):
    """eos_token_id of config.json, an id or a list, and those that generation_config.json adds."""
    added = read_json(path).get("eos_token_id") if path.exists() else None
    added = typed(added, int | list[int] | None, TOKEN_ID["interval"], f"{path}: eos_token_id")
    lists = [ids if isinstance(ids, list) else [ids] for ids in (eos, added) if ids is not None]
    return eos if set(lists[-1]) <= set(lists[0]) else list(dict.fromkeys(sum(lists, [])))


def our_settings(path, raw):
    """The settings under "nano_blip3o" in config.json, "dit" always; ValueError for unknown ones."""
    ours = section(raw, "nano_blip3o", path)
    version = typed(ours.get("format", 1), int, None, f"{path}: nano_blip3o.format")
    if not 1 <= version <= FORMAT:
        raise ValueError(f'{path} has format {version} under "nano_blip3o", this code reads up to '
                         f"{FORMAT}: update the code")
    dit = section(ours, "dit", f"{path}: nano_blip3o")
    unknown = sorted(ours.keys() - {"format", "dit", *NANO_KEYS, *FOREIGN_KEYS, *RETIRED})
    unknown += sorted(f"dit.{name}" for name in dit.keys() - {f.name for f in fields(DiTConfig)})
    if unknown:
        raise ValueError(f'{path} has unknown settings under "nano_blip3o": {", ".join(unknown)}')
    require_settings(ours, RETIRED, f"{path}: nano_blip3o")
    return ours | {"dit": dit}


def read_sampling(config, where):
    """The sampling settings that a model folder asks for, a subset of SAMPLING's names.

    config: the object in its config.json. Raises ValueError, beginning with `where`, for unknown names and
    samplers, other types and numbers out of range.
    """
    ours, where = section(config, "nano_blip3o", where), f"{where}: nano_blip3o"
    asked = section(ours, "sampling", where)
    unknown = sorted(asked.keys() - SAMPLING.keys())
    if unknown:
        raise ValueError(f"{where}.sampling has unknown settings: {', '.join(unknown)}; there are "
                         f"{', '.join(SAMPLING)}")
    asked = {name: typed(value, *SAMPLING[name], f"{where}.sampling.{name}")
             for name, value in asked.items()}
    require_settings(asked, CHOICES, f"{where}.sampling")
    interval = asked.get("cfg_interval", [0, 1])
    if len(interval) != 2 or interval[0] > interval[1]:
        raise ValueError(f"{where}.sampling.cfg_interval must be [low, high], low not above high, not "
                         f"{interval}"[:400])
    return asked


def text_config(path, raw, text, stored, sees):
    """TextConfig from config.json: raw is the file, text the same updated with its text_config; sees: there
    is a vision tower."""
    family = FAMILIES[raw["model_type"]]
    require_settings(text, family.fixed, path, ["rms_norm_eps"])
    text = family.defaults | text | family.overrides
    rope = rope_settings(path, text)
    sections = rope.get("mrope_section") or ([16, 24, 24] if sees else None)  # transformers' default
    ties = [typed(part.get("tie_word_embeddings"), bool | None, None, f"{path}: tie_word_embeddings")
            for part in (raw, text)]
    ties = [tie for tie in ties if tie is not None] or ["lm_head.weight" not in stored]
    biases = any(key.endswith("layers.0.self_attn.q_proj.bias") for key in stored)
    if text.get("num_key_value_heads") is None:
        text["num_key_value_heads"] = text.get("num_attention_heads")
    config = from_json(TextConfig, text | {
        "rope_theta": rope["rope_theta"], "mrope_section": sections,
        "rope_scaling": rope if rope["rope_type"] == "llama3" else None,
        "tie_word_embeddings": any(ties), "qkv_bias": biases and family.qkv_bias}, path)
    from_json(Windows, text, path).refuse(path, config.num_hidden_layers)
    return config


def rope_settings(path, text):
    """rope_parameters (transformers 5) or rope_scaling (4) of config.json, checked, always with rope_type
    and rope_theta."""
    name = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"  # transformers' order
    rope = section(text, name, path)
    where = f"{path}: {name}"
    nested = sorted(name for name, value in rope.items() if isinstance(value, dict))
    if nested:
        raise ValueError(f"{where} names {', '.join(nested)}: RoPE that differs between layers is not "
                         "implemented")
    require_settings(rope, {"partial_rotary_factor": (1, None)}, where)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "mrope", "llama3"):
        raise ValueError(f"{where} asks for {kind} RoPE scaling: not implemented")
    theta = text["rope_theta"] if rope.get("rope_theta") is None else rope["rope_theta"]
    theta = typed(theta, float, Interval(above=0), f"{path}: rope_theta")
    rope = {"rope_type": kind} | rope | {"rope_theta": theta}
    if kind == "llama3":
        original = "original_max_position_embeddings"
        rope[original] = text.get(original) or rope.get(original) or text.get("max_position_embeddings")
        from_json(Llama3Rope, rope, where)
    return rope


def dit_sizes(where, stored):
    """DiTConfig's fields from the shapes in an official checkpoint, whose config.json lacks them."""
    prefix = "model.dit.model."
    found = {key[len(prefix):]: tensor for key, tensor in stored.items() if key.startswith(prefix)}
    dim, in_channels = sizes(found, "patch_embedder.proj.weight", 2, where)
    heads, = sizes(found, "layers.0.gate", 1, where)

    def size(name, axis):
        return sizes(found, name, 2, where)[axis]
    return dict(in_channels=in_channels, dim=dim, n_heads=heads, rope="2d",
                n_layers=checkpoint.stored_layers(found, "layers."),
                n_kv_heads=size("layers.0.attn1.to_k.weight", 0) * heads // dim,
                ffn_dim=size("layers.0.feed_forward.linear_1.weight", 0),
                cond_dim=size("caption_projection.linear_1.weight", 1),
                modulation_dim=size("time_caption_embed.timestep_embedder.linear_1.weight", 0))


def write_config(folder, model, dtype):
    """Create or update config.json: official fields, and all others under "nano_blip3o"."""
    path, config = folder / "config.json", model.config
    raw = read_json(path) if path.exists() else {}
    raw.setdefault("model_type", "qwen2_5_vl")
    if config.generates and raw["model_type"] in ("qwen2_5_vl", "qwen2_5_vl_text"):
        raw["model_type"] = "blip3o_qwen"
    text = raw.get("text_config") or raw
    text.update(asdict(config.text))
    for name in ("qkv_bias", "mrope_section", "rope_parameters"):  # not official, or written as rope_scaling
        text.pop(name, None)
    if config.text.mrope_section is not None:
        text["rope_scaling"] = {"type": "mrope", "mrope_section": config.text.mrope_section}
    raw |= {"tie_word_embeddings": config.text.tie_word_embeddings, "torch_dtype": dtype}
    raw |= {name: getattr(config, name) for name in TOKEN_IDS}
    if model.visual is not None:
        raw["vision_config"] = section(raw, "vision_config", path) | asdict(config.vision)
    if model.latent_queries is not None:
        raw["n_query"] = config.n_query
        if config.generates:
            raw["gen_hidden_size"] = config.gen_hidden_size
        before = section(raw, "nano_blip3o", path)
        raw["nano_blip3o"] = {**before, "format": FORMAT, "dit": config.dit and asdict(config.dit),
                              **{name: getattr(config, name) for name in NANO_KEYS}}
        if not config.generates:  # the folder's generator stays, and so do its settings
            raw["nano_blip3o"] |= {name: before[name] for name in GENERATOR_KEYS if name in before}
    checkpoint.write_json(path, raw)
