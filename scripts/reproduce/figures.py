"""Result files -> the figures of the README, without any training."""

from common.record import FIGURES, RESULTS, read_json
from gradinit import gradinit_images, gradinit_post_norm
from optim import optimizers
from pruning import pruning_curve
from rezero import convergence, deep_without_warmup, depth, enwik8_prefix, fully_connected, growing, jacobian, resnets


# figure -> its result file, and what draws it
DRAWN = {
    "enwik8_prefix": ("enwik8_prefix", enwik8_prefix.draw),
    "convergence": ("convergence", convergence.draw),
    "convergence_articles": ("convergence_articles", convergence.draw),
    "depth": ("depth", depth.draw),
    "deep_without_warmup": ("deep_without_warmup", deep_without_warmup.draw),
    "optimizers": ("optimizers", optimizers.draw),
    "optimizers_gradient_distribution": ("optimizers", optimizers.draw_first_steps),
    "gradinit_post_norm": ("gradinit_post_norm", gradinit_post_norm.draw),
    "gradinit_variance": ("gradinit_images", gradinit_images.draw_variance),
    "gradinit_scales": ("gradinit_images", gradinit_images.draw_scales),
    "fully_connected": ("fully_connected", fully_connected.draw),
    "resnets": ("resnets", resnets.draw),
    "growing": ("growing", growing.draw),
    "jacobian": ("jacobian", jacobian.draw),
    "pruning_curve": ("pruning_curve", pruning_curve.draw),
}


if __name__ == "__main__":
    for name, (source, draw) in DRAWN.items():
        draw(read_json(RESULTS / f"{source}.json"), FIGURES / f"{name}.png")
