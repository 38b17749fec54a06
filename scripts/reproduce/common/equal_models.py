"""Language models of equal dimensions, and what is timed of them: the arms of every comparison of speed."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_rezero import ReZeroConfig, ReZeroForCausalLM, fold_resweight_


VOCABULARY = 264
# layers, width, heads, tokens, batch of training, batch of inference
CASES = {
    "12 x 512": (12, 512, 8, 512, 2, 1),
    "64 x 256": (64, 256, 4, 128, 4, 1),
    "128 x 256": (128, 256, 4, 128, 4, 1),
    "128 x 64": (128, 64, 4, 128, 4, 2),
}


class TorchEncoder(nn.Module):
    """nn.TransformerEncoder, pre-norm and causal, as a language model."""

    def __init__(self, layers: int, width: int, heads: int, tokens: int):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.embed, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(tokens, width)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
        x = self.embed(input_ids) + self.positions.weight[: input_ids.shape[1]]
        return self.head(self.layers(x, mask, is_causal=True))


def builders(layers: int, width: int, heads: int, tokens: int) -> dict[str, Callable[[], nn.Module]]:
    """The models, none of them built yet."""
    gpt2 = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": tokens, "vocab_size": VOCABULARY}
    gpt2 |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) | {"bos_token_id": 0, "eos_token_id": None}
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"max_position_embeddings": tokens, "vocab_size": VOCABULARY}
    llama = {"intermediate_size": 8 * width // 3, "bos_token_id": 0, "eos_token_id": None}
    rezero = {"position_embedding_type": "learned", "resweight_init": 0.1, "eos_token_id": None}
    return {
        "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(**gpt2)),
        "GPT-2, fused gelu": lambda: GPT2LMHeadModel(GPT2Config(**gpt2, activation_function="gelu_pytorch_tanh")),
        "Llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes, **llama)),
        "nn.TransformerEncoder": lambda: TorchEncoder(layers, width, heads, tokens),
        "ReZero, learned positions": lambda: ReZeroForCausalLM(ReZeroConfig(**sizes, **rezero)),
        "ReZero": lambda: ReZeroForCausalLM(ReZeroConfig(**sizes | rezero | {"position_embedding_type": "rotary"})),
        "ReZero, relu": lambda: ReZeroForCausalLM(ReZeroConfig(**sizes, **rezero, hidden_act="relu")),
    }


def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(B, T, V)."""
    return model(ids) if isinstance(model, TorchEncoder) else model(ids, use_cache=False).logits


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy."""
    return nn.functional.cross_entropy(logits_of(model, ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def training_step(model: nn.Module, ids: torch.Tensor, bf16: bool) -> Callable[[], None]:
    """Forward, backward and a step of fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)

    def run():
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def deployed(model: nn.Module) -> nn.Module:
    """In eval mode, and without residual weights where they can be folded."""
    return fold_resweight_(model.eval()) if isinstance(model, ReZeroForCausalLM) else model.eval()


def inference(model: nn.Module, ids: torch.Tensor, measure: str) -> Callable[[], object]:
    """A forward pass over all tokens or one, or 32 new tokens one at a time behind a prompt of 16."""
    if measure == "generate":
        options = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
        return lambda: model.generate(ids[:, :16], attention_mask=torch.ones_like(ids[:, :16]), **options)
    inputs = ids[:, :1] if measure == "one_token" else ids
    return torch.inference_mode()(lambda: logits_of(model, inputs))
