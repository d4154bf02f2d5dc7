"""EVA-CLIP encodes images into the features that the DiT generates; an SDXL UNet + VAE decodes them.

The paper uses pretrained models for both and freezes them: EVA-CLIP-E/14-plus at 448 px, and Emu2's visual
decoder, which is SDXL with its text condition replaced by the 64 features. Features are not normalised.

    pixels (B,3,448,448) -> EvaClip -> (B,1024,1792) -> pool -> (B,64,1792)
    (B,64,1792) -> PixelDecoder -> pixels (B,3,1024,1024)

In reading order: EVA-CLIP; parts that VAE and UNet share; VAE; UNet; schedule; PixelDecoder; PRESETS.
Parameter names are those of released checkpoints (BLIP3-o's EVA-CLIP; diffusers' UNet2DConditionModel and
AutoencoderKL). Shapes: B images, N tokens or positions, C channels, S image side, p patch size, h heads,
hd dim of one head, f pixels per latent along a side.
"""
import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import (
    FLOATS,
    Interval,
    from_json,
    load_strict,
    no_weights,
    read_headers,
    read_json,
    read_tensor,
    require_settings,
    save_weights,
    section,
    sizes,
    stored_layers,
    write_json,
)
from dit import MLP, attend, sinusoid

# ---- EVA-CLIP: pixels -> features -------------------------------------------------------------------------

@dataclass(frozen=True)
class EvaConfig:
    """Sizes of the image encoder; the defaults are EVA-CLIP-E/14-plus at 448 px (4.35 B parameters)."""
    image_size: int = 448
    patch_size: int = 14
    width: int = 1792
    layers: int = 64
    heads: int = 16
    mlp_hidden: int = 15360
    n_query: int = 64  # features per image after pooling


def pool(tokens, n=64):
    """Average-pool a square grid, row-major: (B, N, C) -> (B, n, C); 32x32 -> 8x8 is `early_pool2d_4`."""
    B, N, C = tokens.shape
    side, out = math.isqrt(N), math.isqrt(n)
    if side * side != N or out * out != n or n < 1 or side % out:
        raise ValueError(f"cannot pool {N} tokens to {n}: both must be square grids, one a multiple of the "
                         "other")
    k = side // out
    return tokens.view(B, out, k, out, k, C).mean(dim=(2, 4)).reshape(B, n, C)


class EvaBlock(nn.Module):
    """Transformer block with a LayerNorm at the end of each branch: x + LN(attn(x)), then x + LN(mlp(x)).

    Neither the usual pre-norm (x + attn(LN(x))) nor the original post-norm (LN(x + attn(x))), although
    EVA-CLIP calls it `postnorm`. Nothing rescales the residual stream, so the output of the last block still
    carries the position embedding.
    """

    def __init__(self, config):
        super().__init__()
        C, hidden = config.width, config.mlp_hidden
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(C, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(C, 3 * C), "proj": nn.Linear(C, C)})
        self.norm2 = nn.LayerNorm(C, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(C, hidden), "fc2": nn.Linear(hidden, C)})

    def forward(self, x):
        """(B, N, C) -> (B, N, C)."""
        B, N, C = x.shape
        qkv = self.attn["qkv"](x).view(B, N, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, h, N, hd)
        y = attend(q, k, v).transpose(1, 2).reshape(B, N, C)
        x = x + self.norm1(self.attn["proj"](y))
        return x + self.norm2(self.mlp["fc2"](F.gelu(self.mlp["fc1"](x))))  # exact (erf) GELU


class EvaClip(nn.Module):
    """EVA-CLIP image encoder: CLIP-normalised pixels (B, 3, S, S) -> raw tokens (B, (S/p)^2, C)."""

    def __init__(self, config):
        super().__init__()
        if config.image_size % config.patch_size or config.width % config.heads:
            raise ValueError(f"image_size must be a multiple of patch_size, and width of heads: {config}")
        self.config = config
        self.grid = config.image_size // config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid ** 2, config.width))
        p = config.patch_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, config.width, p, stride=p)})
        self.blocks = nn.ModuleList(EvaBlock(config) for _ in range(config.layers))
        self.init_weights()

    def init_weights(self):
        """Initialisation for training from scratch."""
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                # 1 / sqrt(fan in): the usual 0.02 at width 1792, and still large enough at width 48.
                nn.init.trunc_normal_(m.weight, std=m.weight[0].numel() ** -0.5)
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.LayerNorm):
                # Each branch ends in this norm. With 1 / sqrt(number of branches) all branches together add
                # unit variance at any depth and don't drown patch and position embeddings.
                nn.init.constant_(m.weight, (2 * len(self.blocks)) ** -0.5)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        # Not noise of std 0.02: the pixel decoder's cross-attention has no positional encoding, so positions
        # reach it only through pos_embed.
        with torch.no_grad():
            self.pos_embed[0, 1:] = sincos_positions(self.config.width, self.grid)

    def forward(self, pixels, with_cls=False):
        """pixels (B, 3, S, S), CLIP-normalised -> tokens (B, (S/p)^2, C); with_cls: also the cls (B, C)."""
        S = self.config.image_size
        if tuple(pixels.shape[1:]) != (3, S, S):
            raise ValueError(f"EVA-CLIP takes pixels (B, 3, {S}, {S}), not {tuple(pixels.shape)}")
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)  # (B, N, C)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed  # (B, 1+N, C)
        for block in self.blocks:
            x = block(x)
        # No final LayerNorm: BLIP3-o's targets are the raw output of the last block.
        return (x[:, 1:], x[:, 0]) if with_cls else x[:, 1:]

    def encode(self, pixels):
        """The image features of BLIP3-o: pixels (B, 3, S, S), CLIP-normalised -> (B, 64, C)."""
        return pool(self(pixels), self.config.n_query)

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32):
        """Load the encoder of a model folder, from its gen_vision_tower/ or else from the folder itself.

        Keys may have any prefix (`model.gen_vision_tower.vision_tower.model.`, or `visual.` in original
        EVA-CLIP files); q/k/v biases may be fused or split. Sizes come from the tensors' shapes, the number
        of heads from config.json, else width / 112. Raises ValueError if keys don't fit.
        """
        folder = Path(folder)
        tower = folder / "gen_vision_tower" if (folder / "gen_vision_tower").is_dir() else folder
        stored = read_headers(tower)
        prefixes = [key.removesuffix("cls_token") for key in stored if key.endswith("cls_token")]
        if not stored:
            raise ValueError(f"{no_weights(tower, 'EVA-CLIP')}; {EVA_HINT}")
        if len(prefixes) != 1:
            raise ValueError(f"{tower} holds {len(prefixes)} EVA-CLIP towers (tensors *cls_token), not one; "
                             f"{EVA_HINT}")
        prefix = prefixes[0]
        tensors = {key[len(prefix):]: tensor for key, tensor in stored.items() if key.startswith(prefix)}
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(EVA_EXTRAS)}
        config = eva_config(folder, tensors)
        return load_strict(lambda: cls(config), fuse_biases(tensors), tower, device, dtype)

    def save_pretrained(self, folder, dtype=None):
        """Write gen_vision_tower/model.safetensors and the sizes into config.json, whose other keys stay."""
        folder = Path(folder)
        save_weights(self, folder / "gen_vision_tower" / "model.safetensors", dtype)
        path = folder / "config.json"
        content = read_json(path) if path.exists() else {}
        ours = section(content, "nano_blip3o", path) or {"format": 2}
        content["nano_blip3o"] = ours | {"clip": asdict(self.config)}
        write_json(path, content)


