"""How families of models name the parts of their layers: one table, which the rules of all parts read.

A name is a path from the module that owns the part. What a row says is not believed: a rule looks for the modules, and
their classes and shapes decide.
"""

from typing import NamedTuple


class FeedForward(NamedTuple):
    """The projections that produce the neurons, more than one where they are gated, and the one that reads them."""

    producers: tuple[str, ...]
    reader: str


class Branches(NamedTuple):
    """A layer x + F(N(x)): the norm in front of its first branch, and the last projection of each branch."""

    norm: str
    last: tuple[str, ...]


class Architecture(NamedTuple):
    """One family.

    Attributes:
        attention: Query, key, value and output projections; empty where they are fused.
        fused_attention: The projection of query, key and value in one, and the output projection.
        feed_forwards: The feed-forward layers that the family knows.
        pre_norm: How its layers are told that read normed input.

    Example:
        A family that the table lacks:

        >>> from hf_rezero.structure.architectures import ARCHITECTURES, Architecture, FeedForward
        >>> ARCHITECTURES["mine"] = Architecture(("wq", "wk", "wv", "wo"), (), (FeedForward(("w1", "w3"), "w2"),))
        >>> del ARCHITECTURES["mine"]
    """

    attention: tuple[str, ...] = ()
    fused_attention: tuple[str, ...] = ()
    feed_forwards: tuple[FeedForward, ...] = ()
    pre_norm: Branches | None = None


ARCHITECTURES: dict[str, Architecture] = {
    "ReZero, Llama, Mistral, Qwen, Gemma": Architecture(
        attention=("q_proj", "k_proj", "v_proj", "o_proj"),
        feed_forwards=(FeedForward(("gate_proj", "up_proj"), "down_proj"), FeedForward(("up_proj",), "down_proj")),
        pre_norm=Branches("input_layernorm", ("self_attn.o_proj", "mlp.down_proj")),
    ),
    "GPT-2": Architecture(
        fused_attention=("c_attn", "c_proj"),
        feed_forwards=(FeedForward(("c_fc",), "c_proj"),),
        pre_norm=Branches("ln_1", ("attn.c_proj", "mlp.c_proj")),
    ),
    "BERT, RoBERTa": Architecture(
        attention=("self.query", "self.key", "self.value", "output.dense"),
        feed_forwards=(FeedForward(("intermediate.dense",), "output.dense"),),
    ),
    "DistilBERT": Architecture(
        attention=("q_lin", "k_lin", "v_lin", "out_lin"), feed_forwards=(FeedForward(("lin1",), "lin2"),)
    ),
    "nn.TransformerEncoderLayer": Architecture(feed_forwards=(FeedForward(("linear1",), "linear2"),)),
}
# the numbers of heads that attentions keep beside their weights
HEAD_ATTRIBUTES = ("num_heads", "n_heads", "num_attention_heads", "num_key_value_heads")
