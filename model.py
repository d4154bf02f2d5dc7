"""BLIP3o: Qwen2.5-VL reads a prompt, 64 learnt queries listen to it, a DiT turns what they heard into image features.

    images -> VisionTower -> image tokens --+
    prompt -> embeddings -------------------+--> Transformer --> logits (answers)
    [IMG] and the latent queries -----------+         |
                                                      +--> condition (B, n_query, D) --> NextDiT --> features (B, 64, C)

The language model follows Qwen2.5-VL (arXiv 2502.13923; class Qwen2_5_VLForConditionalGeneration in transformers); the
same `Transformer` runs Llama-3.2 and SmolLM2. Parameter names are those of released checkpoints below their prefixes.
Shapes: B batch, L tokens, D width of the language model, H heads, hd dim of one head, V vocabulary, N image patches of
all images in a call, C feature channels.
"""
import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from dit import DiTConfig, NextDiT, RMSNorm, recomputed
from flow import euler_sample, flow_matching_loss, guide


# ---- configuration -------------------------------------------------------------------------------------------------

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
    mrope_section: list | None = None  # how many frequencies turn by time, row, column; None: plain 1-D RoPE
    rope_scaling: dict | None = None   # Llama-3.2's stretched frequencies, as in its config.json

    def __post_init__(self):
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")
        if self.mrope_section is not None and 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(f"mrope_section {self.mrope_section} must sum to half the head dim {self.head_dim}")


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
    fullatt_block_indexes: list = field(default_factory=lambda: [7, 15, 23, 31])  # they look at the whole image
    out_hidden_size: int = 3584


@dataclass
class BLIP3oConfig:
    """The whole model. Without `vision` it can't see, without `dit` (or `mse_channels`) it can't draw.

    The three designs of section 3.3: with a `dit`, flow matching makes CLIP features (CLIP + FM, BLIP3-o's choice) or, if
    `latents`, the VAE's latents at their own grid (VAE + FM). With `mse_channels`, one linear map of each query's state is
    the CLIP feature of that place (CLIP + MSE): no noise, so one picture for each prompt.
    """
    text: TextConfig
    vision: VisionConfig | None = None
    dit: DiTConfig | None = None
    n_query: int | None = None         # None: 64 where something draws, else 0
    query_std: float = 1.0             # spread of the queries at birth; official: unit variance
    grid: int = 8                      # the features of an image form a grid x grid square
    latents: bool = False              # the DiT makes VAE latents, not CLIP features
    mse_channels: int | None = None    # width of the features that the queries' states are mapped to, without a DiT
    shift: float = 1.0                 # time shift of the flow (flow.shift_time); official: 1
    expands: bool = False              # tells a prompt in full before it draws it (sample.Pipeline.expand); official: no
    image_token_id: int = 151655       # <|image_pad|>, the placeholder of one vision token
    vision_start_token_id: int = 151652
    eos_token_id: int | list = 151645
    pad_token_id: int = 151643

    def __post_init__(self):
        if self.n_query is None:
            self.n_query = 64 if self.draws else 0
        if self.vision is not None and self.vision.out_hidden_size != self.text.hidden_size:
            raise ValueError(f"the vision tower's out_hidden_size {self.vision.out_hidden_size} must equal the "
                             f"language model's hidden_size {self.text.hidden_size}")
        if self.dit is not None and self.dit.cond_dim != self.text.hidden_size:
            raise ValueError(f"the DiT's cond_dim {self.dit.cond_dim} must equal the language model's hidden_size "
                             f"{self.text.hidden_size}")
        if self.mse_channels is not None and (self.dit is not None or self.n_query != self.grid ** 2):
            raise ValueError(f"CLIP + MSE maps one query to each of the {self.grid ** 2} features, without a DiT; this "
                             f"configuration has {self.n_query} queries and {'a' if self.dit else 'no'} DiT")

    @property
    def draws(self):
        """Can it make image features at all?"""
        return self.dit is not None or self.mse_channels is not None

    @property
    def gen_hidden_size(self):
        """C, the width of one image feature."""
        return self.mse_channels or self.dit.in_channels

    @property
    def img_token_id(self):
        """[IMG], the token before the queries: the first of the last three rows, [IMG], [/IMG], <image>."""
        return self.text.vocab_size - 3


_NANO_TEXT = dict(hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4, head_dim=32,
                  num_key_value_heads=2, mrope_section=[4, 6, 6], tie_word_embeddings=True)
PRESETS = {
    "4b": dict(  # BLIP3o-Model-4B: Qwen2.5-VL-3B and a DiT of 1.4B
        text=dict(vocab_size=151668, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
                  num_attention_heads=16, num_key_value_heads=2, mrope_section=[16, 24, 24], tie_word_embeddings=True),
        vision=dict(out_hidden_size=2048), dit=dict(cond_dim=2048, rope="2d")),
    "8b": dict(  # BLIP3o-Model-8B: Qwen2.5-VL-7B and the same DiT
        text=dict(vocab_size=151668, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                  num_attention_heads=28, num_key_value_heads=4, mrope_section=[16, 24, 24]),
        vision=dict(out_hidden_size=3584), dit=dict(cond_dim=3584, rope="2d")),
    "nano": dict(  # the same in small, for a laptop; the vocabulary and its token ids are the caller's
        text=_NANO_TEXT,
        vision=dict(depth=4, hidden_size=96, num_heads=4, intermediate_size=256, patch_size=8, window_size=32,
                    fullatt_block_indexes=[1, 3], out_hidden_size=128),
        dit=dict(in_channels=48, patch_size=1, dim=192, n_layers=6, n_heads=6, n_kv_heads=2, ffn_dim=512,
                 cond_dim=128, rope="3d"),
        n_query=16, query_std=0.02, shift=5.0),
}


