"""The equations in plain torch, written without the library."""

import math

import torch


def rotary(x, theta=10_000.0):
    """Turn the feature pairs (i, i + E/2) of x (B, H, T, E) by t * theta^(-2i/E), as complex numbers."""
    length, half = x.shape[2], x.shape[3] // 2
    angles = torch.outer(torch.arange(length).double(), theta ** -(torch.arange(half).double() / half))
    z = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((z.real, z.imag), -1).to(x.dtype)


def sinusoidal(length, size):
    """Vaswani et al. 2017: sin(t / 10000^(2i/D)) at feature 2i, cos at 2i + 1."""
    code = torch.zeros(length, size)
    for t in range(length):
        for i in range(0, size, 2):
            code[t, i] = math.sin(t / 10_000 ** (i / size))
            code[t, i + 1] = math.cos(t / 10_000 ** (i / size))
    return code


def attention(w, prefix, x, memory, heads, causal, rotate):
    """Multi-head attention by one softmax per head and query, with grouped key/value heads."""

    def project(name, source):
        y = source @ w[f"{prefix}.{name}.weight"].T
        y = y + w.get(f"{prefix}.{name}.bias", 0)
        return y

    q, k, v = project("q_proj", x), project("k_proj", memory), project("v_proj", memory)
    size = q.shape[-1] // heads
    q, k, v = (y.unflatten(-1, (-1, size)).transpose(1, 2) for y in (q, k, v))
    if rotate:
        q, k = rotary(q), rotary(k)
    groups = heads // k.shape[1]
    out = torch.empty_like(q)
    for head in range(heads):
        scores = q[:, head] @ k[:, head // groups].transpose(1, 2) / math.sqrt(size)
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
        out[:, head] = scores.softmax(-1) @ v[:, head // groups]
    return project("o_proj", out.transpose(1, 2).flatten(2))


def norm(w, prefix, x, kind, eps=1e-5):
    """LayerNorm, RMSNorm or dynamic tanh by their definitions."""
    if kind == "dyt":
        return w[f"{prefix}.weight"] * torch.tanh(w[f"{prefix}.alpha"] * x) + w[f"{prefix}.bias"]
    if kind == "layernorm":
        centered = x - x.mean(-1, keepdim=True)
        scaled = centered / (centered.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return scaled * w[f"{prefix}.weight"] + w[f"{prefix}.bias"]
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w[f"{prefix}.weight"]


def connect(w, layer, name, x, branch, config):
    """The rows of the paper's Table 1."""
    gate = "layer" if config.resweight_sharing == "layer" else name
    resweight = w[f"{layer}.residuals.{gate}.resweight"]
    skip = 1 if config.skip_connection else 0
    n = lambda y: norm(w, f"{layer}.norms.{name}", y, config.norm_type)  # noqa: E731
    if config.norm_position == "none":
        return skip * x + resweight * branch(x)
    if config.norm_position == "pre":
        return skip * x + resweight * branch(n(x))
    if config.norm_position == "post":
        return n(skip * x + resweight * branch(x))
    return skip * x + resweight * n(branch(x))


def rezero_logits(w, config, ids, memory=None):
    """Logits of the language model from its state dict `w`."""
    acts = {
        "gelu": lambda y: y * (1 + torch.erf(y / 2**0.5)) / 2,
        "gelu_pytorch_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
        "relu": torch.relu,
    }
    x = w["model.embed_tokens.weight"][ids]
    if config.tie_word_embeddings:
        x = x * config.embedding_std / config.initializer_range
    if config.position_embedding_type == "learned":
        x = x + w["model.embed_positions.weight"][: ids.shape[1]]
    elif config.position_embedding_type == "sinusoidal":
        x = x + sinusoidal(ids.shape[1], config.hidden_size)
    rotate = config.position_embedding_type == "rotary"
    for i in range(config.num_hidden_layers):
        layer, heads = f"model.layers.{i}", config.num_attention_heads

        def self_attn(y, layer=layer, heads=heads):
            return attention(w, f"{layer}.self_attn", y, y, heads, config.is_causal, rotate)

        def cross_attn(y, layer=layer, heads=heads):
            return attention(w, f"{layer}.cross_attn", y, memory, heads, False, False)

        def mlp(y, layer=layer):
            hidden = y @ w[f"{layer}.mlp.up_proj.weight"].T + w.get(f"{layer}.mlp.up_proj.bias", 0)
            hidden = acts[config.hidden_act](hidden)
            return hidden @ w[f"{layer}.mlp.down_proj.weight"].T + w.get(f"{layer}.mlp.down_proj.bias", 0)

        x = connect(w, layer, "self_attn", x, self_attn, config)
        if memory is not None:
            x = connect(w, layer, "cross_attn", x, cross_attn, config)
        x = connect(w, layer, "mlp", x, mlp, config)
    if config.final_norm:
        x = norm(w, "model.norm", x, config.norm_type)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return x @ w[head].T
