"""Next-DiT: predicts the velocity of the flow from noisy CLIP features, the time and a condition.

The architecture is Lumina-Next's (arXiv 2406.18583) as BLIP3-o uses it: a transformer over an 8x8 grid of
1792-wide features with cross-attention to the language model's 64 query states.

    x (B, C, H, W) -> patches -> tokens (B, N, dim) -> n_layers blocks -> velocity (B, C, H, W)
    cond (B, L, cond_dim) -> caption_projection (B, L, dim)
        -> keys and values of every block's cross-attention
        -> mean over L, + time -> modulation of every block

Shapes: B batch, C channels, H and W the feature grid, p patch size, N = (H/p)(W/p) tokens, L condition
tokens, D = dim, hd = dim of one head, M = modulation_dim. Parameter names are those of released checkpoints.
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
    """Sizes of a NextDiT. The defaults are the released 8B model's, except `rope`; the 4B model has cond_dim
    2048."""
    in_channels: int = 1792          # width of one CLIP feature
    patch_size: int = 1              # p x p neighbouring features make one token
    dim: int = 1792
    n_layers: int = 24
    n_heads: int = 28
    n_kv_heads: int = 28             # fewer than n_heads: grouped-query attention, as the paper describes
    ffn_dim: int = 4864              # Lumina's rule: 2/3 * 4 * dim, rounded up to 256s
    cond_dim: int = 3584             # width of the language model
    modulation_dim: int | None = None  # M; None means min(dim, 1024), the official rule
    norm_eps: float = 1e-5
    rope: str = "3d"                 # "3d" is the paper's, "2d" what released weights were trained with
    rope_theta: float = 10000.0

    def __post_init__(self):
        if self.modulation_dim is None:
            self.modulation_dim = min(self.dim, 1024)
        if self.dim % self.n_heads or self.n_heads % self.n_kv_heads:
            raise ValueError(f"dim {self.dim} must be a multiple of n_heads {self.n_heads}, and that a "
                             f"multiple of n_kv_heads {self.n_kv_heads}")
        if self.rope not in ("2d", "3d"):
            raise ValueError(f'rope must be "2d" or "3d", not {self.rope!r}')
        hd = self.head_dim
        if (self.rope == "2d" and hd % 4) or (self.rope == "3d" and (hd % 2 or hd < 6)):
            raise ValueError(f"a head of {hd} dims can't be split over the axes of {self.rope} RoPE")

    @property
    def head_dim(self):
        """hd, the width of one head."""
        return self.dim // self.n_heads


# ---- rotary positions -------------------------------------------------------------------------------------

def frequencies(dim, theta, device):
    """The RoPE frequencies theta^(-2k/dim) of `dim` channels, (dim/2,) fp32."""
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def axis_angles(positions, dim, theta):
    """The angles of 1-D RoPE at positions (N,): (N, dim/2)."""
    return positions.float()[:, None] * frequencies(dim, theta, positions.device)


def rope_2d(height, width, head_dim, theta=10000.0, device=None):
    """The RoPE of released weights: cos and sin, each (N, head_dim/2) fp32. Even pairs rotate by the row,
    odd pairs by the column (diffusers' get_2d_rotary_pos_embed_lumina)."""
    row, col = cell_positions(height, width, device)
    angles = [axis_angles(axis, head_dim // 2, theta) for axis in (row, col)]  # 2 x (N, hd/4)
    angles = torch.stack(angles, dim=-1).flatten(1)  # (N, hd/2): row, col, row, col, ...
    return angles.cos(), angles.sin()


def rope_3d(height, width, head_dim, theta=10000.0, device=None):
    """Lumina-Next's 3-D RoPE, named in BLIP3-o's paper: cos and sin, each (N, head_dim/2) fp32.

    Each head is split into time, height and width; the latter two get a third each, rounded down to an even
    size (64 -> 24 + 20 + 20). A still image is frame 0 of a video, so the time part isn't rotated.
    """
    row, col = cell_positions(height, width, device)
    side = head_dim // 6 * 2
    angles = torch.cat([axis_angles(torch.zeros_like(row), head_dim - 2 * side, theta),
                        axis_angles(row, side, theta), axis_angles(col, side, theta)], dim=1)  # (N, hd/2)
    return angles.cos(), angles.sin()


def cell_positions(height, width, device):
    """Row and column of every cell of a grid in row-major order, each (N,)."""
    cells = torch.arange(height * width, device=device)
    return cells // width, cells % width


def rotate_interleaved(x, cos, sin):
    """Rotate the pairs (2j, 2j + 1) of every head of x (B, N, heads, hd) by cos and sin (N, hd/2), in fp32.

    Real arithmetic, because torch.compile and MPS support complex tensors badly.
    """
    cos, sin = cos[:, None], sin[:, None]  # (N, 1, hd/2)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # each (B, N, heads, hd/2)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


# ---- small parts ------------------------------------------------------------------------------------------

def sinusoid(times, dim=256):
    """[cos, sin] of times (B,) at dim/2 frequencies from 1 down to 1/10000 -> (B, dim) fp32."""
    freqs = torch.exp(-math.log(10000) / (dim // 2) * torch.arange(dim // 2, device=times.device))
    angles = times.float()[:, None] * freqs  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; statistics in fp32, the result in the weight's dtype."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        # Cast before multiplying, as diffusers does: otherwise half-precision weights round differently.
        return F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(self.weight.dtype) * self.weight


class MLP(nn.Module):
    """(..., in_dim) -> (..., dim): linear_2(act(linear_1 x)), with biases."""

    def __init__(self, in_dim, dim, act):
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)
        self.act = act

    def forward(self, x):
        return self.linear_2(self.act(self.linear_1(x)))


class FeedForward(nn.Module):
    """SwiGLU, (..., dim) -> (..., dim): linear_2(silu(linear_1 x) * linear_3 x), no biases, SiLU in fp32."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.linear_1 = nn.Linear(dim, hidden, bias=False)
        self.linear_2 = nn.Linear(hidden, dim, bias=False)
        self.linear_3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x):
        gate = self.linear_1(x)
        return self.linear_2(F.silu(gate.float()).to(gate.dtype) * self.linear_3(x))


class PatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, N, D): each p x p patch becomes one token, in row-major order."""

    def __init__(self, config):
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = nn.Linear(config.patch_size ** 2 * config.in_channels, config.dim)

    def forward(self, x):
        p = self.patch_size
        x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, H/p, p, W/p, p)
        return self.proj(x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))  # in a token: (C, p, p)


class AdaptiveNorm(nn.Module):
    """A block's modulation (AdaLN): scale and gate for its attention and for its MLP, and the first norm."""

    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.modulation_dim, 4 * config.dim)
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, h, mod):
        """h (B, N, D), mod (B, M) -> norm(h) * (1 + scale_msa), and three factors (B, 1, D) for later in the
        block: tanh(gate_msa), 1 + scale_mlp, tanh(gate_mlp)."""
        scale_msa, gate_msa, scale_mlp, gate_mlp = self.linear(mod).unsqueeze(1).chunk(4, dim=-1)
        return self.norm(h) * (1 + scale_msa), gate_msa.tanh(), 1 + scale_mlp, gate_mlp.tanh()


