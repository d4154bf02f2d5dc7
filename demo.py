"""A page to play with a model, on http://127.0.0.1:7860: `python demo.py --ckpt FOLDER` (or weights/nano).

Other flags are those of `sample.py --reconstruct`. Nothing is loaded from the network, or reported to it."""
import html
import os
import re
import sys
from functools import partial

import sample
from checkpoint import Interval, Parser, number, parse_json, run_command, sentence
from data import load_image

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}      # read by gradio's import
try:
    import gradio as gr
except ImportError:
    gr = None

UNSAID = re.compile(r"(argument )?--|\S*[/\\][0-9a-f]{64}[/\\]")    # flags' dashes, an upload's folder
RUN = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}


def attempt(action, *inputs):
    """action(*inputs); a mistake becomes one sentence on the page, on which all else stays as it is."""
    try:
        return action(*inputs)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        gr.Warning(html.escape(UNSAID.sub("", sentence(error)), quote=False), title="That didn't work")
        return gr.skip()


class Page:
    """What the buttons do. flags: of sample.py, for all tabs. Everything raises ValueError for mistakes."""

    def __init__(self, flags):
        self.flags = flags
        self.args = a = self.read("--reconstruct", image="-")
        self.pipe = sample.open_pipeline(a)

    def read(self, *words, **said):
        """The arguments of sample.py for what the page says."""
        said = [f"--{name}={'' if value is None else value}" for name, value in said.items()]
        return sample.parse([*self.flags, *words, *said])[1]

    def with_origin(self, file):
        """(the file of an image, what it was generated from: its prompt, upsampled if so, and its seed)."""
        about = parse_json(sample.made_from(file), file)
        images = [load_image(about["image"])] if "image" in about else None
        prompt, = self.pipe.final_prompts([about["prompt"]], [about["seed"]], images, None)
        return file, f"{prompt} (seed {about['seed']})"

    def generate(self, prompt, seed, steps, *image):
        """A prompt, and for an edit a file -> the file of the result, and what it was generated from."""
        edit = dict(zip(["image"], image))
        args = self.read(*["--draw"] * len(edit), prompt=prompt, seed=seed, steps=steps, **edit)
        for text in () if image else filter(None, self.pipe.declined([prompt])):
            gr.Warning(html.escape(text, quote=False), title="The model knows no such image")
        return self.with_origin(sample.draw(self.pipe, args))

    def reconstruct(self, seed, image):
        """The file of an image -> what its 64 features keep of it, uint8 (H, W, 3)."""
        args = self.read("--reconstruct", seed=seed, image=image)
        given = [load_image(image)], [args.seed], args.decoder_steps, args.decoder_cfg
        return sample.to_uint8(sample.image_grid(self.pipe.reconstruct(*given)))

    def talk(self, command, message, shown, chat, seed, steps):
        """A message {"text", "files"}, a sample.Chat or None -> what to show, the Chat, an empty message."""
        text, files, args = message["text"], message["files"], self.read("--chat", seed=seed, steps=steps)
        chat = chat or sample.Chat(self.pipe, args)
        chat.args, before = args, chat.generated
        chat.last = files[-1] if command and files and load_image(files[-1]) else chat.last
        words = [command] if command else [f'@"{file}"' for file in files]
        chat.read(" ".join([*words, text.replace("@", "\N{WORD JOINER}@")]))    # which opens no file here
        said = [*({"path": file} for file in files), *[text] * bool(text.strip())]
        file, origin = self.with_origin(chat.last) if chat.generated > before else (None, None)
        answers = [{"path": file}, origin] if file else [answer for _, answer in chat.turns[-1:] if said]
        shown = shown + [{"role": "user", "content": each} for each in said]
        return shown + [{"role": "assistant", "content": each} for each in answers], chat, None


def build(page):
    """The gr.Blocks of a Page."""
    with gr.Blocks(title="nano BLIP3-o") as blocks:
        seed, steps = gr.Number(0, label="Seed"), gr.Number(page.pipe.setting("steps"), label="Steps")
        with gr.Tab("Chat"):
            log, chat = gr.Chatbot(label="Conversation", render_markdown=False, buttons=[]), gr.State()
            message = gr.MultimodalTextbox(file_count="multiple", file_types=["image"], show_label=False)
            inputs, outputs = [message, log, chat, seed, steps], [log, chat, message]
            message.submit(partial(attempt, page.talk, ""), inputs, outputs, **RUN)
            for name, command in {"Generate it": "/image", "Edit the image": "/edit"}.items():
                button = gr.Button(name, visible=not page.pipe.requests)        # else the model decides
                button.click(partial(attempt, page.talk, command), inputs, outputs, **RUN)
            gr.Button("New conversation").click(lambda: ([], None, None), None, outputs, **RUN)
        for name in ("Generate", "Edit", "Reconstruct"):
            with gr.Tab(name):
                images = [gr.Image(type="filepath", label="Image")] if name != "Generate" else []
                for image in images:                    # sample.py opens it, and says what is wrong with it
                    image.preprocess = lambda upload: upload and upload.path
                texts = [gr.Textbox(label="Prompt")] if name != "Reconstruct" else []
                button, results = gr.Button(name), [gr.Image(label="Result", buttons=["download"])]
                results += [gr.Textbox(label="Generated from") for _ in texts]
                action, numbers = (page.generate, [seed, steps]) if texts else (page.reconstruct, [seed])
                button.click(partial(attempt, action), [*texts, *numbers, *images], results, **RUN)
    return blocks


def serve(argv=None):
    """Show the page until Ctrl-C; ValueError for flags that make no sense."""
    parser = Parser("demo.py", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=number(int, Interval(1, 65535)), default=7860)
    args, flags = parser.parse_known_args(argv)
    if gr is None:
        raise ValueError("the page needs Gradio: pip install -r requirements-demo.txt")
    build(page := Page(flags)).launch(server_name=args.host, server_port=args.port, share=False,
                                      footer_links=[], ssr_mode=False, allowed_paths=[page.args.out])


if __name__ == "__main__":
    sys.exit(run_command("demo.py", serve))
