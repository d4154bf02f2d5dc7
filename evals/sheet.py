"""`sample.py --contact-sheet`: all that a model does with one prompt, in one image: what is generated, on
its way from noise, changed, described, and sent through its features and back."""
import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import data
from sample import to_uint8

SIDE, GAP, FRAMES = 224, 16, 4          # of a cell in pixels; between cells; of the way from noise
CHANGE = "make the background white"
FONT, LINE = 15, 19                     # pixels of a letter and of a line
LETTERS = 30                            # of a line below a cell


def cells(pipe, prompt, seed, sampling):
    """Yield (label, uint8 image (H, W, 3)) of each cell. sampling: steps, guidance, decoder_steps,
    decoder_guidance, size and upsample, as Pipeline.images takes them. Models without a vision tower neither
    read nor change images."""
    pixels = pipe.images([prompt], [seed], **sampling)
    (image,) = to_uint8(pixels)
    (text,) = pipe.final_prompts([prompt], [seed], None, sampling["upsample"])
    said = f"generated from: {prompt}" + f", upsampled to: {text}" * (text != prompt)
    yield said, image
    if not pipe.model.config.latents and pipe.model.dit is not None:
        states, _ = pipe.trajectory(prompt, seed, *map(sampling.get, ("steps", "guidance", "upsample")))
        time = torch.arange(FRAMES) / FRAMES                         # most happens at the end
        chosen = ((len(states) - 1) * (2 - time) * time).round().long()
        frames = pipe.pixels(states[chosen], [seed] * FRAMES, sampling["decoder_steps"],
                             sampling["decoder_guidance"], sampling["size"])
        for step, frame in zip(chosen.tolist(), to_uint8(frames)):
            yield f"the same after {step} of {len(states) - 1} steps", frame
    shown = Image.fromarray(image)
    if pipe.model.visual is not None:
        yield f"changed: {CHANGE}", to_uint8(pipe.images([CHANGE], [seed], images=[shown], **sampling))[0]
        yield f"{data.DESCRIBE} {pipe.answer(shown, data.DESCRIBE)}", image
    if not pipe.model.config.latents:
        again = pipe.reconstruct([shown], [seed], sampling["decoder_steps"], sampling["decoder_guidance"])
        yield "through its features and back", to_uint8(again)[0]


def contact_sheet(labelled):
    """[(label, uint8 image (H, W, 3))] -> a PIL image of all, four in a row, labels below."""
    labels = [textwrap.wrap(data.printable(label), LETTERS) for label, _ in labelled]
    height = SIDE + GAP + LINE * max(map(len, labels))
    rows = -(-len(labelled) // 4)
    sheet = Image.new("RGB", (4 * (SIDE + GAP) + GAP, rows * height + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT)
    for i, ((_, image), lines) in enumerate(zip(labelled, labels)):
        x, y = GAP + i % 4 * (SIDE + GAP), GAP + i // 4 * height
        small = max(image.shape) < SIDE
        cell = Image.fromarray(np.asarray(image)).resize((SIDE, SIDE), Image.NEAREST if small else Image.BOX)
        sheet.paste(cell, (x, y))
        pen.multiline_text((x, y + SIDE + 4), "\n".join(lines), "black", font, spacing=4)
    return sheet