class FinalLayer(nn.Module):
    """LayerNorm without weights, AdaLN scale (no shift), projection of each token to one patch."""

    def __init__(self, config):
        super().__init__()
        self.linear_1 = nn.Linear(config.modulation_dim, config.dim)
        self.linear_2 = nn.Linear(config.dim, config.patch_size ** 2 * config.in_channels)

    def forward(self, h, mod):
        """h (B, N, D), mod (B, M) -> (B, N, p p C)."""
        return self.linear_2(F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + self.linear_1(mod).unsqueeze(1)))


# ---- the block --------------------------------------------------------------------------------------------

class Attention(nn.Module):
    """Q, K and V projections with QK norm: a LayerNorm over the full width, before the split into heads."""

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
        """x (B, N, D) -> queries (B, heads, N, hd), rotated by rope = (cos, sin)."""
        q = self.norm_q(self.to_q(x)).unflatten(-1, (-1, self.head_dim))
        return rotate_interleaved(q, *rope).transpose(1, 2)

    def key_value(self, x, rope=None):
        """x (B, L, D) -> keys and values (B, kv heads, L, hd); keys are rotated if rope is given."""
        k = self.norm_k(self.to_k(x)).unflatten(-1, (-1, self.head_dim))
        v = self.to_v(x).unflatten(-1, (-1, self.head_dim))
        k = k if rope is None else rotate_interleaved(k, *rope)
        return k.transpose(1, 2), v.transpose(1, 2)


