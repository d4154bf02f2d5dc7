"""Next-DiT: noisy CLIP features, the time and a condition go in, the velocity of rectified flow comes out.

The architecture is Lumina-Next's (arXiv 2406.18583) as BLIP3-o uses it: a transformer over an 8x8 grid of 1792-wide
features, which reads the 64 query states of the language model through cross-attention.

    x (B, C, H, W) -> patches -> tokens (B, N, dim) -> n_layers blocks -> velocity (B, C, H, W)
    cond (B, L, cond_dim) -> caption_projection (B, L, dim) -> keys and values of every block's cross-attention
                                                            -> mean over L, + time -> modulation of every block
Shapes: B batch, C channels, H and W the feature grid, p patch size, N = (H/p)(W/p) tokens, L condition tokens,
D = dim, hd = dim of one head, M = modulation_dim. Parameter names are those of released checkpoints (`model.dit.*`).
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass
class DiTConfig:
    """Sizes of a NextDiT. The defaults are the released 8B model's, but for `rope`; the 4B model has cond_dim 2048."""
    in_channels: int = 1792          # width of one CLIP feature
    patch_size: int = 1              # p x p neighbouring features make one token
    dim: int = 1792
    n_layers: int = 24
    n_heads: int = 28
    n_kv_heads: int = 28             # fewer than n_heads: grouped-query attention, named in the paper, not released
    ffn_dim: int = 4864              # Lumina's rule, 2/3 * 4 * dim rounded up to 256; diffusers >= 0.33 forgot the 2/3
    cond_dim: int = 3584             # width of the language model
    modulation_dim: int | None = None  # M; None means min(dim, 1024), the official rule
    norm_eps: float = 1e-5
    rope: str = "3d"                 # "3d" is the paper's, "2d" what released weights were trained with
    rope_theta: float = 10000.0

    def __post_init__(self):
        if self.modulation_dim is None:
            self.modulation_dim = min(self.dim, 1024)
        if self.dim % self.n_heads or self.n_heads % self.n_kv_heads:
            raise ValueError(f"dim {self.dim} must be a multiple of n_heads {self.n_heads}, and that a multiple of "
                             f"n_kv_heads {self.n_kv_heads}")
        if self.rope not in ("2d", "3d"):
            raise ValueError(f'rope must be "2d" or "3d", not {self.rope!r}')
        if self.rope == "2d" and self.head_dim % 4 or self.rope == "3d" and (self.head_dim % 2 or self.head_dim < 6):
            raise ValueError(f"a head of {self.head_dim} dims can't be split over the axes of {self.rope} RoPE")

    @property
    def head_dim(self):
        return self.dim // self.n_heads


# ---- rotary positions ----------------------------------------------------------------------------------------------

def axis_angles(positions, dim, theta):
    """1-D RoPE: position (N,) turns pair k of `dim` numbers by position * theta^(-2k/dim) radians -> (N, dim/2)."""
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim)
    return positions.float()[:, None] * frequencies