def preset(name, vocab_size=None, **changes):
    """The BLIP3oConfig of PRESETS[name]; `vocab_size` replaces the preset's, `changes` are fields of BLIP3oConfig."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    spec = {**PRESETS[name], **changes}
    dit = spec.pop("dit")
    text = spec.pop("text") | ({} if vocab_size is None else {"vocab_size": vocab_size})
    if "vocab_size" not in text:
        raise ValueError(f"preset {name!r} needs a vocab_size")
    return BLIP3oConfig(TextConfig(**text), VisionConfig(**spec.pop("vision")), dit and DiTConfig(**dit), **spec)


# ---- parts that the vision tower and the language model share ------------------------------------------------------

class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, dim, hidden, bias):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=bias)
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def frequencies(dim, theta, device):
    """The dim/2 rotary frequencies theta^(-2k/dim), (dim/2,) fp32."""
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def cos_sin(angles):
    """Angles (..., hd/2) -> cos and sin (..., hd): dims k and k + hd/2 of a head form the pair that angle k turns."""
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn x by cos and sin (..., hd) of `cos_sin`; computed in the wider of their dtypes, returned in x's."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)


# ---- vision tower --------------------------------------------------------------------------------------------------

def patch_layout(grid_thw, config):
    """Where each patch lies. grid_thw (n_images, 3): frames, rows and columns of patches -> row, col, frame, window.

    All four are (N,) over the patches of all images, in the order of the pixels' rows: frame by frame, in each the
    merged cells (2 x 2 patches) in raster order, in each its patches. `frame` and `window` are numbers that no other
    image shares; windows count in raster order, those at the right and lower border may be smaller (Qwen2.5-VL, 2.1.1).
    """
    m = config.spatial_merge_size
    side = config.window_size // config.patch_size  # of a window, in patches
    t, h, w = grid_thw.unbind(1)
    across = (w + side - 1) // side                        # windows in a row
    windows = across * ((h + side - 1) // side)            # windows in a frame
    first = [(count.cumsum(0) - count) for count in (t * h * w, t, t * windows)]  # patch, frame, window of each image
    image = torch.repeat_interleave(torch.arange(len(t), device=t.device), t * h * w)  # (N,)
    (first_patch, first_frame, first_window), h, w, across, windows = (
        [f[image] for f in first], h[image], w[image], across[image], windows[image])

    index = torch.arange(len(image), device=t.device) - first_patch  # inside its image
    frame, index = index // (h * w), index % (h * w)
    cell, inside = index // m ** 2, index % m ** 2
    row = cell // (w // m) * m + inside // m
    col = cell % (w // m) * m + inside % m
    window = first_window + frame * windows + row // side * across + col // side
    return row, col, first_frame + frame, window


def group_by_size(segment):
    """segment (N,), the window or frame of every patch -> index tensors (n, size), one for each size that occurs, and
    the (N,) order that undoes them: equal windows of all images go through attention as one batch, without a mask."""
    order, counts = segment.argsort(stable=True), segment.bincount()
    size = counts[segment[order]]  # (N,) how large the window of each patch is
    groups = [order[size == s].view(-1, s) for s in counts.unique().tolist()]
    return groups, torch.cat([g.flatten() for g in groups]).argsort()


class VisionAttention(nn.Module):
    """Attention inside each window (or frame), without a causal mask."""

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, cos, sin, groups, undo):
        """x (N, D), cos and sin (N, 1, hd), groups and undo from `group_by_size` -> (N, D)."""
        q, k, v = self.qkv(x).view(len(x), 3, self.num_heads, -1).unbind(1)  # each (N, H, hd)
        qkv = rotate(q, cos, sin), rotate(k, cos, sin), v
        out = []
        for rows in groups:  # (n, size)
            o = F.scaled_dot_product_attention(*(y[rows].transpose(1, 2) for y in qkv))  # (n, H, size, hd)
            out.append(o.transpose(1, 2).reshape(-1, x.shape[1]))
        return self.proj(torch.cat(out)[undo])


class VisionBlock(nn.Module):
    """Pre-norm attention and SwiGLU, both with biases."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, 1e-6)
        self.norm2 = RMSNorm(config.hidden_size, 1e-6)
        self.attn = VisionAttention(config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x, cos, sin, groups, undo):
        x = x + self.attn(self.norm1(x), cos, sin, groups, undo)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """One linear map of a flattened patch. Checkpoints store it as a Conv3d, whose stride is its kernel: a matmul."""

    def __init__(self, config):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(3, config.hidden_size, kernel, stride=kernel, bias=False)

    def forward(self, pixels):
        weight = self.proj.weight.flatten(1)  # (D, 3 t p p)
        return F.linear(pixels.to(weight.dtype), weight)


