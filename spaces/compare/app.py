"""A ReZero net and a net of the same size with norms: what of the input reaches the output, and how both learn.

pip install -r requirements.txt
python app.py
"""

import io
import math
from collections.abc import Iterator

import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_rezero import ReZeroConfig, ReZeroForCausalLM, jacobian_spectrum, load_corpus, param_groups
from hf_rezero.data import ByteDataset, collate_bytes
from hf_rezero.picture import HEIGHT, WIDTH, Picture, in_look, label_lines
from hf_rezero.plots import plot_jacobian


NORMS = {"post-norm, N(x + F(x))": "post", "pre-norm, x + F(N(x))": "pre"}
INTRODUCTION = """# ReZero beside norms

**ReZero** computes x + w F(x) in each layer, with a learned w that starts at 0. The other net has a LayerNorm instead and is the same
otherwise. Choose a depth and compare. Everything is computed while you wait, on a CPU: byte models of width 32, trained on the source
code of Python with AdamW, without warmup."""


def models(layers: int, norm: str) -> dict[str, ReZeroForCausalLM]:
    """Two byte models that differ in gates and norms alone."""
    shape = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    without_gates = {"resweight_init": 1.0, "resweight_trainable": False}
    torch.manual_seed(0)
    gated = ReZeroForCausalLM(ReZeroConfig(**shape))
    torch.manual_seed(0)
    normed = ReZeroForCausalLM(ReZeroConfig(**shape, **without_gates, norm_position=NORMS[norm]))
    return {"ReZero": gated, norm.partition(",")[0]: normed}


def compare_at_start(layers: int, norm: str) -> tuple[Picture, str]:
    """The singular values of the Jacobians before training, as a picture and in a sentence."""
    ids = torch.randint(0, 256, (1, 4), generator=torch.Generator().manual_seed(0))
    spectra = {name: jacobian_spectrum(model, {"input_ids": ids})[0] for name, model in models(layers, norm).items()}
    picture = plot_jacobian({f"{layers} layers": {name: sigma.tolist() for name, sigma in spectra.items()}})
    told = [f"**{name}**: the median singular value is {sigma.median():.2g}" for name, sigma in spectra.items()]
    return picture, "; ".join(told) + ". Signals pass through a deep net where they are near 1."


def compare_training(layers: int, norm: str, rate: float, steps: int) -> Iterator[tuple[Picture, str]]:
    """The training losses of both so far, in bits per byte, after every tenth step."""
    nets = models(layers, norm)
    optimizers = {name: torch.optim.AdamW(param_groups(net, weight_decay=0.1), lr=rate) for name, net in nets.items()}
    data = ByteDataset(load_corpus("python-stdlib").train, block_size=64)
    order = torch.Generator().manual_seed(0)
    batches = DataLoader(data, batch_size=8, shuffle=True, collate_fn=collate_bytes, generator=order)
    losses: dict[str, list[float]] = {name: [] for name in nets}
    for step, batch in zip(range(1, steps + 1), batches, strict=False):
        for name, net in nets.items():
            losses[name].append(train_step(net, optimizers[name], batch))
        if step % 10 == 0 or step == steps:
            yield draw_losses(losses), tell_losses(nets, losses)


def train_step(net: ReZeroForCausalLM, optimizer: torch.optim.Optimizer, batch: dict) -> float:
    """One step; returns the loss before it in bits per byte."""
    loss = net(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item() / math.log(2)


@in_look
def draw_losses(losses: dict[str, list[float]]) -> Picture:
    """A line for each net: the mean of the last ten losses."""
    picture = Picture(figsize=(WIDTH, HEIGHT))
    axes = picture.subplots()
    for name, values in losses.items():
        means = [sum(values[max(0, i - 9) : i + 1]) / min(i + 1, 10) for i in range(len(values))]
        axes.plot(range(1, len(means) + 1), means, label=name)
    axes.set(xlabel="step", ylabel="training bits per byte, mean of 10 steps")
    label_lines(axes)
    return picture


def tell_losses(nets: dict[str, ReZeroForCausalLM], losses: dict[str, list[float]]) -> str:
    """The sizes and the last losses."""
    told = [
        f"**{name}**, {net.num_parameters():,} parameters: {sum(losses[name][-10:]) / len(losses[name][-10:]):.2f}"
        for name, net in nets.items()
    ]
    return "Bits per byte of the last ten steps. " + "; ".join(told) + ". Single bytes have an entropy of about 5."


def as_image(shown: tuple[Picture, str]) -> tuple[Image.Image, str]:
    """The picture as gradio takes it."""
    return Image.open(io.BytesIO(shown[0].png())), shown[1]


def train_in_images(layers: int, norm: str, rate: float, steps: int) -> Iterator[tuple[Image.Image, str]]:
    """`compare_training` as gradio takes it."""
    yield from map(as_image, compare_training(layers, norm, rate, steps))


def build():
    """The page."""
    import gradio as gr  # only who shows the page needs it

    with gr.Blocks(title="ReZero beside norms") as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            layers = gr.Slider(4, 64, value=32, step=4, label="layers")
            norm = gr.Dropdown(list(NORMS), value=next(iter(NORMS)), label="beside ReZero")
            rate = gr.Slider(1e-3, 1e-2, value=5e-3, step=1e-3, label="learning rate")
            steps = gr.Slider(10, 200, value=60, step=10, label="steps")
        button = gr.Button("Compare", variant="primary")
        with gr.Row():
            with gr.Column():
                gr.Markdown("### Before training")
                spectrum, told = gr.Image(show_label=False), gr.Markdown()
            with gr.Column():
                gr.Markdown("### In training")
                curves, said = gr.Image(show_label=False), gr.Markdown()
        button.click(lambda *values: as_image(compare_at_start(*values)), [layers, norm], [spectrum, told]).then(
            train_in_images, [layers, norm, rate, steps], [curves, said]
        )
    return page


if __name__ == "__main__":
    build().launch()
