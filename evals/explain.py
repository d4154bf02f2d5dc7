"""A look inside one prompt: `python sample.py --explain PROMPT` writes one page of HTML about that very run.

The run is the one of `--prompt`, to the last bit. `record` listens to it: forward hooks hear what goes into
the LLM, the DiT and the UNet, and torch's attention, which returns no weights, is wrapped for as long as it
takes. `explain_page` makes pictures and numbers of that, and puts them into explain.html beside this file.
Each panel names the line of code that makes it, found by `inspect` in the code that has just run.

n queries, L tokens of the prompt with [IMG], N = side x side tokens of the DiT, C feature channels.
"""
import base64
import html
import inspect
import json
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

import data
import model
from clip_decoder import VAE, EulerSchedule
from dit import Block
from evals.show import decode_states
from flow import euler_sample, guided, timesteps
from sample import to_uint8

PAGE = Path(__file__).with_name("explain.html")
# What a page holds at most: it stays a few MB whatever the model.
LAYERS, HEADS = 8, 4                    # of the language model
FRAMES, LARGE_FRAMES = 31, 8            # of the way from noise; of images of more than LARGE pixels a side
LARGE, PIXELS, RESULT = 128, 192, 512   # pixels: sides of frames and of the final image that aren't reduced

PANELS = {  # title, what it shows, the function that makes it, its line
    "upsampled": ("Upsampled prompt", "The language model first says in full what the prompt leaves open, "
                  "so that the DiT need not decide it at every position by itself.",
                  lambda pipe: type(pipe).upsample_prompts, "self.ask("),
    "tokens": ("Tokens", "The text in the template of generation, cut into tokens; [IMG] and the learnt "
               "queries follow it.", lambda pipe: data.prompt_ids, "GENERATE.format"),
    "attention": ("What each query attends to", "In each layer of the language model a query takes up what "
                  "stands in the tokens and in the queries before it; rows are queries and sum to 1.",
                  lambda pipe: model.Attention.forward, "attend("),
    "similarity": ("How alike the queries are", "The query states after the last layer are the DiT's "
                   "condition: this is the cosine of each pair.",
                   lambda pipe: model.BLIP3o.condition, "return self.llm(queries"),
    "state": ("The state x_t", "Noise at t = 0, features at t = 1: what the decoder makes of the state "
              "itself.",
              lambda pipe: euler_sample, "x = x + dt"),
    "prediction": ("The predicted result", "Where the velocity points from here: x_t + (1 - t) v, decoded "
                   "likewise.", lambda pipe: type(pipe).trajectory, "(1 - t[:-1]) * v"),
    "velocity": ("How fast", "The velocity's root mean square over all features, at each step.",
                 lambda pipe: euler_sample, "v = velocity("),
    "pull": ("Guidance's pull", "How far the velocities with and without the prompt lie apart: guidance "
             "goes further along this difference.", lambda pipe: guided, "v_null + scale"),
    "maps": ("Where each query is attended to", "The DiT's tokens lie on the image's grid and attend to the "
             "queries: light is where a query gets most, the mean over layers and heads.",
             lambda pipe: Block.cross_attend, "attend(self.attn2.query"),
    "decoder": ("The decoder's steps", "Given the features, the UNet takes the noise off latents: left what "
                "the VAE makes of them on the way, right of the result that the UNet predicts.",
                lambda pipe: EulerSchedule.denoise, "x = x + (sigma_next"),
    "image": ("The image", "The VAE turns the last latents into pixels.", lambda pipe: VAE.decode,
              "return self.decoder(")}


# ---- listening to a run -----------------------------------------------------------------------------------

@dataclass
class Tape:
    """What `record` hears about the first prompt of a batch; all tensors are fp32 and on the CPU."""
    guidance: float                                 # of the DiT
    decoder_guidance: float
    layers: dict = field(default_factory=dict)      # of the LLM: attention of the queries (heads, n, keys)
    condition: torch.Tensor | None = None           # query states (n, D)
    batch: int = 0                                  # of so many conditions that is the first
    states: list = field(default_factory=list)      # x_t at each step (C, grid, grid)
    velocities: list = field(default_factory=list)  # there, with guidance (C, grid, grid)
    pulls: list = field(default_factory=list)       # root mean square of v_true - v_null; without guidance 0
    maps: list = field(default_factory=list)        # at each step and layer: attention to queries (N, n)
    latents: list = field(default_factory=list)     # the UNet's input, of variance 1, at each step (4, h, w)
    noises: list = field(default_factory=list)      # its output, with guidance (4, h, w)

    def hear_queries(self, layer, weights):
        """Attention in the language model: that of the prompt alone has as many queries as keys."""
        if weights.shape[1] < weights.shape[2]:
            self.layers[layer] = weights

    def hear_condition(self, _, args, hidden):
        """After the language model: the queries come last."""
        self.condition, self.batch = on_cpu(hidden[0]), len(hidden)

    def hear_step(self, _, args, v):
        """After the DiT, whose batch is [null, cond] where there is guidance."""
        x, both = args[0], len(args[0]) > self.batch
        v_null, v_true = v.float().chunk(2) if both else (v.float(), v.float())
        self.states.append(on_cpu(x[0]))            # the same in both halves
        self.velocities.append(on_cpu(guided(v_true[0], v_null[0], self.guidance)))
        self.pulls.append(rms(v_true[0] - v_null[0]))

    def hear_noise(self, _, args, noise):
        """After the UNet, whose batch is [cond, null] with guidance."""
        true, null = noise.float().chunk(2) if self.decoder_guidance != 1 else (noise.float(),) * 2
        self.latents.append(on_cpu(args[0][0]))
        self.noises.append(on_cpu(guided(true[0], null[0], self.decoder_guidance)))