class PatchMerger(nn.Module):
    """Four neighbouring patches -> one token of the language model's width."""

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
        """pixels (N, 3 t p p): flattened patches (channel, frame, row, column) in the order of `patch_layout`;
        grid_thw (n_images, 3) -> (N / merge^2, out_hidden_size), the merged cells of each image in raster order.
        """
        config, m = self.config, self.config.spatial_merge_size
        grid_thw = grid_thw.to(pixels.device)
        if int(grid_thw.prod(1).sum()) != len(pixels) or bool((grid_thw[:, 1:] % m).any()):
            raise ValueError(f"grid_thw {grid_thw.tolist()} doesn't fit {len(pixels)} patches merged {m} x {m}")
        row, col, frame, window = patch_layout(grid_thw, config)
        freqs = frequencies(config.hidden_size // config.num_heads // 2, 10000.0, pixels.device)  # (hd/4,)
        angles = torch.cat([row[:, None] * freqs, col[:, None] * freqs], dim=-1)  # (N, hd/2)
        cos, sin = (y[:, None] for y in cos_sin(angles))  # (N, 1, hd), fp32
        windowed, whole = group_by_size(window), group_by_size(frame)

        x = self.patch_embed(pixels)  # (N, D)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, *(whole if i in config.fullatt_block_indexes else windowed))
        return self.merger(x)


# ---- language model ------------------------------------------------------------------------------------------------

def text_frequencies(config, device):
    """Rotary frequencies of the language model, (hd/2,). Llama-3.2 slows the low ones by a factor to reach further."""
    freqs = frequencies(config.head_dim, config.rope_theta, device)
    scaling = config.rope_scaling
    if scaling is None:
        return freqs
    # Turns within the original context: few (slow) are divided by the factor, many (fast) stay, a ramp in between.
    turns = freqs * scaling["original_max_position_embeddings"] / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return freqs * (keep + (1 - keep) / scaling["factor"])


def plain_positions(mask):
    """mask (B, L) -> positions (B, L) that count the real tokens of each row, whatever the side of the padding."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def mrope_positions(ids, mask, grid_thw, config):
    """Qwen2.5-VL's positions (t, row, column) of every token, (3, B, L), and each row's delta, (B,).

    ids and mask (B, L), grid_thw (n_images, 3) in the order in which the images appear in the batch, config a
    BLIP3oConfig with a vision tower. Text advances all three axes by 1; an image keeps t and spreads its cells over
    rows and columns; the text after it goes on past the longer side. A new token at index i of the real tokens of its
    row has position i + delta. Raises ValueError where placeholders and images don't match; still images only.
    """
    spots = (ids == config.image_token_id) & mask  # (B, L)
    m = config.vision.spatial_merge_size
    h, w = (grid_thw[:, 1:].to(ids.device) // m).unbind(1)
    if int(spots.sum()) != int((h * w).sum()):
        raise ValueError(f"the prompts hold {int(spots.sum())} image placeholders, the images {int((h * w).sum())}")
    image = torch.repeat_interleave(torch.arange(len(h), device=ids.device), h * w)  # image of every placeholder
    index = torch.arange(len(image), device=ids.device) - ((h * w).cumsum(0) - h * w)[image]
    step = mask.long()  # how far each token moves the next one on: of an image, the last cell alone does
    step[spots] = torch.where(index == (h * w)[image] - 1, torch.maximum(h, w)[image], 0)
    positions = (step.cumsum(1) - step).repeat(3, 1, 1)
    positions[1, spots] += index // w[image]
    positions[2, spots] += index % w[image]
    return positions, step.sum(1) - mask.sum(1)


class KVCache:
    """Keys and values of the tokens that a Transformer has read, for the tokens that come after them.

    capacity None: the past is concatenated with what is new, and gradients may flow through it. A number of tokens:
    memory is laid out once and written in place, for text that grows token by token without gradient.
    """

    def __init__(self, capacity=None):
        self.capacity, self.layers, self.length = capacity, {}, 0

    def extend(self, layer, length, k, v):
        """Add k and v (B, heads, L, hd) of the tokens after the first `length` = P; returns keys and values of all P + L,
        (B, heads, P + L, hd). Doing it again changes nothing, as activation checkpointing needs."""
        end = length + k.shape[2]
        if self.capacity is None:
            if length:
                k, v = (torch.cat([past[:, :, :length], new], dim=2) for past, new in zip(self.layers[layer], (k, v)))
            self.layers[layer] = k, v
            return k, v
        if layer not in self.layers:
            self.layers[layer] = [torch.empty(*y.shape[:2], self.capacity, y.shape[3], dtype=y.dtype, device=y.device)
                                  for y in (k, v)]
        for past, new in zip(self.layers[layer], (k, v)):
            past[:, :, length:end] = new
        return [past[:, :, :end] for past in self.layers[layer]]


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
        """x (B, L, D), cos and sin (B, 1, L, hd), visible (.., 1, L, P + L) bool or None for plain causal attention,
        extend(k, v): adds those of P earlier tokens in front -> (B, L, D)."""
        L = x.shape[1]
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, L, hd)
                   for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        k, v = extend(rotate(k, cos, sin), v)  # (B, kv heads, P + L, hd)
        q = rotate(q, cos, sin)
        if L == 1:  # the query heads that share a kv head become its queries: nothing needs repeating
            q = q.reshape(len(x), k.shape[1], self.repeats, self.head_dim)
        else:  # Repeated by hand: of CUDA's fused kernels, those that take a mask don't all take fewer kv heads.
            k, v = (y.repeat_interleave(self.repeats, dim=1) for y in (k, v))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None and L > 1)
        return self.o_proj(o.reshape(len(x), -1, L, self.head_dim).transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, bias=False)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, visible, extend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, visible, extend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """A causal language model: Qwen2.5 (biases on q, k, v; M-RoPE) or Llama-3.2 (neither)."""

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing = config, False             # checkpointing: see dit.recomputed
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def head(self, hidden):
        """Hidden states (..., D) -> logits (..., V)."""
        tied = self.config.tie_word_embeddings
        return F.linear(hidden, self.embed_tokens.weight if tied else self.lm_head.weight)

    def rope(self, positions, dtype):
        """positions (B, L), or (3, B, L) for M-RoPE -> cos and sin (B, 1, L, hd)."""
        angles = positions[..., None].float() * text_frequencies(self.config, positions.device)
        if positions.ndim == 3:  # (3, B, L, hd/2): a section of the frequencies turns by t, the next by row, by column
            sections = angles.split(self.config.mrope_section, dim=-1)
            angles = torch.cat([section[axis] for axis, section in enumerate(sections)], dim=-1)
        return [y[:, None].to(dtype) for y in cos_sin(angles)]

    def forward(self, embeds, positions, mask=None, cache=None):
        """embeds (B, L, D), positions (B, L) or (3, B, L) -> hidden states after the final norm, (B, L, D).

        mask (B, P + L) bool marks real tokens, None means all; padding may lie anywhere. `cache`, a KVCache, holds
        the P past tokens and takes up these. Past that was computed without gradient serves queries that need one.
        """
        L, past = embeds.shape[1], 0 if cache is None else cache.length
        # Causal attention can't see padding after the last real token anyway, and without a mask it is fastest.
        plain = past == 0 and (mask is None or bool((mask[:, 1:] <= mask[:, :-1]).all()))
        visible = None
        if not plain and not (mask is None and L == 1):
            i = torch.arange(past, past + L, device=embeds.device)[:, None]
            j = torch.arange(past + L, device=embeds.device)
            visible = (j <= i)[None, None]  # (1, 1, L, P + L)
            if mask is not None:  # padding sees itself: a softmax over nothing is NaN in some kernels
                visible = visible & mask[:, None, None] | (i == j)
        cos, sin = self.rope(positions, embeds.dtype)
        x = embeds
        for i, layer in enumerate(self.layers):
            extend = (lambda k, v: (k, v)) if cache is None else partial(cache.extend, i, past)
            x = recomputed(layer, self.checkpointing, x, cos, sin, visible, extend)
        if cache is not None:
            cache.length += L
        return self.norm(x)


# ---- the unified model ---------------------------------------------------------------------------------------------

def last_real(mask):
    """mask (B, L) -> index of the last real token of each row, (B,)."""
    return (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)


def penalise(scores, seen, penalty):
    """Make tokens in seen (B, V) bool less likely by penalty > 1, whatever their score's sign (arXiv 1909.05858)."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def pick_token(scores, temperature, top_p, generator):
    """scores (B, V) -> the next token of each row, (B,): the best at temperature 0, else a draw from the nucleus.

    generator: one for all rows, or a list of one for each, so that a row's draws don't depend on its batch.
    """
    if temperature == 0:
        return scores.argmax(-1)
    probs, order = (scores / temperature).softmax(-1).sort(dim=-1, descending=True)
    probs[probs.cumsum(-1) - probs > top_p] = 0  # all that lies behind the first top_p of the mass
    each = zip(probs.split(1), generator) if isinstance(generator, list) else [(probs, generator)]
    choice = torch.cat([torch.multinomial(p.to(g.device if g else p.device), 1, generator=g) for p, g in each])  # (B, 1)
    return order.gather(1, choice.to(scores.device))[:, 0]


class BLIP3o(nn.Module):
    """Understands images and text (`logits`, `generate_text`) and draws (`condition`, `generate_features`).

    Any component that a task doesn't need may be None: visual, llm, latent_queries, dit, regressor (the linear map of the
    CLIP + MSE design, in place of a dit).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        text = config.text
        self.visual = None if config.vision is None else VisionTower(config.vision)
        self.llm = Transformer(text)
        self.apply(self._init)
        self.latent_queries, self.dit, self.regressor = None, None, None
        if config.n_query:
            self.add_generator(config)

    @staticmethod
    def _init(module):
        """Normal(0, 0.02) for matrices and embeddings, zero biases, norms at 1: as the language models we build on."""
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv3d)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def add_generator(self, config):
        """Make this the model of `config`, a BLIP3oConfig with the same language model: a fresh DiT or regressor, and
        fresh queries where there are none or another number.

        Where config.text.vocab_size is larger than the present vocabulary, the new rows ([IMG], [/IMG] and <image> come
        last) start as the mean of all rows before them, and the official training never changes them.
        """
        weight, rows, text = self.llm.embed_tokens.weight, config.text.vocab_size, config.text

        def resize(weight):
            kept = weight.detach()[:rows - 3]
            mean = kept.float().mean(0, keepdim=True).to(kept.dtype)
            return nn.Parameter(torch.cat([kept, mean.expand(rows - len(kept), -1)]), weight.requires_grad)
        if len(weight) != rows:
            self.llm.embed_tokens.num_embeddings, self.llm.embed_tokens.weight = rows, resize(weight)
            if not text.tie_word_embeddings:
                self.llm.lm_head.out_features, self.llm.lm_head.weight = rows, resize(self.llm.lm_head.weight)
        self.config, self.llm.config = config, text
        if self.latent_queries is None or self.latent_queries.shape[1] != config.n_query:
            queries = torch.randn(1, config.n_query, text.hidden_size) * config.query_std
            self.latent_queries = nn.Parameter(queries.to(weight))
        # Not in `_init`: the DiT has its own initialisation, the regressor PyTorch's.
        self.dit = None if config.dit is None else NextDiT(config.dit).to(weight)
        channels = config.mse_channels
        self.regressor = None if channels is None else nn.Linear(text.hidden_size, channels).to(weight)

    # -- prompts in --

    def embed(self, ids, mask, pixels=None, grid_thw=None):
        """Embeddings (B, L, D) of ids (B, L), the image placeholders among the real tokens filled with image tokens.

        Without grid_thw, pixels (count, D) are such tokens already.
        """
        spots = (ids == self.config.image_token_id) & mask
        count = int(spots.sum())
        if pixels is None or not len(pixels):
            if count:
                raise ValueError(f"the prompts hold {count} image placeholders, but no pixels came with them")
            return self.llm.embed_tokens(ids)
        if self.visual is None and grid_thw is not None:
            raise ValueError("this model has no vision tower, so it can't take pixels")
        tokens = pixels if grid_thw is None else self.visual(pixels, grid_thw)  # (count, D)
        if count != len(tokens):
            raise ValueError(f"the prompts hold {count} image placeholders, the images {len(tokens)} tokens")
        embeds = self.llm.embed_tokens(ids)
        return embeds.masked_scatter(spots[..., None], tokens.to(embeds.dtype))

    def positions(self, ids, mask, grid_thw):
        """Positions for understanding, and the (B,) position of the token that comes next."""
        if grid_thw is None or self.config.text.mrope_section is None:
            return plain_positions(mask), mask.sum(1)
        positions, delta = mrope_positions(ids, mask, grid_thw, self.config)
        return positions, mask.sum(1) + delta

    # -- understanding --

    def hidden(self, ids, mask=None, pixels=None, grid_thw=None):
        """The language model's hidden states (B, L, D) of a prompt, its images at their true M-RoPE positions."""
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        return self.llm(self.embed(ids, mask, pixels, grid_thw), self.positions(ids, mask, grid_thw)[0], mask)

    def logits(self, ids, mask=None, pixels=None, grid_thw=None):
        """ids (B, L), mask (B, L) bool of real tokens, images as in VisionTower -> logits (B, L, V)."""
        return self.llm.head(self.hidden(ids, mask, pixels, grid_thw))

    @torch.no_grad()
    def generate_text(self, ids, mask=None, pixels=None, grid_thw=None, max_new_tokens=128, temperature=0.0, top_p=1.0,
                      repetition_penalty=1.0, stop_ids=None, on_token=None, generator=None):
        """Answer prompts (B, L): a list of B tensors with the new ids, without the stop token.

        Padding may lie on either side. Temperature 0 is greedy. stop_ids defaults to eos and pad. on_token, if given,
        is called at every step with a list of B ids, None for rows that have ended.
        """
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        if stop_ids is None:
            eos = self.config.eos_token_id
            stop_ids = [*(eos if isinstance(eos, (list, tuple)) else [eos]), self.config.pad_token_id]
        stop_ids = torch.tensor(list(stop_ids), dtype=torch.long, device=ids.device)
        cache, new = KVCache(ids.shape[1] + max_new_tokens), [[] for _ in ids]
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        positions, following = self.positions(ids, mask, grid_thw)
        hidden = self.llm(self.embed(ids, mask, pixels, grid_thw), positions, mask, cache)  # (B, L, D)
        hidden = hidden[torch.arange(len(ids), device=ids.device), last_real(mask)]  # (B, D)
        seen = torch.zeros(len(ids), self.config.text.vocab_size, device=ids.device)
        seen = seen.scatter_add_(1, ids, mask.to(seen.dtype)) > 0  # (B, V), tokens of the prompt
        padded = not bool(mask.all())
        for left in reversed(range(max_new_tokens)):
            scores = penalise(self.llm.head(hidden).float(), seen, repetition_penalty)  # (B, V)
            token = pick_token(scores, temperature, top_p, generator)  # (B,)
            done |= torch.isin(token, stop_ids)
            step = [None if end else int(t) for t, end in zip(token.tolist(), done.tolist())]
            for row, t in zip(new, step):
                row.extend([] if t is None else [t])
            if on_token is not None:
                on_token(step)
            if not left or all(t is None for t in step):
                break
            seen.scatter_(1, token[:, None], True)
            mask = F.pad(mask, (0, 1), value=True)
            hidden = self.llm(self.llm.embed_tokens(token)[:, None], following[:, None], mask if padded else None,
                              cache)[:, 0]
            following = following + 1
        return [torch.tensor(row, dtype=torch.long, device=ids.device) for row in new]

    # -- drawing --

    def condition(self, ids, mask=None, pixels=None, grid_thw=None):
        """What the queries heard of the prompts ids (B, L): hidden states after the final norm, (B, n_query, D).

        [IMG] and the queries follow the last real token of each row, whatever the padding. Positions count tokens
        alike on all three axes, images or not: matches official, which passes none. Queries see the prompt and the
        queries before them. Since the prompt can't see the queries, it needs no gradient while only they learn: it runs
        first, without one, and leaves its keys and values. The gradient of the queries is the same, the work far less.
        """
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        end, img = last_real(mask)[:, None] + 1, self.config.img_token_id
        ids = F.pad(ids, (0, 1), value=img).scatter(1, end, img)  # (B, L + 1)
        mask = F.pad(mask, (0, 1), value=False).scatter(1, end, True)
        learns = any(p.requires_grad for part in (self.llm, self.visual) if part is not None for p in part.parameters())
        cache = KVCache()
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            self.llm(self.embed(ids, mask, pixels, grid_thw), plain_positions(mask), mask, cache)
        n = self.latent_queries.shape[1]
        positions = mask.sum(1, keepdim=True) + torch.arange(n, device=ids.device)  # (B, n_query)
        queries = self.latent_queries.to(self.llm.embed_tokens.weight.dtype).expand(len(ids), -1, -1)
        return self.llm(queries, positions, F.pad(mask, (0, n), value=True), cache)

    @torch.no_grad()
    def generate_features(self, cond, steps=30, guidance=3.0, noise=None, generator=None):
        """Draw image features (B, grid^2, C) for the condition (B, n_query, D), from noise (B, C, grid, grid).

        Noise is drawn in the condition's dtype unless given. The null condition of guidance is zeros. A regressor needs
        neither noise nor steps.
        """
        if self.regressor is not None:
            return self.regressor(cond)
        if noise is None:
            shape = (len(cond), self.config.gen_hidden_size, self.config.grid, self.config.grid)
            source = cond.device if generator is None else generator.device
            noise = torch.randn(shape, generator=generator, device=source).to(cond)
        velocity = guide(lambda x, t, cache: self.dit(x, t, cache=cache), cond, scale=guidance,
                         prepare=lambda both: self.dit.cache_condition(both, n_uniform=len(both) - len(cond)))
        return euler_sample(velocity, noise, steps, self.config.shift).flatten(2).transpose(1, 2)  # row-major cells

    # -- training --

    def forward(self, ids, mask=None, features=None, labels=None, pixels=None, grid_thw=None, drop=0.1, x0=None, t=None,
                generator=None):
        """Losses of a batch: "flow" or "mse" (B,) if features (B, grid^2, C) are given, "text" (n,) if labels (B, L) are.

        "flow" (section 3.2): velocity error of the DiT given what the queries heard, the condition dropped with
        probability `drop` (or where `drop` (B,) is True), at noise x0 and times t as in flow_matching_loss; k of each for
        a sample, (B k, ...), give k losses for one reading of its prompt, (B k,). "mse"
        (section 3.3): error of the regressor. "text": cross-entropy of each of the n tokens whose label isn't -100, given
        those before it.
        """
        losses = {}
        if features is not None:
            cond = self.condition(ids, mask, pixels, grid_thw)
            if self.regressor is not None:
                losses["mse"] = (self.regressor(cond).float() - features.float()).square().flatten(1).mean(1)
            else:
                x1 = features.float().transpose(1, 2).unflatten(2, (self.config.grid,) * 2)  # (B, C, grid, grid)
                k = 1 if x0 is None else len(x0) // len(x1)
                x1, cond = x1.repeat_interleave(k, 0), cond.repeat_interleave(k, 0)
                losses["flow"] = flow_matching_loss(self.dit, x1, cond, self.config.shift, drop, x0, t, generator)
        if labels is not None:
            hidden, targets = self.hidden(ids, mask, pixels, grid_thw)[:, :-1], labels[:, 1:]
            labelled = targets != -100  # logits are V wide: only where they are needed
            losses["text"] = F.cross_entropy(self.llm.head(hidden[labelled]).float(), targets[labelled], reduction="none")
        return losses

    # -- files --

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32, parts=None):
        """Read a folder in the official layout: ours, BLIP3o-Model-4B/8B, a plain Qwen2.5-VL, Llama or SmolLM2.

        parts: a set out of {"visual", "llm", "queries", "dit", "regressor"}, None for all of the folder; the others become
        None and aren't read. On the device "meta" nothing is read but the files' headers: sizes without memory. Raises
        ValueError where files and config.json don't match exactly.
        """
        folder = Path(folder)
        stored = read_headers(folder)
        config = read_config(folder, stored)
        has = {"llm"} | ({"visual"} if config.vision else set()) | ({"queries"} if config.n_query else set())
        has |= ({"dit"} if config.dit else set()) | ({"regressor"} if config.mse_channels else set())
        parts = has if parts is None else set(parts)
        if not parts <= has:
            raise ValueError(f"{folder} has no {' and no '.join(sorted(parts - has))}; it has {', '.join(sorted(has))}")
        with torch.device("meta"):
            model = cls(config)
        for part in has - parts:
            setattr(model, {"queries": "latent_queries"}.get(part, part), None)
        wanted = check_keys(folder, model, stored, parts)
        if str(device) == "meta":
            return model.to(dtype)
        state = {name: read_tensor(file, key, device, dtype) for name, (file, key) in wanted.items()}
        model.load_state_dict(state, assign=True)
        return model

    def save_pretrained(self, folder, dtype=None):
        """Write model.safetensors and config.json in the official layout and with official names.

        Floats are stored as `dtype`, None keeps theirs. What else the folder holds stays: other files, unknown keys of
        config.json, tensors of components that this model doesn't have. Each file is replaced in one step. Raises
        ValueError where the folder holds shards, which one file would contradict.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / INDEX).exists():
            raise ValueError(f"{folder} holds a checkpoint in shards; save to another folder")
        tensors = {official_name(name): tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
                   for name, tensor in self.state_dict().items()}
        if (folder / WEIGHTS).exists():
            own = {component(key) for key in tensors}
            own |= {"dit", "regressor"} if own & {"dit", "regressor"} else set()  # one generator at a time
            with safe_open(folder / WEIGHTS, framework="pt") as f:
                tensors |= {key: f.get_tensor(key) for key in f.keys() if component(key) not in own}
        save_file(tensors, folder / (WEIGHTS + ".tmp"), metadata={"format": "pt"})
        os.replace(folder / (WEIGHTS + ".tmp"), folder / WEIGHTS)
        write_config(folder, self, str(next(iter(tensors.values())).dtype).removeprefix("torch."))


# ---- the official layout on disk -----------------------------------------------------------------------------------

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

# Beginning of an official key -> of our parameter's name, and its component. The first match counts. transformers 4
# wrote visual.* and model.*, 5 writes model.visual.* and model.language_model.*. None: extras of official files.
PREFIXES = (
    ("visual.", "visual.", "visual"),
    ("model.visual.", "visual.", "visual"),
    ("model.dit.model.", "dit.", "dit"),
    ("model.regressor.", "regressor.", "regressor"),
    ("model.latent_queries", "latent_queries", "queries"),
    ("model.gen_vision_tower.", None, "gen_vision_tower"),  # EVA-CLIP, which clip_decoder.py reads
    ("model.vae.", None, "vae"),                            # FLUX's VAE in early releases, never used
    ("lm_head.", "llm.lm_head.", "llm"),
    ("model.language_model.", "llm.", "llm"),
    ("model.", "llm.", "llm"),
)
WRITTEN = {"visual.": "visual.", "dit.": "model.dit.model.", "regressor.": "model.regressor.",
           "latent_queries": "model.latent_queries",
           "llm.lm_head.": "lm_head.", "llm.": "model."}  # and back, in the released files' form


def component(key):
    """The component that an official key belongs to, "other" if none."""
    return next((part for prefix, _, part in PREFIXES if key.startswith(prefix)), "other")


def our_name(key):
    """Official key -> our parameter's name; None for extras that are skipped; an unknown key stays as it is."""
    for prefix, ours, _ in PREFIXES:
        if key.startswith(prefix):
            return None if ours is None else ours + key[len(prefix):]
    return key