EVA_HINT = "--eva takes the model folder that holds it, if it is another one"
# Keys of original EVA-CLIP files that BLIP3-o doesn't use: the contrastive head and the text encoder.
EVA_EXTRAS = ("norm.", "head.", "text.", "logit_scale", "mask_token")


def fuse_biases(tensors):
    """{name: Stored} -> the same, but q_bias and v_bias of original EVA-CLIP files as one tensor, qkv.bias:
    [q | 0 | v], as EVA-CLIP has no key bias. What doesn't fit stays, for load_strict to report."""
    fused = dict(tensors)
    for stem in [name.removesuffix("q_bias") for name in tensors if name.endswith("attn.q_bias")]:
        q, v = fused[stem + "q_bias"], fused.get(stem + "v_bias")
        if v and (q.shape, q.dtype) == (v.shape, v.dtype) and len(q.shape) == 1 and q.dtype in FLOATS:
            q, v = (read_tensor(fused.pop(stem + name)) for name in ("q_bias", "v_bias"))
            fused[stem + "qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    return fused


def eva_config(folder, tensors):
    """EvaConfig from the tensors' shapes; heads and pooling from config.json in the folder or its parent."""
    where = f"EVA-CLIP in {folder}"
    width, _, patch, _ = sizes(tensors, "patch_embed.proj.weight", 4, where)
    grid = math.isqrt(sizes(tensors, "pos_embed", 3, where)[1] - 1)
    found = {"image_size": grid * patch, "patch_size": patch, "width": width,
             "layers": stored_layers(tensors, "blocks."),
             "mlp_hidden": sizes(tensors, "blocks.0.mlp.fc1.weight", 2, where)[0]}
    files = [directory / "config.json" for directory in (folder, folder.parent)]
    path = next((file for file in files if file.exists()), None)
    config = {} if path is None else read_json(path)
    ours = section(section(config, "nano_blip3o", path), "clip", f"{path}: nano_blip3o")
    other = [f"{name} = {ours[name]}"[:60] for name in found if ours.get(name, found[name]) != found[name]]
    if other:
        raise ValueError(f"{path} says {', '.join(other)} of EVA-CLIP, but its tensors have other sizes")
    if "heads" not in ours and width % 112:
        raise ValueError(f"width {width} is no multiple of EVA-CLIP's 112 a head, and no config.json "
                         f"names the heads in {folder}")
    pooling = str(config.get("gen_pooling") or "early_pool2d_4")
    stride = re.fullmatch(r"early_pool2d_([1-9]\d{0,2})", pooling)
    if stride is None:
        raise ValueError(f"{path} asks for gen_pooling = {pooling[:60]}; only early_pool2d_N is implemented")
    if "n_query" not in ours and grid % int(stride[1]):
        raise ValueError(f"{where} makes {grid} x {grid} tokens, which gen_pooling = {pooling} can't pool "
                         f"evenly: {path or 'a config.json'} must name another one")
    defaults = {"heads": width // 112, "n_query": (grid // int(stride[1])) ** 2}
    named = {name: ours[name] for name in defaults if name in ours}
    return from_json(EvaConfig, defaults | named | found, f"{path}: nano_blip3o.clip" if named else where)


def sincos_positions(width, grid, std=0.5):
    """Centred sines and cosines of row and column, (grid^2, width); wavelengths from 4 to 2 * grid cells."""
    K = width // 4
    omega = math.pi / 2 * (2 / max(grid, 2)) ** torch.linspace(0, 1, K)  # (K,) radians per cell
    angle = torch.arange(grid)[:, None] * omega  # (grid, K)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, 2K)
    rows, cols = axis[:, None].expand(-1, grid, -1), axis[None].expand(grid, -1, -1)
    table = torch.cat([rows, cols], dim=2).reshape(grid * grid, 4 * K)
    table = table - table.mean(0)
    return F.pad(table / table.std() * std, (0, width - 4 * K))


# ---- Convolutional parts that the VAE and the UNet share --------------------------------------------------

class ResBlock(nn.Module):
    """(B, c_in, H, W) -> (B, c_out, H, W): twice (norm, SiLU, conv); in between the UNet adds emb (B, E)."""

    def __init__(self, c_in, c_out, groups, eps, emb_dim=None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        if emb_dim is not None:
            self.time_emb_proj = nn.Linear(emb_dim, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if emb is not None:
            h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Downsample(nn.Module):
    """Halve height and width. The UNet pads all sides by one, the VAE only right and bottom (as in LDM)."""

    def __init__(self, channels, pad_all_sides):
        super().__init__()
        self.pad_all_sides = pad_all_sides
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if pad_all_sides else 0)

    def forward(self, x):
        return self.conv(x if self.pad_all_sides else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """All layers at one resolution, under diffusers' names."""

    def __init__(self, resnets, attentions=(), downsamplers=(), upsamplers=()):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)  # after the first len(attentions) resnets
        self.downsamplers = nn.ModuleList(downsamplers)  # empty or one
        self.upsamplers = nn.ModuleList(upsamplers)  # empty or one

    def forward(self, x, emb=None, cond=None, outputs=None, skips=None):
        """x (B, C, H, W) -> (B, C', H', W'). Only the UNet gives emb (B, E) and cond (B, L, D); its down
        blocks append all outputs to the list `outputs`, its up blocks pop one per resnet from `skips`."""
        for i, resnet in enumerate(self.resnets):
            if skips is not None:
                x = torch.cat([x, skips.pop()], dim=1)
            x = resnet(x, emb)
            if i < len(self.attentions):
                x = self.attentions[i](x, cond)
            if outputs is not None:
                outputs.append(x)
        for resample in (*self.downsamplers, *self.upsamplers):
            x = resample(x)
            if outputs is not None:
                outputs.append(x)
        return x


class Attention(nn.Module):
    """Multi-head attention from x (B, N, C) to context (B, M, D); without context, to x itself."""

    def __init__(self, width, context_width, heads, bias=False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_width, width, bias=bias)
        self.to_v = nn.Linear(context_width, width, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, h, N or M, hd)
        y = attend(q, k, v)
        return self.to_out[0](y.transpose(1, 2).flatten(2))


def part_folder(folder, name):
    """The folder of a component (unet, vae, scheduler): diffusion-decoder/name, name, or `folder` itself."""
    folder = Path(folder)
    return next((d for d in (folder / "diffusion-decoder" / name, folder / name) if d.is_dir()), folder)


def read_config(path, cls, fixed):
    """The dataclass `cls` from diffusers' config.json; ValueError if a field is absent or unsupported."""
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    raw = read_json(path)
    if "model_type" in raw:  # `part_folder` found no folder of its own
        raise ValueError(f"{path.parent} holds no {fixed['_class_name'][0]}: it lacks diffusion-decoder/unet"
                         " or diffusion-decoder/vae")
    require_settings(raw, fixed, path, [*(f.name for f in fields(cls)), *NEEDED & fixed.keys()])
    if raw.get("num_attention_heads"):  # unless null, diffusers reads the head counts from here
        raw["attention_head_dim"] = raw["num_attention_heads"]
    levels = raw["block_out_channels"]
    levels = len(levels) if isinstance(levels, list) else 1
    values = {f.name: as_levels(raw[f.name], f.default, levels) for f in fields(cls)}
    return from_json(cls, values, path, most=2 ** 16)  # lists of so many layers still fit into memory


def as_levels(value, default, levels):
    """A JSON value, one for all levels or a list of one for each, in the form of a field with this default:
    a number is repeated where a tuple is due, and equal numbers are one where a number is due."""
    if isinstance(default, tuple):
        return value if isinstance(value, list) else [value] * levels
    return value[0] if isinstance(value, list) and value and value == value[:1] * len(value) else value


def divisible(name, numbers, divisor, by):
    """ValueError unless `divisor` divides each of the numbers."""
    if any(number % divisor for number in numbers):
        raise ValueError(f"{name} {numbers} must be multiples of {by} {divisor}")


# ---- VAE: pixels <-> latents (AutoencoderKL of SDXL) ------------------------------------------------------

@dataclass(frozen=True)
class VAEConfig:
    """Fields of diffusers' vae/config.json; the defaults are SDXL's (83.7 M parameters, f = 8)."""
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.13025  # 1 / standard deviation of the raw latents
    sample_size: int = 1024  # image side it was trained at; unused, kept for diffusers

    def __post_init__(self):
        divisible("block_out_channels", self.block_out_channels, self.norm_num_groups, "norm_num_groups")
        if self.in_channels != 3 or self.out_channels != 3:
            raise ValueError("in_channels and out_channels must be 3: images are RGB")


# Fields of diffusers' classes that aren't ours: the values for which this code computes the same, of which
# the first is written; a list must hold it throughout.
VAE_FIXED = {"_class_name": ("AutoencoderKL",), "act_fn": ("silu", "swish"), "use_quant_conv": (True,),
             "use_post_quant_conv": (True,), "mid_block_add_attention": (True,), "shift_factor": (None, 0),
             "latents_mean": (None,), "latents_std": (None,), "down_block_types": ("DownEncoderBlock2D",),
             "up_block_types": ("UpDecoderBlock2D",)}


class SpatialAttention(Attention):
    """Single-head attention over a feature map (B, C, H, W), with its norm and residual."""

    def __init__(self, channels, groups):
        super().__init__(channels, channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)

    def forward(self, x, context=None):
        y = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, H*W, C)
        return x + super().forward(y, context).transpose(1, 2).unflatten(2, x.shape[2:])


def vae_resnets(config, c_in, c_out, n):
    """The n resnets of one level of the VAE; the first goes from c_in to c_out channels."""
    return [ResBlock(c_in if j == 0 else c_out, c_out, config.norm_num_groups, 1e-6) for j in range(n)]


def vae_middle(config, c):
    """The VAE's lowest resolution: resnet, attention, resnet."""
    return Level(vae_resnets(config, c, c, 2), [SpatialAttention(c, config.norm_num_groups)])


class VAEEncoder(nn.Module):
    """pixels (B, 3, H, W) -> (B, 2 * latent, H/f, W/f): mean and log variance, before quant_conv."""

    def __init__(self, config):
        super().__init__()
        chans = config.block_out_channels
        c = chans[0]
        self.conv_in = nn.Conv2d(config.in_channels, c, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, c_out in enumerate(chans):
            down = [Downsample(c_out, pad_all_sides=False)] if i < len(chans) - 1 else []
            resnets = vae_resnets(config, c, c_out, config.layers_per_block)
            self.down_blocks.append(Level(resnets, downsamplers=down))
            c = c_out
        self.mid_block = vae_middle(config, c)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class VAEDecoder(nn.Module):
    """latents (B, latent, h, w), after post_quant_conv -> pixels (B, 3, h*f, w*f)."""

    def __init__(self, config):
        super().__init__()
        chans = config.block_out_channels[::-1]
        c = chans[0]
        self.conv_in = nn.Conv2d(config.latent_channels, c, 3, padding=1)
        self.mid_block = vae_middle(config, c)
        self.up_blocks = nn.ModuleList()
        for i, c_out in enumerate(chans):
            up = [Upsample(c_out)] if i < len(chans) - 1 else []
            resnets = vae_resnets(config, c, c_out, config.layers_per_block + 1)  # one more than the encoder
            self.up_blocks.append(Level(resnets, upsamplers=up))
            c = c_out
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, config.out_channels, 3, padding=1)

    def forward(self, x):
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """SDXL's autoencoder. `encode` returns and `decode` takes scaled latents, raw latents * scaling_factor,
    of about unit variance. Pixels are (B, 3, H, W) in [-1, 1]."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.factor = 2 ** (len(config.block_out_channels) - 1)  # pixels per latent, along a side
        self.encoder = VAEEncoder(config)
        self.decoder = VAEDecoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def moments(self, pixels):
        """pixels (B, 3, H, W) in [-1, 1] -> mean, log variance of raw latents, (B, latent, H/f, W/f)."""
        if pixels.shape[-2] % self.factor or pixels.shape[-1] % self.factor:
            raise ValueError(f"the VAE takes sides that are multiples of {self.factor}, not "
                             f"{tuple(pixels.shape[-2:])}")
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, pixels, sample=False, generator=None):
        """pixels (B, 3, H, W) in [-1, 1] -> scaled latents (B, latent, H/f, W/f), the mean or a sample."""
        mean, logvar = self.moments(pixels)
        if sample:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
            mean = mean + (logvar / 2).exp() * noise
        return mean * self.config.scaling_factor

    def decode(self, latents):
        """scaled latents (B, latent, h, w) -> pixels (B, 3, h*f, w*f), about [-1, 1], not clamped."""
        # Convolutions of large maps are fastest in channels_last; all layers keep it.
        latents = (latents / self.config.scaling_factor).contiguous(memory_format=torch.channels_last)
        return self.decoder(self.post_quant_conv(latents))

    def forward(self, pixels, generator=None, noise=None):
        """For training: reconstruction (B, 3, H, W) of sampled latents, and KL per latent element, a scalar.
        The sample's unit normal noise (B, latent, H/f, W/f) is drawn unless given."""
        mean, logvar = self.moments(pixels)
        if noise is None:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
        return self.decoder(self.post_quant_conv(mean + (logvar / 2).exp() * noise.to(mean))), kl

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32):
        """Load from a model folder, its diffusion-decoder, or the VAE's own folder (diffusers layout)."""
        folder = part_folder(folder, "vae")
        config = read_config(folder / "config.json", VAEConfig, VAE_FIXED)
        tensors = linear_attention(read_headers(folder))
        return load_strict(lambda: cls(config), tensors, folder, device, dtype)

    def save_pretrained(self, folder, dtype=None):
        """Write config.json and weights into `folder` (the VAE's own), so that diffusers loads them."""
        content, levels = written(VAE_FIXED, self.config), len(self.config.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            content[name] = [content[name]] * levels
        write_json(Path(folder) / "config.json", content | {"force_upcast": True})
        save_weights(self, Path(folder) / "diffusion_pytorch_model.safetensors", dtype)


def linear_attention(stored):
    """{name: Stored} of the VAE, with the names of diffusers' attention of before 2023, and with matrices
    where a convolution of 1 x 1 pixel stored them."""
    renamed = {}
    for name, tensor in stored.items():
        stem, dot, rest = name.partition("attentions.0.")
        part, _, kind = rest.partition(".")
        name = f"{stem}{dot}{OLD_ATTENTION[part]}.{kind}" if part in OLD_ATTENTION else name
        matrix = dot and len(tensor.shape) == 4 and tuple(tensor.shape[2:]) == (1, 1)
        renamed[name] = tensor._replace(shape=tensor.shape[:2]) if matrix else tensor
    return renamed


OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


# ---- UNet: noisy latents + features -> noise --------------------------------------------------------------

@dataclass(frozen=True)
class UNetConfig:
    """Fields of diffusers' unet/config.json; the defaults are Emu2's and BLIP3-o's (2.53 B parameters)."""
    sample_size: int = 128  # latents along a side of the default image
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280)
    layers_per_block: int = 2
    transformer_layers_per_block: tuple[int, ...] = (1, 2, 10)
    attention_head_dim: tuple[int, ...] = (5, 10, 20)  # number of heads per level, despite diffusers' name
    cross_attention_dim: int = 1792
    addition_time_embed_dim: int = 256
    projection_class_embeddings_input_dim: int = 3328  # 1792 + 6 * 256
    norm_num_groups: int = 32
    down_block_types: tuple[str, ...] = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    up_block_types: tuple[str, ...] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")

    def __post_init__(self):
        levels = len(self.block_out_channels)
        lists = (self.transformer_layers_per_block, self.attention_head_dim,
                 self.down_block_types, self.up_block_types)
        if any(len(x) != levels for x in lists):
            raise ValueError(f"a UNet of {levels} levels needs {levels} entries in each list of its "
                             f"config: {self}")
        unknown = {*self.down_block_types} - {*DOWN_BLOCKS} | {*self.up_block_types} - {*UP_BLOCKS}
        if unknown:
            raise ValueError(f"unknown UNet block types: {', '.join(sorted(unknown))}")
        divisible("block_out_channels", self.block_out_channels, self.norm_num_groups, "norm_num_groups")
        for channels, heads in zip(self.block_out_channels, self.attention_head_dim):
            divisible("block_out_channels", (channels,), heads, "attention_head_dim")
        divisible("block_out_channels and addition_time_embed_dim",
                  (self.block_out_channels[0], self.addition_time_embed_dim), 2, "sines and cosines,")
        if self.projection_class_embeddings_input_dim != (self.cross_attention_dim
                                                          + 6 * self.addition_time_embed_dim):
            raise ValueError("projection_class_embeddings_input_dim must be cross_attention_dim + 6 x "
                             f"addition_time_embed_dim, not {self.projection_class_embeddings_input_dim}")
        if self.in_channels != self.out_channels:
            raise ValueError(f"out_channels {self.out_channels} must equal in_channels {self.in_channels}")


DOWN_BLOCKS, UP_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
FALSE = (False, None)
UNET_FIXED = {
    "_class_name": ("UNet2DConditionModel",), "act_fn": ("silu", "swish"), "flip_sin_to_cos": (True,),
    "freq_shift": (0,), "norm_eps": (1e-05,), "use_linear_projection": (True,),
    "addition_embed_type": ("text_time",), "resnet_time_scale_shift": ("default",),
    "center_input_sample": FALSE, "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": FALSE, "downsample_padding": (1,), "mid_block_scale_factor": (1,),
    "reverse_transformer_layers_per_block": (None,), "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,), "dual_cross_attention": FALSE, "class_embed_type": (None,),
    "num_class_embeds": (None,), "resnet_skip_time_act": FALSE, "resnet_out_scale_factor": (1,),
    "time_embedding_type": ("positional",), "time_embedding_dim": (None,), "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,), "time_cond_proj_dim": (None,), "conv_in_kernel": (3,),
    "conv_out_kernel": (3,), "attention_type": ("default",), "class_embeddings_concat": FALSE,
    "mid_block_only_cross_attention": (None, False), "cross_attention_norm": (None,)}
# Fields whose default in diffusers is another value than ours: they must be written out.
NEEDED = {"use_linear_projection", "addition_embed_type", "beta_schedule", "timestep_spacing"}


def written(fixed, config):
    """The object of diffusers' config.json that `fixed` and a dataclass make."""
    return {name: values[0] for name, values in fixed.items()} | asdict(config)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the features, GEGLU feed-forward; pre-norm, on tokens (B, N, C)."""

    def __init__(self, width, heads, cond_width):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, cond_width, heads)
        self.norm3 = nn.LayerNorm(width)
        up = nn.ModuleDict({"proj": nn.Linear(width, 8 * width)})
        self.ff = nn.ModuleDict({"net": nn.ModuleList([up, nn.Identity(), nn.Linear(4 * width, width)])})

    def forward(self, x, cond):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), cond)
        up, _, down = self.ff["net"]
        value, gate = up["proj"](self.norm3(x)).chunk(2, dim=-1)
        return x + down(value * F.gelu(gate))


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks on a feature map (B, C, H, W) with cross-attention to cond (B, L, D)."""

    def __init__(self, channels, depth, heads, cond_width, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)  # 1e-6 here, 1e-5 in the resnets
        self.proj_in = nn.Linear(channels, channels)
        blocks = [TransformerBlock(channels, heads, cond_width) for _ in range(depth)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x, cond):
        y = self.proj_in(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))  # (B, H*W, C)
        for block in self.transformer_blocks:
            y = block(y, cond)
        return x + self.proj_out(y).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def unet_resnets(config, i, ins):
    """The resnets of level i of the UNet, one for each number of input channels in `ins`."""
    emb = 4 * config.block_out_channels[0]
    return [ResBlock(c_in, config.block_out_channels[i], config.norm_num_groups, 1e-5, emb) for c_in in ins]


