"""Further views of what `sample.py` generates: `--steps-strip` and `--steps-gif` show an image on its way
from noise, `--contact-sheet` all that a model does with one prompt."""
import json
import sys

import numpy as np
import torch
from PIL import Image

import data
from checkpoint import atomic_write
from evals import report
from sample import LEAST, image_grid, prompts_of, sampling, save_image, settings, slug, to_uint8, unused_path

FRAMES, GIF_FRAMES, CELL_FRAMES = 8, 12, 4                   # of a strip, a GIF and a contact sheet
GIF_COLOURS = 48                    # of small images, which need no more
GIF_PAUSE, GIF_END = 180, 2500      # milliseconds of a frame and of the last one
CHANGE = "make the background {}"   # to what it isn't yet


def decode_states(pipe, seed, sampling, features):
    """Features (B, n, C) on the way of one image -> pixels (B, 3, H, W) in [0, 1], each as Pipeline.images
    would decode it. sampling: see `cells`."""
    seeds, guidance, negative = [seed] * len(features), sampling.get("decoder_guidance"), None
    if pipe.guides_decoder(guidance):
        negative = pipe.negative(seeds, sampling.get("steps"), sampling.get("guidance"))
    return pipe.pixels(features.to(pipe.device), seeds, sampling.get("decoder_steps"), guidance,
                       sampling.get("size"), negative)


def steps_strip(pipe, args):
    """--steps-strip: the way of one image from noise, FRAMES of its steps from left to right.

    Upper row: what the decoder makes of the state x_t itself. Lower row: of the data that the DiT predicts
    from there. The decoder's own noise is the same in all of them.
    """
    states, predictions = pipe.trajectory(args.prompt, args.seed, args.steps, args.cfg, args.upsample)
    frames = torch.linspace(0, len(states) - 1, min(FRAMES, len(states))).round().long()
    features = torch.cat([states[frames], predictions[frames]])                          # (2 FRAMES, 64, C)
    pixels = decode_states(pipe, args.seed, sampling(args), features)
    about = {**settings(pipe, args), "frames": len(frames)}
    name = f"{slug(args.prompt)}-seed{args.seed}-steps"
    save_image(image_grid(pixels, len(frames)), args.out, name, about)
    print(f"left to right: after {', '.join(map(str, frames.tolist()))} steps; upper row: the state itself, "
          "lower row: the predicted final image", file=sys.stderr)


def steps_gif(pipe, args):
    """--steps-gif: from noise to image as an animation, an image of each prompt side by side.

    What the decoder makes of the state x_t itself, as in the upper row of --steps-strip.
    """
    prompts = prompts_of(args)
    states = [pipe.trajectory(prompt, args.seed, args.steps, args.cfg, args.upsample)[0]
              for prompt in prompts]
    time = torch.linspace(0, 1, GIF_FRAMES)
    chosen = ((len(states[0]) - 1) * (2 - time) * time).round().long().unique()    # most happens at the end
    features = torch.stack(states, 1)[chosen].flatten(0, 1)                 # (frames prompts, 64, C)
    pixels = decode_states(pipe, args.seed, sampling(args), features)
    rows = [to_uint8(image_grid(row, len(prompts), LEAST)) for row in pixels.split(len(prompts))]
    colours = GIF_COLOURS if pixels.shape[-1] < LEAST else 256
    film = Image.fromarray(np.concatenate(rows))                                    # one palette for all
    film = film.quantize(colours, kmeans=3, dither=Image.Dither.NONE)               # rare colours count, too
    frames = [film.crop((0, i * len(row), film.width, (i + 1) * len(row))) for i, row in enumerate(rows)]
    about = json.dumps({**settings(pipe, args), "frames": len(frames)})
    more = f"-and-{len(prompts) - 1}-more" * (len(prompts) > 1)
    path = unused_path(args.out, f"{slug(prompts[0])}{more}-seed{args.seed}-steps.gif", about)
    with atomic_write(path) as temporary:
        frames[0].save(temporary, "GIF", save_all=True, append_images=frames[1:], loop=0, comment=about,
                       duration=[*[GIF_PAUSE] * (len(frames) - 1), GIF_END])
    print(path, flush=True)


def contact_sheet(pipe, args):
    """--contact-sheet: what the model generates from a prompt, and what else it does with that image."""
    labels, images = zip(*cells(pipe, args.prompt, args.seed, sampling(args)))
    image = np.array(report.contact_sheet(images, labels, [None] * len(images), 4, LEAST))
    name = f"{slug(args.prompt)}-seed{args.seed}-sheet"
    save_image(torch.from_numpy(image).permute(2, 0, 1) / 255, args.out, name, settings(pipe, args))


def cells(pipe, prompt, seed, sampling):
    """Yield (label, uint8 image (H, W, 3)) of each cell of a contact sheet. sampling: steps, guidance,
    decoder_steps, decoder_guidance, size and upsample, as Pipeline.images takes them. Models without a
    vision tower neither read nor change images."""
    pixels = pipe.images([prompt], [seed], **sampling)
    (image,) = to_uint8(pixels)
    (text,) = pipe.final_prompts([prompt], [seed], None, sampling["upsample"])
    said = f"generated from: {prompt}" + f", upsampled to: {text}" * (text != prompt)
    yield said, image
    if not pipe.model.config.latents and pipe.model.dit is not None:
        states, _ = pipe.trajectory(prompt, seed, *map(sampling.get, ("steps", "guidance", "upsample")))
        time = torch.arange(CELL_FRAMES) / CELL_FRAMES                         # most happens at the end
        chosen = ((len(states) - 1) * (2 - time) * time).long()
        frames = decode_states(pipe, seed, sampling, states[chosen])
        for step, frame in zip(chosen.tolist(), to_uint8(frames)):
            yield f"the same after {step} of {len(states) - 1} steps", frame
    shown = Image.fromarray(image)
    if pipe.model.visual is not None:
        change = CHANGE.format("black" if image[0].mean() > 127 else "white")
        yield f"changed: {change}", to_uint8(pipe.images([change], [seed], images=[shown], **sampling))[0]
        yield f"{data.DESCRIBE} {pipe.answer(shown, data.DESCRIBE)}", image
    if not pipe.model.config.latents:
        again = pipe.reconstruct([shown], [seed], sampling["decoder_steps"], sampling["decoder_guidance"])
        yield "through its features and back", to_uint8(again)[0]