def rope_2d(height, width, head_dim, theta=10000.0, device=None):
    """The rotation of every cell of the grid as unit complex numbers (N, head_dim/2): the RoPE of released weights.

    Rows and columns take turns: even pairs turn by the row, odd pairs by the column (diffusers
    get_2d_rotary_pos_embed_lumina).
    """
    row, col = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    angles = [axis_angles(axis.flatten(), head_dim // 2, theta) for axis in (row, col)]  # 2 x (N, hd/4)
    angles = torch.stack(angles, dim=-1).flatten(1)  # (N, hd/2): row, col, row, col, ...
    return torch.polar(torch.ones_like(angles), angles)


def rope_3d(height, width, head_dim, theta=10000.0, device=None):
    """3-D RoPE of Lumina-Next, named in BLIP3-o's paper: one part of a head for each axis -> (N, head_dim/2) complex.

    The parts lie one after another: time, height, width; the latter two get a third of the head each (rounded down to
    an even size: 64 -> 24 + 20 + 20, 48 -> 16 + 16 + 16). A still picture is frame 0 of a film, so its time part isn't
    turned at all: a third of every head compares content regardless of place.
    """
    row, col = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    row, col = row.flatten(), col.flatten()  # (N,)
    side = head_dim // 6 * 2
    angles = torch.cat([axis_angles(torch.zeros_like(row), head_dim - 2 * side, theta),
                        axis_angles(row, side, theta), axis_angles(col, side, theta)], dim=1)  # (N, hd/2)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x, rope):
    """Turn the pairs (2j, 2j+1) of every head of x (B, N, heads, hd) by rope (N, hd/2), in fp32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, N, heads, hd/2)
    return torch.view_as_real(pairs * rope[:, None]).flatten(-2).to(x.dtype)


# ---- small parts ---------------------------------------------------------------------------------------------------

def sinusoid(times, dim=256):
    """[cos, sin] of times (B,) at dim/2 frequencies from 1 down to 1/10000 -> (B, dim) fp32."""
    frequencies = torch.exp(-math.log(10000) / (dim // 2) * torch.arange(dim // 2, device=times.device))
    angles = times.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; statistics in fp32, the result in the weight's dtype."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        # Half weights multiply after the cast, as in diffusers: the other order rounds differently.
        return F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(self.weight.dtype) * self.weight


class MLP(nn.Module):
    """linear_2(act(linear_1(x))), with biases: the timestep embedder and the caption projection."""

    def __init__(self, in_dim, dim, act):
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)
        self.act = act

    def forward(self, x):
        return self.linear_2(self.act(self.linear_1(x)))


class FeedForward(nn.Module):
    """SwiGLU without biases: linear_2(silu(linear_1 x) * linear_3 x); SiLU in fp32 (LuminaFeedForward)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.linear_1 = nn.Linear(dim, hidden, bias=False)
        self.linear_2 = nn.Linear(hidden, dim, bias=False)
        self.linear_3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x):
        gate = self.linear_1(x)
        return self.linear_2(F.silu(gate.float()).to(gate.dtype) * self.linear_3(x))


class PatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, N, D): p x p cells become one token, tokens in row-major order."""

    def __init__(self, config):
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = nn.Linear(config.patch_size ** 2 * config.in_channels, config.dim)

    def forward(self, x):
        p = self.patch_size
        x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, H/p, p, W/p, p)
        return self.proj(x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))  # one token's numbers: (C, p, p)


class AdaptiveNorm(nn.Module):
    """The modulation of one block: `linear` makes a scale and a gate for each half, `norm` is the first norm."""

    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.modulation_dim, 4 * config.dim)
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, h, mod):
        """h (B, N, D), mod (B, M) -> the normed and scaled h, and gate_msa, scale_mlp, gate_mlp (B, 1, D)."""
        scale_msa, gate_msa, scale_mlp, gate_mlp = self.linear(mod).unsqueeze(1).chunk(4, dim=-1)
        return self.norm(h) * (1 + scale_msa), gate_msa.tanh(), 1 + scale_mlp, gate_mlp.tanh()


class FinalLayer(nn.Module):
    """LayerNorm without weights, a scale from the modulation (no shift), and the projection to one patch per token."""

    def __init__(self, config):
        super().__init__()
        self.linear_1 = nn.Linear(config.modulation_dim, config.dim)
        self.linear_2 = nn.Linear(config.dim, config.patch_size ** 2 * config.in_channels)

    def forward(self, h, mod):
        return self.linear_2(F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + self.linear_1(mod).unsqueeze(1)))


# ---- the block -----------------------------------------------------------------------------------------------------

class Attention(nn.Module):
    """Projections of one attention. Queries and keys are LayerNormed over all heads at once, before they are split."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        kv_dim = config.n_kv_heads * config.head_dim
        self.to_q = nn.Linear(config.dim, config.dim, bias=False)
        self.to_k = nn.Linear(config.dim, kv_dim, bias=False)
        self.to_v = nn.Linear(config.dim, kv_dim, bias=False)
        self.norm_q = nn.LayerNorm(config.dim, eps=1e-5)
        self.norm_k = nn.LayerNorm(kv_dim, eps=1e-5)

    def query(self, x, rope):
        """x (B, N, D) -> (B, heads, N, hd), rotated."""
        q = self.norm_q(self.to_q(x)).unflatten(-1, (-1, self.head_dim))
        return rotate(q, rope).transpose(1, 2)

    def key_value(self, x, rope=None):
        """x (B, L, D) -> keys and values (B, kv heads, L, hd), the keys rotated where rope is given."""
        k = self.norm_k(self.to_k(x)).unflatten(-1, (-1, self.head_dim))
        v = self.to_v(x).unflatten(-1, (-1, self.head_dim))
        return (k if rope is None else rotate(k, rope)).transpose(1, 2), v.transpose(1, 2)