def unet_attentions(config, i, n):
    """n spatial transformers of level i of the UNet."""
    return [SpatialTransformer(config.block_out_channels[i], config.transformer_layers_per_block[i],
                               config.attention_head_dim[i], config.cross_attention_dim,
                               config.norm_num_groups) for _ in range(n)]


class UNet(nn.Module):
    """SDXL's UNet, conditioned on the 64 features, their mean and the image's size instead of text."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        chans, n = config.block_out_channels, config.layers_per_block
        last = len(chans) - 1
        self.conv_in = nn.Conv2d(config.in_channels, chans[0], 3, padding=1)
        self.time_embedding = MLP(chans[0], 4 * chans[0], nn.SiLU())
        self.add_embedding = MLP(config.projection_class_embeddings_input_dim, 4 * chans[0], nn.SiLU())

        c, skips = chans[0], [chans[0]]  # current channels; channels of the skip connections
        self.down_blocks = nn.ModuleList()
        for i, kind in enumerate(config.down_block_types):
            down = [Downsample(chans[i], pad_all_sides=True)] if i < last else []
            resnets = unet_resnets(config, i, [c] + [chans[i]] * (n - 1))
            attentions = unet_attentions(config, i, n if kind.startswith("CrossAttn") else 0)
            self.down_blocks.append(Level(resnets, attentions, downsamplers=down))
            skips += [chans[i]] * (n + len(down))
            c = chans[i]
        self.mid_block = Level(unet_resnets(config, last, [c, c]), unet_attentions(config, last, 1))
        self.up_blocks = nn.ModuleList()
        for i, kind in zip(reversed(range(len(chans))), config.up_block_types):
            ins = [(c if j == 0 else chans[i]) + skips.pop() for j in range(n + 1)]
            up = [Upsample(chans[i])] if i > 0 else []
            resnets = unet_resnets(config, i, ins)
            attentions = unet_attentions(config, i, n + 1 if kind.startswith("CrossAttn") else 0)
            self.up_blocks.append(Level(resnets, attentions, upsamplers=up))
            c = chans[i]
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, c, eps=1e-5)
        self.conv_out = nn.Conv2d(c, config.out_channels, 3, padding=1)
        self.init_weights()

    def init_weights(self):
        """Zero the last layer of every residual branch and of the network, whose first output is then 0."""
        ends = [self.conv_out]
        ends += [m.conv2 for m in self.modules() if isinstance(m, ResBlock)]
        ends += [m.proj_out for m in self.modules() if isinstance(m, SpatialTransformer)]
        for layer in ends:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, t, cond, pooled, time_ids):
        """Noise (B, 4, h, w) in the latents x (B, 4, h, w) at time t in 0..999, a number or (B,).

        cond (B, L, D); pooled (B, D), SDXL's text_embeds; time_ids (B, 6): see added_conditions.
        """
        side = 2 ** (len(self.down_blocks) - 1)
        if x.shape[2] % side or x.shape[3] % side:
            raise ValueError(f"the UNet takes latents whose sides are multiples of {side}, not "
                             f"{tuple(x.shape[2:])}")
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        times = sinusoid(t, self.config.block_out_channels[0])  # (B, C)
        ids = sinusoid(time_ids.flatten(), self.config.addition_time_embed_dim)  # (6 B, 256)
        ids = ids.view(len(x), -1)  # (B, 6 * 256)
        added = torch.cat([pooled.to(ids.dtype), ids], dim=1)  # (B, D + 6 * 256)
        emb = self.time_embedding(times.to(x.dtype)) + self.add_embedding(added.to(x.dtype))  # (B, E)

        x = self.conv_in(x)  # (B, C, h, w)
        skips = [x]
        for level in self.down_blocks:
            x = level(x, emb, cond, outputs=skips)
        x = self.mid_block(x, emb, cond)
        for level in self.up_blocks:
            x = level(x, emb, cond, skips=skips)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32):
        """Load from a model folder, its diffusion-decoder, or the UNet's own folder (diffusers layout)."""
        folder = part_folder(folder, "unet")
        config = read_config(folder / "config.json", UNetConfig, UNET_FIXED)
        return load_strict(lambda: cls(config), read_headers(folder), folder, device, dtype)

    def save_pretrained(self, folder, dtype=None):
        """Write config.json and weights into `folder` (the UNet's own), so that diffusers loads them."""
        save_weights(self, Path(folder) / "diffusion_pytorch_model.safetensors", dtype)
        write_json(Path(folder) / "config.json", written(UNET_FIXED, self.config))