def official_name(name):
    """Our parameter's name -> official key."""
    ours = next(ours for ours in WRITTEN if name.startswith(ours))
    return WRITTEN[ours] + name[len(ours):]


def read_headers(folder):
    """Official key -> (file, shape) of every tensor in the folder; only the files' headers are read.

    Raises ValueError where the index isn't one, or where a file is missing, cut short or no safetensors file.
    """
    folder, files = Path(folder), [WEIGHTS]
    if (folder / INDEX).exists():
        try:
            files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{folder / INDEX} isn't an index of weights: download it again") from None
    stored = {}
    for file in (folder / name for name in files):
        if not file.exists():
            raise ValueError(f"{folder} has no {file.name}" + (f", which {INDEX} names" if file.name != WEIGHTS else ""))
        try:
            with safe_open(file, framework="pt") as f:
                stored |= {key: (file, tuple(f.get_slice(key).get_shape())) for key in f.keys()}
        except SafetensorError as error:
            raise ValueError(f"{file} is cut short or broken ({error}): download it again") from None
    return stored


def read_tensor(file, key, device, dtype):
    """One tensor of a safetensors file on a device, as dtype; mapped, so that it is copied at most once.

    The file is opened anew for each: what was mapped of the tensor before leaves memory with its mapping.
    """
    with safe_open(file, framework="pt", device=str(device)) as f:
        return f.get_tensor(key).to(dtype)