def attend(q, k, v):
    """softmax(q k^T / sqrt(hd)) v without a mask; with fewer kv heads, query head j reads kv head j // (heads / kv)."""
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):  # in fp32: torch's gradient of bf16 attention is five times slower there
            return attend(q.float(), k.float(), v.float())
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])  # (B, heads, N, hd)


class Block(nn.Module):
    """One Next-DiT block (LuminaNextDiTBlock): self- and cross-attention side by side, then SwiGLU.

    Both halves are sandwiches: a norm before and a norm after, the result scaled by a tanh gate from the modulation.
    Cross-attention enters each head through one more tanh gate, `gate`, that starts at 0; both attentions share the
    one output projection, which for historical reasons is called attn2.to_out.0.
    """

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(config.n_heads))
        self.attn1 = Attention(config)  # picture to picture
        self.attn2 = Attention(config)  # picture to condition
        self.attn2.to_out = nn.ModuleList([nn.Linear(config.dim, config.dim, bias=False)])
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)
        self.norm1 = AdaptiveNorm(config)
        self.norm2 = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm1 = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm2 = RMSNorm(config.dim, config.norm_eps)
        self.norm1_context = RMSNorm(config.dim, config.norm_eps)

    def context(self, c, n_uniform=0):
        """The condition c (B, L, D) as cross-attention needs it. No RoPE: a query state has no place in the grid.

        Of the first n_uniform samples, whose L tokens are all alike, the value of one token (n_uniform, heads, 1, hd):
        whatever the weights of an attention, it is what they sum up to. Of the other samples keys and values.
        """
        k, v = self.attn2.key_value(self.norm1_context(c))
        uniform = v[:n_uniform, :, :1].repeat_interleave(len(self.gate) // v.shape[1], dim=1)
        return uniform, k[n_uniform:], v[n_uniform:]

    def cross_attend(self, n, rope, context):
        """n (B, N, D), normed -> what its tokens hear of the condition, (B, heads, N, hd)."""
        uniform, k, v = context
        # The queries are rotated, though the keys aren't: matches official.
        o = attend(self.attn2.query(n[len(uniform):], rope), k, v)
        return torch.cat([uniform.expand(-1, -1, n.shape[1], -1), o]) if len(uniform) else o

    def forward(self, h, mod, rope, context):
        """h (B, N, D), mod (B, M), rope (N, hd/2), context: what `context()` returned -> (B, N, D)."""
        n, gate_msa, scale_mlp, gate_mlp = self.norm1(h, mod)
        o = attend(self.attn1.query(n, rope), *self.attn1.key_value(n, rope))
        o = o + self.gate.tanh().view(-1, 1, 1) * self.cross_attend(n, rope, context)
        o = self.attn2.to_out[0](o.transpose(1, 2).flatten(2))
        h = h + gate_msa * self.norm2(o)
        return h + gate_mlp * self.ffn_norm2(self.feed_forward(self.ffn_norm1(h) * scale_mlp))


# ---- the model -----------------------------------------------------------------------------------------------------

def recomputed(layer, on, *inputs):
    """layer(*inputs); if `on`, its activations aren't kept for the backward pass but computed again in it.

    Activation checkpointing (Chen et al., arXiv 1604.06174): memory of one layer instead of all, for a third more work.
    """
    if on and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)


class ConditionCache(NamedTuple):
    """What depends on the condition alone, so that all sampling steps share it; see NextDiT.cache_condition."""
    pooled: torch.Tensor  # (B, M), the condition's part of the modulation
    contexts: list        # per layer: what Block.context made of it