# ---- Schedule: the noise levels of sampling, and the steps between them -----------------------------------

@dataclass(frozen=True)
class ScheduleConfig:
    """Fields of diffusers' scheduler_config.json; the defaults are SDXL's."""
    beta_start: float = field(default=0.00085, metadata={"interval": Interval(above=0, below=1)})
    beta_end: float = field(default=0.012, metadata={"interval": Interval(above=0, below=1)})
    num_train_timesteps: int = field(default=1000, metadata={"interval": Interval(1, 100_000)})
    steps_offset: int = field(default=1, metadata={"interval": Interval(0, 100_000)})


SAMPLERS = ("euler", "dpm++2m")
SPACINGS = ("leading", "trailing", "karras")


class EulerSchedule:
    """Noise levels as in SDXL, of scaled-linear betas, and the sampler's steps between them.

    sampler "euler" is diffusers' EulerDiscreteScheduler, "dpm++2m" its DPMSolverMultistepScheduler with
    solver order 2 (Lu et al., arXiv 2211.01095). spacing, of the times: "leading", the official one, leaves
    out the noisiest; "trailing" leaves out the cleanest; "karras" has all, most of them clean, as in the
    multistep class with use_karras_sigmas (arXiv 2206.00364, eq. 5). Raises ValueError for other names.

    timesteps (steps,), descending; sigmas (steps + 1,), noise per unit of signal, with a final 0;
    init_noise_sigma, the scale of the first latents; alpha_bar (1000,), for training.
    """

    def __init__(self, steps=50, config=ScheduleConfig(), sampler="euler", spacing="leading"):
        if sampler not in SAMPLERS or spacing not in SPACINGS:
            raise ValueError(f"there is no sampler {sampler!r} with spacing {spacing!r}: use "
                             f"{' or '.join(SAMPLERS)}, with {' or '.join(SPACINGS)}")
        self.config, self.sampler, n = config, sampler, config.num_train_timesteps
        # Leading, diffusers' multistep class divides by one step more, and leaves out the last time.
        division = steps + (sampler == "dpm++2m" and spacing == "leading")
        if not 1 <= steps <= division <= n:
            raise ValueError(f"steps must be between 1 and {n - (division - steps)}, not {steps}")
        root = torch.linspace(config.beta_start ** 0.5, config.beta_end ** 0.5, n, dtype=torch.float64)
        beta = root ** 2
        alpha_bar = (1 - beta).cumprod(0)
        levels = ((1 - alpha_bar) / alpha_bar).sqrt()  # (n,), ascending
        t = torch.arange(division).flip(0)[:steps] * (n // division) + config.steps_offset
        if spacing == "trailing":
            t = (n - torch.arange(steps, dtype=torch.float64) * n / steps).round().long() - 1
        # With steps = n the offset passes the last level; diffusers clamps as well.
        sigmas = levels[t.clamp(max=n - 1)]
        if spacing == "karras":
            clean, noisy = (levels[i] ** (1 / 7) for i in (0, -1))
            sigmas = (noisy + torch.linspace(0, 1, steps, dtype=torch.float64) * (clean - noisy)) ** 7
            t = (levels.log() - sigmas.log()[:, None]).abs().argmin(1)
        self.timesteps = t.float()
        self.sigmas = F.pad(sigmas, (0, 1)).float()
        self.init_noise_sigma = float((self.sigmas[0] ** 2 + 1).sqrt())
        self.alpha_bar = alpha_bar.float()

    def with_steps(self, steps, sampler="euler", spacing="leading"):
        """The same noise levels with other sampling steps."""
        return EulerSchedule(steps, self.config, sampler, spacing)

    def denoise(self, predict, noise, progress=None):
        """Unit normal noise (B, 4, h, w), fp32 -> latents of the same shape.

        predict(x, t) -> the noise in x, latents of variance 1 at time t, both (B, 4, h, w) in fp32.
        progress: see PixelDecoder.decode.
        """
        sigmas, steps, last = self.sigmas.tolist(), len(self.timesteps), None
        x = noise * self.init_noise_sigma
        for i, t in enumerate(self.timesteps):
            sigma, sigma_next = sigmas[i], sigmas[i + 1]
            eps = predict(x / (sigma ** 2 + 1) ** 0.5, t)
            clean = x - sigma * eps  # the predicted result
            if self.sampler == "dpm++2m" and 0 < i < steps - 1 and sigma < sigmas[i - 1]:
                # That of half a step later, on the line through the last two predictions in log sigma.
                ahead = math.log(sigma / sigma_next) / math.log(sigmas[i - 1] / sigma) / 2
                eps = eps - ahead / sigma * (clean - last)
            x = x + (sigma_next - sigma) * eps  # Euler step of dx/dsigma = eps
            last = clean
            if progress:
                progress(i + 1, steps)
        return x

    def add_noise(self, z, noise, t):
        """UNet input (B, 4, h, w) at times t (B,) long: sqrt(a) z + sqrt(1 - a) noise, a = alpha_bar[t]."""
        a = self.alpha_bar.to(z.device, non_blocking=True)[t].view(-1, 1, 1, 1).to(z.dtype)
        return a.sqrt() * z + (1 - a).sqrt() * noise

    @classmethod
    def from_pretrained(cls, folder):
        """Read scheduler_config.json, found as by `part_folder`; SDXL's numbers where there is none."""
        path = part_folder(folder, "scheduler") / "scheduler_config.json"
        if not path.exists():
            return cls()
        raw, names = read_json(path), [f.name for f in fields(ScheduleConfig)]
        require_settings(raw, SCHEDULE_FIXED, path, [*names, *NEEDED & SCHEDULE_FIXED.keys()])
        config = from_json(ScheduleConfig, raw, path)
        return cls(min(50, config.num_train_timesteps), config)

    def save_pretrained(self, folder):
        """Write scheduler_config.json into `folder` (the scheduler's own)."""
        write_json(Path(folder) / "scheduler_config.json", written(SCHEDULE_FIXED, self.config))


SCHEDULE_FIXED = {
    "_class_name": ("EulerDiscreteScheduler",), "beta_schedule": ("scaled_linear",),
    "prediction_type": ("epsilon",), "timestep_spacing": ("leading",), "interpolation_type": ("linear",),
    "use_karras_sigmas": FALSE, "use_exponential_sigmas": FALSE, "use_beta_sigmas": FALSE,
    "trained_betas": (None,), "rescale_betas_zero_snr": FALSE, "timestep_type": ("discrete",),
    "final_sigmas_type": ("zero",)}


# ---- PixelDecoder: features -> pixels ---------------------------------------------------------------------

class PixelDecoder(nn.Module):
    """Emu2's visual decoder: 64 features -> image, by denoising in the VAE's latent space."""

    def __init__(self, unet, vae, schedule=None):
        super().__init__()
        self.unet, self.vae = unet, vae
        self.schedule = schedule or EulerSchedule()

    def added_conditions(self, cond, size, original_size, crop):
        """The mean feature (B, D), and time_ids (B, 6): original (h, w), crop (top, left), size (h, w)."""
        ids = torch.tensor([*original_size, *crop, *size], dtype=torch.float32)
        return cond.mean(dim=1), ids.to(cond.device, non_blocking=True).expand(len(cond), 6)

    @torch.no_grad()
    def decode(self, features, negative=None, steps=50, guidance=3.0, noise=None, size=None,
               original_size=None, crop=(0, 0), progress=None, sampler="euler", spacing="leading"):
        """features (B, 64, C) -> pixels (B, 3, H, W) in [0, 1], fp32.

        negative (B or 1, 64, C)  unconditional features for guidance: those generated for the text " ", or,
                                  to reconstruct an image, those of an all-zero normalised image
        noise (B, 4, H/f, W/f)    unit normal; drawn here unless given
        size, original_size       (height, width); size defaults to the UNet's own, original_size to size
        crop                      (top, left), the image's place in its original, a condition of SDXL
        progress                  called as progress(steps done, steps) after each step
        sampler, spacing          of the steps, see EulerSchedule
        """
        size = size or (self.unet.config.sample_size * self.vae.factor,) * 2
        shape = self.latent_shape(len(features), size)
        guided = guidance != 1
        if guided and negative is None:
            raise ValueError(f"guidance {guidance} needs negative features")
        noise = torch.randn(shape, device=features.device) if noise is None else noise
        if tuple(noise.shape) != shape:
            raise ValueError(f"noise for size {tuple(size)} must be {shape}, not {tuple(noise.shape)}")

        schedule = self.schedule.with_steps(steps, sampler, spacing)
        dtype = self.unet.conv_in.weight.dtype
        # [cond, uncond], Emu2's order; flow.guide stacks them the other way round.
        cond = torch.cat([features, negative.expand_as(features)]) if guided else features
        cond = cond.to(dtype)  # (B or 2B, 64, C)
        added = self.added_conditions(cond, size, original_size or size, crop)

        def predict(x, t):
            x = x.to(dtype)
            eps = self.unet(x.repeat(2, 1, 1, 1) if guided else x, t, cond, *added).float()
            if guided:
                eps, eps_uncond = eps.chunk(2)
                eps = eps_uncond + guidance * (eps - eps_uncond)
            return eps
        x = schedule.denoise(predict, noise.to(features.device, torch.float32), progress)  # (B, 4, H/f, W/f)
        # The VAE runs in fp32, as its config asks: it overflows in fp16 (the official code uses bf16).
        return (self.vae.decode(x) / 2 + 0.5).clamp(0, 1)

    def latent_shape(self, n, size):
        """(n, 4, H/f, W/f) for n images of `size` (H, W); ValueError if that can't be halved evenly."""
        multiple = self.vae.factor * 2 ** (len(self.unet.down_blocks) - 1)
        if size[0] % multiple or size[1] % multiple:
            raise ValueError(f"height and width must be multiples of {multiple}, not {tuple(size)}")
        return n, self.unet.config.in_channels, size[0] // self.vae.factor, size[1] // self.vae.factor

    def loss(self, images, features, drop=0.1, generator=None, negative=None, max_weight=1.0, t=None,
             noise=None):
        """Mean squared error of the predicted noise (as Emu2 trains its decoder), a scalar.

        images: scaled latents (B, 4, h, w), or pixels (B, 3, H, W) in [-1, 1], encoded without gradient.
        drop: the probability, or a mask (B,) bool, of replacing features (B, 64, C) by `negative` (B or 1,
        64, C), the one that sampling uses; None means zeros. t (B,) long and noise like the latents are
        drawn unless given. Loss weight: min(1 / alpha_bar(t), max_weight).
        """
        z = images
        if images.shape[1] != self.unet.config.in_channels:
            with torch.no_grad():
                z = self.vae.encode(images, sample=True, generator=generator)
        B, device = len(z), z.device
        if t is None:
            t = torch.randint(0, len(self.schedule.alpha_bar), (B,), generator=generator, device=device)
        if noise is None:
            noise = torch.randn(z.shape, generator=generator, device=device)
        if not torch.is_tensor(drop):
            drop = torch.rand(B, generator=generator, device=device) < drop
        noise = noise.to(z)
        null = torch.zeros_like(features) if negative is None else negative
        cond = torch.where(drop.view(-1, 1, 1), null, features)
        size = (z.shape[2] * self.vae.factor, z.shape[3] * self.vae.factor)
        added = self.added_conditions(cond, size, size, (0, 0))
        eps = self.unet(self.schedule.add_noise(z, noise, t), t, cond, *added)
        weight = 1 / self.schedule.alpha_bar.to(device, non_blocking=True)[t]  # 1 + sigma^2
        weight = weight.clamp(max=max_weight)
        return (weight * (eps - noise).square().flatten(1).mean(1)).mean()

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32):
        """Load unet/, vae/ and scheduler/ of a model folder or its diffusion-decoder; the VAE in fp32."""
        unet, vae = UNet.from_pretrained(folder, device, dtype), VAE.from_pretrained(folder, device)
        if unet.config.in_channels != vae.config.latent_channels:
            raise ValueError(f"in {folder} the UNet takes {unet.config.in_channels} channels, but the VAE's "
                             f"latents have {vae.config.latent_channels}")
        return cls(unet, vae, EulerSchedule.from_pretrained(folder))

    def save_pretrained(self, folder, dtype=None):
        """Write diffusion-decoder/{unet,vae,scheduler} into a model folder, in diffusers' layout."""
        base = Path(folder) / "diffusion-decoder"
        self.unet.save_pretrained(base / "unet", dtype)
        self.vae.save_pretrained(base / "vae", dtype)
        self.schedule.save_pretrained(base / "scheduler")


# ---- Sizes ------------------------------------------------------------------------------------------------

PRESETS = {
    # 64 px images, 64 features of 48 numbers; trains on two CPU cores. Unlike SDXL's, its UNet has
    # cross-attention at the highest resolution, too, which places shapes exactly.
    "nano": {
        "clip": EvaConfig(image_size=64, patch_size=8, width=48, layers=4, heads=4, mlp_hidden=384),
        "vae": VAEConfig(block_out_channels=(16, 16, 32), layers_per_block=1, norm_num_groups=4,
                         scaling_factor=1.0, sample_size=64),
        "unet": UNetConfig(sample_size=16, block_out_channels=(48, 96), layers_per_block=1,
                           transformer_layers_per_block=(1, 1), attention_head_dim=(2, 3),
                           cross_attention_dim=48, addition_time_embed_dim=32,
                           projection_class_embeddings_input_dim=48 + 6 * 32, norm_num_groups=16,
                           down_block_types=("CrossAttnDownBlock2D",) * 2,
                           up_block_types=("CrossAttnUpBlock2D",) * 2),
    },
    "official": {"clip": EvaConfig(), "vae": VAEConfig(), "unet": UNetConfig()},
}