def check_keys(folder, model, stored, parts):
    """Our name -> (file, official key) of every tensor to read for `parts`; ValueError unless all fit exactly."""
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    wanted, problems = {}, {}
    for key, (file, shape) in stored.items():
        name, part = our_name(key), component(key)
        if name is None or part != "other" and part not in parts:
            continue
        if key == "lm_head.weight" and model.config.text.tie_word_embeddings:
            continue  # a copy of the embeddings, which some tied checkpoints store
        if name not in expected:
            problems.setdefault((part, "unexpected"), []).append(key)
            continue
        wanted[name] = file, key
        if shape != expected[name]:
            problems.setdefault((part, "mis-shaped"), []).append(f"{key} {shape}, not {expected[name]}")
    for name in expected.keys() - wanted.keys():
        key = official_name(name)
        problems.setdefault((component(key), "missing"), []).append(key)
    if problems:
        hint = ""
        if any("feed_forward" in key for keys in problems.values() for key in keys):
            hint = (". The DiT's feed-forward is another width than expected: Lumina's rule makes 4864 of 4 x 1792 (2/3 of it, "
                    "rounded up to 256s), newer versions of diffusers leave out the 2/3 and make 7168")
        lines = [f"{part}: {len(keys)} {what} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
                 for (part, what), keys in sorted(problems.items())]
        raise ValueError(f"the weights in {folder} don't fit its config.json. " + "; ".join(lines) + hint)
    return wanted