class NextDiT(nn.Module):
    """Velocity x1 - x0 of CLIP features at time t (0 noise, 1 data), given the language model's query states."""

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing = config, False              # checkpointing: see `recomputed`
        self.patch_embedder = PatchEmbed(config)
        self.caption_projection = MLP(config.cond_dim, config.dim, nn.GELU(approximate="tanh"))
        self.time_caption_embed = nn.ModuleDict({
            "timestep_embedder": MLP(256, config.modulation_dim, nn.SiLU()),
            "caption_embedder": nn.Sequential(nn.LayerNorm(config.dim), nn.Linear(config.dim, config.modulation_dim)),
        })
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm_out = FinalLayer(config)
        self.init_weights()

    def init_weights(self):
        """The start of training from scratch; called once by __init__.

        norm1.linear, norm_out.linear_2     0: tanh gates at 0 make every block the identity, and the first velocity is
                                            0 (adaLN-Zero of DiT, as in Lumina-Next)
        layers.N.gate                       0: cross-attention enters head by head as it proves useful; until then the
                                            condition speaks through its mean alone
        norms                               weight 1, bias 0
        all other linears                   PyTorch's default, as in the official code, whose start it all is but for
                                            the first row
        The first row pays at nano size: after 100 steps of a dim 96, 4 layer model on made-up scenes the loss at
        t = 0.02 was 0.38 and 0.41 (two seeds) with it, 0.54 and 0.52 without; after 400 steps 0.27 either way.
        """
        for layer in [block.norm1.linear for block in self.layers] + [self.norm_out.linear_2]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def cache_condition(self, cond, n_uniform=0):
        """cond (B, L, cond_dim) -> ConditionCache. The condition speaks twice: token by token, and as its mean.

        n_uniform: so many samples at the front have L equal tokens each, as guidance's null condition of zeros does.
        They need no cross-attention; see Block.context.
        """
        if cond.ndim != 3 or cond.shape[-1] != self.config.cond_dim:
            raise ValueError(f"the condition must be (B, L, {self.config.cond_dim}), not {tuple(cond.shape)}")
        c = self.caption_projection(cond.to(self.patch_embedder.proj.weight.dtype))  # (B, L, D)
        pooled = self.time_caption_embed["caption_embedder"](c.mean(1))  # (B, M)
        return ConditionCache(pooled, [layer.context(c, n_uniform) for layer in self.layers])

    def forward(self, x, t, cond=None, cache=None):
        """The velocity at x (B, C, H, W) and t (B,) in [0, 1], given cond (B, L, cond_dim) or its cache.

        Returns (B, C, H, W) in x's dtype, whatever the weights' dtype. Any H and W that are multiples of patch_size.
        """
        p, C = self.config.patch_size, self.config.in_channels
        if x.ndim != 4 or x.shape[1] != C or x.shape[2] % p or x.shape[3] % p:
            raise ValueError(f"x must be (B, {C}, H, W) with H and W multiples of {p}, not {tuple(x.shape)}")
        height, width = x.shape[2] // p, x.shape[3] // p  # the grid of tokens, N = height * width
        if cache is None:
            if cond is None:
                raise ValueError("NextDiT needs a condition, or the cache that cache_condition made of one")
            cache = self.cache_condition(cond)
        if len(cache.pooled) != len(x) or t.shape != (len(x),):
            raise ValueError(f"x has batch size {len(x)}, the condition {len(cache.pooled)}, and t the shape "
                             f"{tuple(t.shape)}: all three need the same batch size")

        # Official weights know time as an integer, 1000 at the noise and 0 at the data. The small term keeps round-off
        # from turning 900 into 899.
        official_time = torch.floor(1000 * (1 - t.float()) + 1e-3)
        temb = self.time_caption_embed["timestep_embedder"](sinusoid(official_time).to(cache.pooled.dtype))
        mod = F.silu(temb + cache.pooled)  # (B, M), shared by all layers
        rope = rope_2d if self.config.rope == "2d" else rope_3d
        rope = rope(height, width, self.config.head_dim, self.config.rope_theta, x.device)  # (N, hd/2)

        h = self.patch_embedder(x.to(self.patch_embedder.proj.weight.dtype))  # (B, N, D)
        for layer, context in zip(self.layers, cache.contexts):
            h = recomputed(layer, self.checkpointing, h, mod, rope, context)
        out = self.norm_out(h, mod)  # (B, N, p p C)
        out = out.view(len(x), height, width, p, p, C)  # here one token's numbers are (p, p, C), unlike at the input
        out = out.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)  # (B, C, H/p, p, W/p, p) -> (B, C, H, W)
        return -out.to(x.dtype)  # the network speaks of noise - data