def attend(q, k, v, **mask):
    """softmax(q k^T / sqrt(hd)) v, (B, heads, N, hd), without mask unless attn_mask or is_causal is given;
    GQA if k and v have fewer heads."""
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):  # on CPUs the backward of bf16 attention is slower
            return attend(q.float(), k.float(), v.float(), **mask)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **mask)


class Block(nn.Module):
    """One Next-DiT block (LuminaNextDiTBlock): self- and cross-attention in parallel, then SwiGLU.

    Both branches are sandwiches: a norm before, a norm after, then a tanh gate from the modulation.
    Cross-attention is scaled per head by another tanh gate, `gate`, that starts at 0. Both attentions share
    one output projection, which released checkpoints call attn2.to_out.0.
    """

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(config.n_heads))
        self.attn1 = Attention(config)  # image to image
        self.attn2 = Attention(config)  # image to condition
        self.attn2.to_out = nn.ModuleList([nn.Linear(config.dim, config.dim, bias=False)])
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)
        self.norm1 = AdaptiveNorm(config)
        self.norm2 = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm1 = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm2 = RMSNorm(config.dim, config.norm_eps)
        self.norm1_context = RMSNorm(config.dim, config.norm_eps)

    def context(self, c, n_uniform=0):
        """The condition c (B, L, D) -> its keys and values for cross-attention, (B, kv heads, L, hd) each.

        Condition tokens have no place on the grid, so keys get no RoPE. A shortcut for guidance: all L
        tokens of the null condition are equal, so attention, a weighted mean of L equal values, is that
        value for any weights. The first n_uniform samples must be null conditions: of each, only the value
        of one token is kept. Returns these, (n_uniform, heads, 1, hd), then k and v of the other samples.
        """
        k, v = self.attn2.key_value(self.norm1_context(c))
        uniform = v[:n_uniform, :, :1].repeat_interleave(len(self.gate) // v.shape[1], dim=1)
        return uniform, k[n_uniform:], v[n_uniform:]

    def cross_attend(self, x, rope, context):
        """Cross-attention of normed tokens x (B, N, D) to what `context()` returned: (B, heads, N, hd)."""
        uniform, k, v = context
        # The official code rotates these queries, although the keys aren't rotated.
        o = attend(self.attn2.query(x[len(uniform):], rope), k, v)
        return torch.cat([uniform.expand(-1, -1, x.shape[1], -1), o]) if len(uniform) else o

    def forward(self, h, mod, rope, context):
        """h (B, N, D), mod (B, M), rope (cos, sin), context: what `context()` returned -> (B, N, D)."""
        x, gate_msa, scale_mlp, gate_mlp = self.norm1(h, mod)
        o = attend(self.attn1.query(x, rope), *self.attn1.key_value(x, rope))  # (B, heads, N, hd)
        o = o + self.gate.tanh().view(-1, 1, 1) * self.cross_attend(x, rope, context)
        o = self.attn2.to_out[0](o.transpose(1, 2).flatten(2))  # (B, N, D)
        h = h + gate_msa * self.norm2(o)
        return h + gate_mlp * self.ffn_norm2(self.feed_forward(self.ffn_norm1(h) * scale_mlp))


# ---- the model --------------------------------------------------------------------------------------------

def maybe_checkpoint(layer, on, *inputs):
    """layer(*inputs); if `on`, the backward pass recomputes its activations instead of keeping them
    (arXiv 1604.06174), which saves memory for about a third more compute."""
    if on and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)


class ConditionCache(NamedTuple):
    """All that depends on the condition alone, for all sampling steps; see NextDiT.cache_condition."""
    pooled: torch.Tensor  # (B, M), the condition's part of the modulation
    contexts: list        # what Block.context returned, per layer