def pick_fields(cls, values):
    """The entries of a dict that are fields of a dataclass."""
    return {f.name: values[f.name] for f in fields(cls) if f.name in values}


def read_config(folder, stored):
    """config.json, and the tensors' shapes for what it doesn't say -> BLIP3oConfig."""
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} has no config.json")
    raw = json.loads((folder / "config.json").read_text())
    text = {**raw, **raw.get("text_config", {})}  # newer files nest the language model's fields
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}  # newer and older name
    text = {"rope_theta": rope.get("rope_theta"), **text}
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "rms_norm_eps", "rope_theta")
    absent = [name for name in required if text.get(name) is None]
    if absent:
        raise ValueError(f"{folder / 'config.json'} lacks {', '.join(absent)}")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "mrope", "llama3") or text.get("use_sliding_window"):
        raise ValueError(f"{folder / 'config.json'} asks for {kind} RoPE scaling or a sliding window: not supported")
    ours = raw.get("nano_blip3o", {})
    try:
        dit = (ours.get("dit") or dit_sizes(stored)) if any(component(key) == "dit" for key in stored) else None
    except KeyError as error:
        raise ValueError(f"the DiT in {folder} lacks {error}, from which its size is read") from None
    queries = stored.get("model.latent_queries", (None, (1, 0)))[1]
    tied = raw.get("tie_word_embeddings", text.get("tie_word_embeddings", "lm_head.weight" not in stored))
    qkv_bias = any(key.endswith("layers.0.self_attn.q_proj.bias") for key in stored)
    return BLIP3oConfig(
        text=TextConfig(**{**pick_fields(TextConfig, text), "tie_word_embeddings": tied, "qkv_bias": qkv_bias,
                           "mrope_section": rope.get("mrope_section"),
                           "rope_scaling": rope if kind == "llama3" else None}),
        vision=VisionConfig(**pick_fields(VisionConfig, raw["vision_config"])) if raw.get("vision_config") else None,
        dit=None if dit is None else DiTConfig(**dit),
        **{**{name: ours[name] for name in OURS if name in ours}, "n_query": queries[1],
           **{name: text[name] for name in TOKEN_IDS if text.get(name) is not None}})