def on_cpu(tensor):
    """A tensor of any device and dtype as one that lasts."""
    return tensor.detach().float().cpu().clone()


def rms(tensor):
    """The root mean square of a tensor, a float."""
    return float(tensor.square().mean().sqrt())


def attention_weights(q, k, mask=None, causal=False, scale=None):
    """The weights of torch's scaled_dot_product_attention, softmax(q k^T scale + mask): q (B, H, N, hd) and
    k (B, H or fewer, M, hd) -> (B, H, N, M), fp32. mask: bool (True takes part) or added."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.float() @ k.float().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


@contextmanager
def record(pipe, guidance, decoder_guidance):
    """Within: what the pipeline generates with these scales of guidance is heard on the Tape that is
    yielded. It computes the same as ever."""
    tape, awaited, hooks = Tape(guidance, decoder_guidance), [], []
    attend, dit = F.scaled_dot_product_attention, pipe.model.dit

    def listening(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **more):
        if awaited:
            weights = attention_weights(q[:1], k[:1], attn_mask if attn_mask is None else attn_mask[:1],
                                        is_causal, scale)
            awaited.pop()(on_cpu(weights[0]))
        return attend(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, **more)

    def await_attention(module, hear):
        """The attention after this module's call is for hear(weights (heads, N, M)): the DiT's rows are
        those of the prompt, as null conditions need no attention."""
        hooks.append(module.register_forward_pre_hook(lambda *_: awaited.append(hear)))

    for i, layer in enumerate(pipe.model.llm.layers):
        await_attention(layer.self_attn, partial(tape.hear_queries, i))
    for layer in dit.layers:
        await_attention(layer.attn2.to_q, lambda weights: tape.maps[-1].append(weights.mean(0)))
    hooks += [pipe.model.llm.register_forward_hook(tape.hear_condition),
              dit.register_forward_pre_hook(lambda *_: tape.maps.append([])),
              dit.register_forward_hook(tape.hear_step)]
    if not pipe.model.config.latents:
        hooks.append(pipe.decoder.unet.register_forward_hook(tape.hear_noise))
    F.scaled_dot_product_attention = listening
    try:
        yield tape
    finally:
        F.scaled_dot_product_attention = attend
        for hook in hooks:
            hook.remove()


# ---- from what was heard to what a page shows -------------------------------------------------------------

def spread(count, most):
    """At most so many of range(count), evenly spread, the first and the last among them."""
    return torch.linspace(0, count - 1, min(count, most)).round().long().tolist()


def packed(weights):
    """Numbers in [0, 1] of any shape -> base64 of a byte each, 255 sqrt(w): small ones keep their digits."""
    return base64.b64encode((weights.clamp(0, 1).sqrt() * 255).round().byte().numpy().tobytes()).decode()


def picture(pixels, most):
    """Pixels (3, H, W) in [0, 1] as the address of a PNG inside the page, its sides reduced to `most`."""
    image, buffer = Image.fromarray(to_uint8(pixels)), BytesIO()
    image.thumbnail((most, most), Image.LANCZOS)
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def where(function, snippet):
    """A line of a function's code that holds a snippet: {"place": file:line, "name", "code"}."""
    function = inspect.unwrap(function)
    lines, first = inspect.getsourcelines(function)
    number = next(i for i, line in enumerate(lines) if snippet in line)
    code, place = lines[number].partition("  # ")[0].strip(), Path(inspect.getsourcefile(function)).name
    return {"place": f"{place}:{first + number}", "name": function.__qualname__, "code": code}


def token_texts(tokenizer, ids, n):
    """What the language model reads: the prompt's tokens, [IMG] and n queries, as {"text", "kind"}."""
    texts = [{"text": tokenizer.names[i], "kind": "control"} if i in tokenizer.names
             else {"text": tokenizer.decode([i]), "kind": "text"} for i in ids]
    queries = [{"text": f"q{i}", "kind": "query"} for i in range(1, n + 1)]
    return [*texts, {"text": "[IMG]", "kind": "control"}, *queries]


def attention_panel(tape, length, n):
    """The queries' attention to `length` tokens and to each other in up to LAYERS layers: the mean of all
    heads, then up to HEADS of them. Padding is left out."""
    names = spread(len(tape.layers), LAYERS)
    heads = [tape.layers[i].reshape(-1, n, tape.layers[i].shape[-1]) for i in names]    # (heads, n, keys)
    heads = torch.stack([torch.cat([each.mean(0, keepdim=True), each[:HEADS]]) for each in heads])
    weights = torch.cat([heads[..., :length], heads[..., -n:]], dim=-1)
    return {"layers": [i + 1 for i in names], "heads": weights.shape[1], "weights": packed(weights)}