class NextDiT(nn.Module):
    """Velocity x1 - x0 of CLIP features at time t (0 noise, 1 data), given the query states."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # see `maybe_checkpoint`
        self.patch_embedder = PatchEmbed(config)
        self.caption_projection = MLP(config.cond_dim, config.dim, nn.GELU(approximate="tanh"))
        self.time_caption_embed = nn.ModuleDict({
            "timestep_embedder": MLP(256, config.modulation_dim, nn.SiLU()),
            "caption_embedder": nn.Sequential(nn.LayerNorm(config.dim),
                                              nn.Linear(config.dim, config.modulation_dim)),
        })
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm_out = FinalLayer(config)
        self.init_weights()

    def init_weights(self):
        """Initialisation for training from scratch; called once by __init__.

        norm1.linear, norm_out.linear_2   0: tanh gates at 0 make every block the identity, and the first
                                          velocity is 0 (adaLN-Zero of DiT, as in Lumina-Next)
        layers.N.gate                     0: at first the condition acts through the modulation alone
        norms                             weight 1, bias 0
        all other linears                 PyTorch's default (official code: the first row's, too)
        """
        for layer in [block.norm1.linear for block in self.layers] + [self.norm_out.linear_2]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def cache_condition(self, cond, n_uniform=0):
        """cond (B, L, cond_dim) -> ConditionCache: contexts for cross-attention, the mean for modulation.

        n_uniform: the number of samples at the front that are null conditions (L equal tokens each). They
        need no attention scores, see Block.context. An optimisation: 0 gives the same result.
        """
        if cond.ndim != 3 or cond.shape[-1] != self.config.cond_dim:
            raise ValueError(f"cond must be (B, L, {self.config.cond_dim}), not {tuple(cond.shape)}")
        c = self.caption_projection(cond.to(self.patch_embedder.proj.bias.dtype))  # (B, L, D)
        pooled = self.time_caption_embed["caption_embedder"](c.mean(1))  # (B, M)
        return ConditionCache(pooled, [layer.context(c, n_uniform) for layer in self.layers])

    def forward(self, x, t, cond=None, cache=None):
        """The velocity at x (B, C, H, W) and t (B,) in [0, 1], given cond (B, L, cond_dim) or its cache:
        (B, C, H, W) in x's dtype. H and W may be any multiples of patch_size."""
        p, C = self.config.patch_size, self.config.in_channels
        if x.ndim != 4 or x.shape[1] != C or x.shape[2] % p or x.shape[3] % p:
            raise ValueError(f"x must be (B, {C}, H, W) with H and W multiples of {p}, not {tuple(x.shape)}")
        height, width = x.shape[2] // p, x.shape[3] // p  # the grid of tokens, N = height * width
        if cache is None:
            if cond is None:
                raise ValueError("NextDiT needs a condition, or the cache that cache_condition made of one")
            cache = self.cache_condition(cond)
        if len(cache.pooled) != len(x) or t.shape != (len(x),):
            raise ValueError(f"x has batch size {len(x)}, the condition {len(cache.pooled)}, t the shape "
                             f"{tuple(t.shape)}: all three need the same batch size")

        # Official weights expect integer times, 1000 at the noise and 0 at the data; training rounds alike.
        # The small term keeps round-off from turning 900 into 899.
        official_time = torch.floor(1000 * (1 - t.float()) + 1e-3)  # (B,)
        temb = self.time_caption_embed["timestep_embedder"](sinusoid(official_time).to(cache.pooled.dtype))
        mod = F.silu(temb + cache.pooled)  # (B, M), shared by all layers
        rope = rope_2d if self.config.rope == "2d" else rope_3d
        rope = rope(height, width, self.config.head_dim, self.config.rope_theta, x.device)  # cos, sin

        h = self.patch_embedder(x.to(self.patch_embedder.proj.bias.dtype))  # (B, N, D)
        for layer, context in zip(self.layers, cache.contexts):
            h = maybe_checkpoint(layer, self.checkpointing, h, mod, rope, context)
        out = self.norm_out(h, mod)  # (B, N, p p C)
        out = out.view(len(x), height, width, p, p, C)  # channels last in a patch; PatchEmbed has them first
        out = out.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)  # (B, C, H/p, p, W/p, p) -> (B, C, H, W)
        return -out.to(x.dtype)  # the network predicts noise - data