OURS = ("n_query", "query_std", "grid", "shift", "expands", "latents", "mse_channels")
TOKEN_IDS = ("image_token_id", "vision_start_token_id", "eos_token_id", "pad_token_id")


def dit_sizes(stored):
    """DiTConfig's fields from the shapes in an official checkpoint, whose config.json has none; None without a DiT."""
    shape = {key.removeprefix("model.dit.model."): s for key, (_, s) in stored.items() if component(key) == "dit"}
    if not shape:
        return None
    (dim, in_channels), (heads,) = shape["patch_embedder.proj.weight"], shape["layers.0.gate"]
    return dict(in_channels=in_channels, dim=dim, n_layers=sum(key.endswith(".gate") for key in shape), n_heads=heads,
                n_kv_heads=shape["layers.0.attn1.to_k.weight"][0] // (dim // heads),
                ffn_dim=shape["layers.0.feed_forward.linear_1.weight"][0],
                cond_dim=shape["caption_projection.linear_1.weight"][1],
                modulation_dim=shape["time_caption_embed.timestep_embedder.linear_1.weight"][0], rope="2d")


def write_config(folder, model, dtype):
    """Update config.json in the folder, or make one: official fields, and what they can't say under "nano_blip3o"."""
    path, config = folder / "config.json", model.config
    raw = json.loads(path.read_text()) if path.exists() else {}
    raw.setdefault("model_type", "blip3o_qwen" if config.draws else "qwen2_5_vl")
    text = raw.get("text_config", raw)
    text.update(asdict(config.text))
    for name in ("qkv_bias", "mrope_section", "rope_parameters"):  # not official, or the newer form of rope_scaling
        text.pop(name, None)
    if config.text.mrope_section is not None:
        text["rope_scaling"] = {"type": "mrope", "mrope_section": config.text.mrope_section}
    raw |= {"tie_word_embeddings": config.text.tie_word_embeddings, "torch_dtype": dtype}
    raw |= {name: getattr(config, name) for name in TOKEN_IDS}
    if model.visual is not None:
        raw["vision_config"] = {**raw.get("vision_config", {}), **asdict(config.vision)}
    if model.latent_queries is not None:
        raw |= {"n_query": config.n_query} | ({"gen_hidden_size": config.gen_hidden_size} if config.draws else {})
        before = raw.get("nano_blip3o", {})
        raw["nano_blip3o"] = {**before, "format": 1, "dit": config.dit and asdict(config.dit),
                              **{name: getattr(config, name) for name in OURS}}
        if not config.draws:  # the folder's generator stays, and what describes it
            of_generator = ("dit", "grid", "shift", "latents", "mse_channels")
            raw["nano_blip3o"] |= {name: before[name] for name in of_generator if name in before}
    temporary = folder / "config.json.tmp"
    temporary.write_text(json.dumps(raw, indent=2) + "\n")
    os.replace(temporary, path)
