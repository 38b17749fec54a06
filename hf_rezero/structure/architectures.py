"""How families of models name the parts of their layers: one table, which the rules of all parts read.

A name is a path from the module that owns the part. What a row says is not believed: a rule looks for the modules, and
their classes and shapes decide.
"""

from typing import NamedTuple


class FeedForward(NamedTuple):
    """The projections that produce the neurons, more than one where they are gated, and the one that reads them."""

    producers: tuple[str, ...]
    reader: str


class ResidualLayer(NamedTuple):
    """One layer, x <- x + F(x) for each of its branches F, by paths from the layer; a path that it lacks is passed over.

    Attributes:
        writers: The last projection of each branch. A module that has them all is such a layer.
        branch_norms: Norms inside of the branches, x + F(N(x)) or x + N(F(x)): without writers the layer is the identity.
        stream_norms: Norms of the sum, N(x + F(x)), which change x whatever the writers are.
        qk_norms: Norms of queries and keys, which are no part of the residual stream.
    """

    writers: tuple[str, ...]
    branch_norms: tuple[str, ...] = ()
    stream_norms: tuple[str, ...] = ()
    qk_norms: tuple[str, ...] = ()


class Architecture(NamedTuple):
    """One family.

    Attributes:
        attention: Query, key, value and output projections; empty where they are fused.
        fused_attention: The projection of query, key and value in one, and the output projection.
        feed_forwards: The feed-forward layers that the family knows.
        layers: Its residual layers; where several fit a module, the one with the most writers and norms describes it.
        embeddings: What starts the residual stream: endings of the names of token tables, and of other tensors.
        positions: What is added to it, likewise: tables of positions and of segments.
        embedding_norms: Norms between these and the first layer, by endings.
        final_norms: Norms behind the last layer, by endings.

    Example:
        A family that the table lacks:

        >>> from hf_rezero.structure.architectures import ARCHITECTURES, Architecture, FeedForward
        >>> ARCHITECTURES["mine"] = Architecture(("wq", "wk", "wv", "wo"), (), (FeedForward(("w1", "w3"), "w2"),))
        >>> del ARCHITECTURES["mine"]
    """

    attention: tuple[str, ...] = ()
    fused_attention: tuple[str, ...] = ()
    feed_forwards: tuple[FeedForward, ...] = ()
    layers: tuple[ResidualLayer, ...] = ()
    embeddings: tuple[str, ...] = ()
    positions: tuple[str, ...] = ()
    embedding_norms: tuple[str, ...] = ()
    final_norms: tuple[str, ...] = ()


ARCHITECTURES: dict[str, Architecture] = {
    "ReZero, Llama, Mistral, Qwen, Gemma": Architecture(
        attention=("q_proj", "k_proj", "v_proj", "o_proj"),
        feed_forwards=(FeedForward(("gate_proj", "up_proj"), "down_proj"), FeedForward(("up_proj",), "down_proj")),
        layers=(
            ResidualLayer(
                ("self_attn.o_proj", "mlp.down_proj"),
                branch_norms=("input_layernorm", "post_attention_layernorm"),
                qk_norms=("self_attn.q_norm", "self_attn.k_norm"),
            ),
        ),
        embeddings=("embed_tokens",),
        final_norms=("norm",),
    ),
    "GPT-2": Architecture(
        fused_attention=("c_attn", "c_proj"),
        feed_forwards=(FeedForward(("c_fc",), "c_proj"),),
        layers=(
            ResidualLayer(
                ("attn.c_proj", "mlp.c_proj"),
                branch_norms=("ln_1", "ln_2"),
            ),
        ),
        embeddings=("wte",),
        positions=("wpe",),
        final_norms=("ln_f",),
    ),
    "BERT, RoBERTa": Architecture(
        attention=("self.query", "self.key", "self.value", "output.dense"),
        feed_forwards=(FeedForward(("intermediate.dense",), "output.dense"),),
        layers=(
            ResidualLayer(
                ("attention.output.dense", "output.dense"),
                stream_norms=("attention.output.LayerNorm", "output.LayerNorm"),
            ),
        ),
        embeddings=("word_embeddings",),
        positions=("position_embeddings", "token_type_embeddings"),
        embedding_norms=("embeddings.LayerNorm",),
    ),
    "DistilBERT": Architecture(
        attention=("q_lin", "k_lin", "v_lin", "out_lin"), feed_forwards=(FeedForward(("lin1",), "lin2"),)
    ),
    "ViT": Architecture(
        attention=("q_proj", "k_proj", "v_proj", "o_proj"),
        feed_forwards=(FeedForward(("fc1",), "fc2"),),
        layers=(ResidualLayer(("attention.o_proj", "mlp.fc2"), branch_norms=("layernorm_before", "layernorm_after")),),
        embeddings=("cls_token", "patch_embeddings.projection"),
        positions=("position_embeddings",),
        final_norms=("layernorm",),
    ),
    "nn.TransformerEncoderLayer": Architecture(feed_forwards=(FeedForward(("linear1",), "linear2"),)),
}
# the numbers of heads that attentions keep beside their weights
HEAD_ATTRIBUTES = ("num_heads", "n_heads", "num_attention_heads", "num_key_value_heads")