def frames_panel(pipe, tape, decode):
    """The way from noise: {"t", "state", "prediction", "velocity", "pull"} of each frame, and its maps.
    decode: features (B, N, C) -> pixels (B, 3, H, W)."""
    x, v = torch.stack(tape.states), torch.stack(tape.velocities)                   # (steps, C, grid, grid)
    steps = len(x)
    t = timesteps(steps, pipe.model.config.shift)                                   # (steps + 1,)
    predictions = x + (1 - t[:-1]).view(-1, 1, 1, 1) * v
    x, predictions = (torch.cat([y, predictions[-1:]]) for y in (x, predictions))   # its end is the result
    side = pipe.image_size()[0] if not pipe.model.config.latents else 0
    chosen = spread(steps + 1, LARGE_FRAMES if side > LARGE else FRAMES)
    pixels = decode(torch.cat([x[chosen], predictions[chosen]]).flatten(2).transpose(1, 2))
    states, results = map(list, pixels.chunk(2))
    frames = [{"step": i, "t": float(t[i]), "state": picture(a, PIXELS), "prediction": picture(b, PIXELS),
               "velocity": rms(tape.velocities[min(i, steps - 1)]), "pull": tape.pulls[min(i, steps - 1)]}
              for i, a, b in zip(chosen, states, results)]
    maps = torch.stack([torch.stack(tape.maps[min(i, steps - 1)]).mean(0).T for i in chosen])  # (F, n, N)
    return {"steps": steps, "frames": frames, "maps": packed(maps), "side": math.isqrt(maps.shape[-1])}


@torch.no_grad()
def decoder_panel(pipe, tape):
    """The UNet's way from noise to latents: {"step", "sigma", "state", "prediction"} of each frame."""
    steps, vae, frames = len(tape.latents), pipe.decoder.vae, []
    names = pipe.sampling["decoder_sampler"], pipe.sampling["decoder_spacing"]
    sigmas = pipe.decoder.schedule.with_steps(steps, *names).sigmas if steps else []
    for i in spread(steps, LARGE_FRAMES if pipe.image_size()[0] > LARGE else FRAMES) if steps else []:
        sigma, z = float(sigmas[i]), tape.latents[i]                                # (4, h, w), variance 1
        clean = (sigma ** 2 + 1) ** 0.5 * z - sigma * tape.noises[i]                # the predicted result
        pixels = [(vae.decode(y[None].to(pipe.device)) / 2 + 0.5).clamp(0, 1)[0] for y in (z, clean)]
        state, prediction = (picture(each, PIXELS) for each in pixels)
        frames.append({"step": i + 1, "sigma": sigma, "state": state, "prediction": prediction})
    return {"steps": steps, "frames": frames}


# ---- the page ---------------------------------------------------------------------------------------------

def explain_page(pipe, prompt, seed, about, **sampling):
    """The page (a string of HTML) about the image of one prompt and seed, and that image (3, H, W).

    about: the settings, a JSON string that the page keeps; sampling: as Pipeline.images takes it.
    Raises ValueError for a model without DiT.
    """
    if pipe.model.dit is None:
        raise ValueError(f"the model in {pipe.folder} has no DiT: there is no way from noise to explain")
    text = pipe.final_prompts([prompt], [seed], None, sampling.get("upsample"))[0]    # it is kept
    scales = [pipe.setting("cfg", sampling.get("guidance")),
              pipe.setting("decoder_cfg", sampling.get("decoder_guidance"))]
    with record(pipe, *scales) as tape:
        image = pipe.images([prompt], [seed], **sampling)[0]
    decode = partial(decode_states, pipe, seed, sampling)
    (ids,), _ = pipe.prompt_rows([text])
    n, condition = len(tape.condition), F.normalize(tape.condition, dim=-1)
    panels = {name: {"title": title, "says": says, **where(function(pipe), snippet)}
              for name, (title, says, function, snippet) in PANELS.items()}
    run = {"prompt": prompt, "upsampled": None if text == prompt else text, "about": json.loads(about),
           "n": n, "panels": panels, "tokens": token_texts(pipe.tokenizer, ids, n),
           "attention": attention_panel(tape, len(ids) + 1, n),
           "similarity": packed((condition @ condition.T + 1) / 2),
           "flow": frames_panel(pipe, tape, decode), "decoder": decoder_panel(pipe, tape),
           "guided": scales[0] not in (0, 1), "image": picture(image, RESULT)}
    script = json.dumps(run).replace("<", "\\u003c")                     # no text may end the page's script
    texts = {"/*RUN*/": script, "ABOUT": html.escape(about)}
    return re.sub(r"ABOUT|/\*RUN\*/", lambda match: texts[match[0]], PAGE.read_text("utf-8")), image
