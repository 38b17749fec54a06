"""Small models of every family that has a rule, in float64 with nothing left at its initial 0 or 1."""

from functools import partial

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaForMaskedLM,
)

from hf_rezero import (
    ReZeroConfig,
    ReZeroForCausalLM,
    ReZeroMLPConfig,
    ReZeroMLPForImageClassification,
    ReZeroResNetConfig,
    ReZeroResNetForImageClassification,
)


def rezero(**config):
    sizes = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    return ReZeroForCausalLM(ReZeroConfig(**(sizes | config)))


def rezero_gqa():
    return rezero(num_key_value_heads=2, attention_bias=True, mlp_bias=True)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=264, n_embd=32, n_layer=3, n_head=4))


def llama():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=264, **sizes, num_attention_heads=4, num_key_value_heads=2))


def bert(config_class=BertConfig, model_class=BertForMaskedLM):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return model_class(config_class(vocab_size=264, **sizes))


def roberta():
    return bert(RobertaConfig, RobertaForMaskedLM)


def distilbert():
    return DistilBertForMaskedLM(DistilBertConfig(vocab_size=264, dim=32, hidden_dim=48, n_layers=2, n_heads=4))


def seed_net(width=8):
    """The net of the seed article: four convolutions, two fully connected layers; sigmoid(0) is not 0."""
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.Sigmoid()),
        *(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(width, width, 3, padding=1), nn.GELU()),
        *(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.5), nn.Linear(width * 4, 10), nn.ReLU(), nn.Linear(10, 4)),
    )


def resnet(layer_type="basic"):
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [3, 3]}
    return ResNetForImageClassification(ResNetConfig(**sizes, layer_type=layer_type))


def bottleneck_resnet():
    return resnet("bottleneck")


class PreActivationBlock(nn.Module):
    """The other order of norm and convolution, with the names of the usual one."""

    def __init__(self, width=8):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        inner = self.conv1(self.bn1(x).relu())
        return x + self.conv2(self.bn2(inner).relu())


def residual_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), PreActivationBlock(), PreActivationBlock(), nn.Flatten(), nn.LazyLinear(4)
    )


def rezero_resnet(**config):
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [3, 2], "num_labels": 4}
    return ReZeroResNetForImageClassification(ReZeroResNetConfig(**sizes | config))


def rezero_bottleneck():
    return rezero_resnet(
        layer_type="bottleneck", hidden_sizes=[16, 32], activation_position="pre", shortcut_type="projection"
    )


def plain_resnet():
    return rezero_resnet(activation_position="sum", resweight_init=1, resweight_trainable=False)


def rezero_mlp(**config):
    sizes = {"image_size": 8, "hidden_size": 12, "num_hidden_layers": 5, "num_labels": 4}
    return ReZeroMLPForImageClassification(ReZeroMLPConfig(**sizes | config))


SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
GROUPED = {**SIZES, **SPECIAL, "num_key_value_heads": 2}
OPT = {"vocab_size": 264, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
T5 = {
    "vocab_size": 264,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 4,
    "num_decoder_layers": 3,
    "num_heads": 4,
}
TWO_STACKS = {
    **{"vocab_size": 264, "d_model": 32, "encoder_layers": 4, "decoder_layers": 3, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40},
}
# families of transformers: the Auto class, the model type, the config
STOCK = {
    "mistral": (AutoModelForCausalLM, "mistral", GROUPED),
    "qwen2": (AutoModelForCausalLM, "qwen2", GROUPED),
    "qwen3": (AutoModelForCausalLM, "qwen3", {**GROUPED, "head_dim": 8}),
    "gemma": (AutoModelForCausalLM, "gemma", {**GROUPED, "head_dim": 8}),
    "gemma2": (AutoModelForCausalLM, "gemma2", {**GROUPED, "head_dim": 8}),
    "gemma3": (AutoModelForCausalLM, "gemma3_text", {**GROUPED, "head_dim": 8}),
    "phi": (AutoModelForCausalLM, "phi", {**SIZES, **SPECIAL}),
    "phi3": (AutoModelForCausalLM, "phi3", GROUPED),
    "opt": (AutoModelForCausalLM, "opt", {**OPT, **SPECIAL, "word_embed_proj_dim": 32}),
    "opt_post_norm": (
        AutoModelForCausalLM,
        "opt",
        {**OPT, **SPECIAL, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    ),
    "gpt_neox": (AutoModelForCausalLM, "gpt_neox", {**SIZES, **SPECIAL}),
    "gpt_neox_sequential": (AutoModelForCausalLM, "gpt_neox", {**SIZES, **SPECIAL, "use_parallel_residual": False}),
    "modernbert": (
        AutoModelForMaskedLM,
        "modernbert",
        {**SIZES, **SPECIAL, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 4},
    ),
    "t5": (AutoModelForSeq2SeqLM, "t5", {**T5, **SPECIAL}),
    "t5_gated": (AutoModelForSeq2SeqLM, "t5", {**T5, **SPECIAL, "feed_forward_proj": "gated-gelu"}),
    "bart": (AutoModelForSeq2SeqLM, "bart", {**TWO_STACKS, **SPECIAL}),
    "whisper": (
        AutoModelForSpeechSeq2Seq,
        "whisper",
        {**TWO_STACKS, **SPECIAL, "num_mel_bins": 6, "max_source_positions": 7},
    ),
    "vit": (AutoModelForImageClassification, "vit", {**SIZES, "image_size": 8, "patch_size": 4, "num_labels": 4}),
}
AUTO = {
    **dict.fromkeys(("gpt2", "llama"), AutoModelForCausalLM),
    **dict.fromkeys(("bert", "roberta", "distilbert"), AutoModelForMaskedLM),
    **{name: auto_class for name, (auto_class, *_) in STOCK.items()},
}


def stock(name):
    """A model of `STOCK`, with matrices that are large enough for what is removed to be missed."""
    auto_class, model_type, config = STOCK[name]
    model = auto_class.from_config(AutoConfig.for_model(model_type, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return model


REZERO_IMAGE = {f.__name__: f for f in (rezero_resnet, rezero_bottleneck, plain_resnet, rezero_mlp)}
TEXT = {f.__name__: f for f in (rezero, rezero_gqa, gpt2, llama, bert, roberta, distilbert)}
TEXT |= {name: partial(stock, name) for name in STOCK if name not in ("vit", "whisper")}
OTHERS = {name: partial(stock, name) for name in ("vit", "whisper")}  # a Transformer that reads pictures, or sound
FAMILIES = {name: (TEXT | OTHERS)[name] for name in AUTO}  # of Transformers, all that transformers has itself
IMAGE = {f.__name__: f for f in (seed_net, resnet, bottleneck_resnet, residual_net)} | REZERO_IMAGE
WITH_UNITS = [*TEXT, *(name for name in IMAGE if name != "rezero_mlp")]  # a fully connected net has whole layers only


def build(name, dtype=torch.float64, seed=0):
    """The model in eval mode, and an input for it."""
    torch.manual_seed(seed)
    model = (TEXT | OTHERS | IMAGE)[name]()
    picture, ids = torch.randn(2, 3, 8, 8).to(dtype), torch.randint(0, 256, (2, 12))
    if name == "residual_net":
        model(picture.float())
    return stir(model.to(dtype)), ids_or_picture(name, ids, picture)


def ids_or_picture(name, ids, picture):
    decoder = {"decoder_input_ids": ids.flip(1)} if name in ("whisper", "bart", "t5", "t5_gated") else {}
    if name == "whisper":
        return {"input_features": picture.flatten(1)[:, :84].view(2, 6, 14), **decoder}
    if name in TEXT:
        return {"input_ids": ids, **decoder}
    return {"pixel_values": picture} if name in REZERO_IMAGE or name == "vit" or "resnet" in name else picture


@torch.no_grad()
def stir(model):
    """No resweight at 0, no bias at 0, no norm at (0, 1): values at which everything is equal."""
    for name, parameter in model.named_parameters():
        if name.endswith("resweight"):
            parameter.fill_(0.5)
        elif parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.add_(0.3 * torch.rand_like(buffer))
    return model.eval()


@torch.no_grad()
def set_masks(masks, closed=0.4, seed=0):
    """Random L1 factors, some 0, in each group the last one and not the first."""
    generator = torch.Generator().manual_seed(seed)
    mask = masks.layer.mask
    mask.copy_(torch.rand(mask.shape, generator=generator) + 0.3)
    mask[torch.rand(mask.shape, generator=generator) < closed] = 0.0
    for part in masks.split(mask).values():
        part[-1], part[0] = 0.0, 0.7
