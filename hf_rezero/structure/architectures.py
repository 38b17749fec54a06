"""How families of models name the parts of their layers: one table, which the rules of all parts read.

A name is a path from the module that owns the part. What a row says is not believed: a rule looks for the modules, their
classes and shapes decide, and a small run of the model tells whether the layer is the identity without its writers and
whether units go exactly (`structure/probe.py`, `pruning/exactness.py`).
"""

from typing import NamedTuple


class FeedForward(NamedTuple):
    """The projections that produce the neurons, more than one where they are gated, and the one that reads them.

    A projection with k times as many outputs as the reader has inputs holds k of them, one behind the other.
    """

    producers: tuple[str, ...]
    reader: str


class FusedAttention(NamedTuple):
    """One projection for queries, keys and values, and the output projection.

    Attributes:
        projection: All queries, all keys, all values.
        output: What reads the context.
        by_head: Query, key and value of the first head instead, then those of the next.
        counts_in_config: The attention reads its number of heads from its config.
    """

    projection: str
    output: str
    by_head: bool = False
    counts_in_config: bool = False


class ResidualLayer(NamedTuple):
    """One layer, x <- x + F(x) for each of its branches F, by paths from the layer; a path that it lacks is passed over.

    Attributes:
        writers: The last projection of each branch, or the batch norm behind it. A module that has them all is such a layer.
        branch_norms: Norms inside of the branches, x + F(N(x)) or x + N(F(x)): without writers the layer is the identity.
        stream_norms: Norms of the sum, N(x + F(x)), which change x whatever the writers are. Where families that share
            these names differ, as OPT and BART do, they stand among the branch norms, and the small run decides.
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
        tied_heads: Attentions, by paths from a layer, whose head i is the same in all layers of a stack, because the first
            one makes the position bias of all; the table of that bias, by its path from the attention.
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
    fused_attention: FusedAttention | tuple[str, ...] = ()
    tied_heads: tuple[tuple[str, str], ...] = ()
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
                branch_norms=(
                    *("input_layernorm", "post_attention_layernorm"),
                    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),  # Gemma 2 and 3
                ),
                qk_norms=("self_attn.q_norm", "self_attn.k_norm"),
            ),
        ),
        embeddings=("embed_tokens",),
        final_norms=("norm",),
    ),
    "Phi-3": Architecture(
        fused_attention=FusedAttention("qkv_proj", "o_proj", counts_in_config=True),
        feed_forwards=(FeedForward(("gate_up_proj",), "down_proj"),),
    ),
    "Phi": Architecture(
        attention=("q_proj", "k_proj", "v_proj", "dense"),
        feed_forwards=(FeedForward(("fc1",), "fc2"),),
        layers=(
            ResidualLayer(
                ("self_attn.dense", "mlp.fc2"),
                branch_norms=("input_layernorm",),
                qk_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
            ),
        ),
        embeddings=("embed_tokens",),
        final_norms=("final_layernorm",),
    ),
    "GPT-2": Architecture(
        fused_attention=FusedAttention("c_attn", "c_proj"),
        feed_forwards=(FeedForward(("c_fc",), "c_proj"),),
        layers=(ResidualLayer(("attn.c_proj", "mlp.c_proj"), branch_norms=("ln_1", "ln_2")),),
        embeddings=("wte",),
        positions=("wpe",),
        final_norms=("ln_f",),
    ),
    "GPT-NeoX": Architecture(
        fused_attention=FusedAttention("query_key_value", "dense", by_head=True),
        feed_forwards=(FeedForward(("dense_h_to_4h",), "dense_4h_to_h"),),
        layers=(
            ResidualLayer(
                ("attention.dense", "mlp.dense_4h_to_h"),
                branch_norms=("input_layernorm", "post_attention_layernorm"),
            ),
        ),
        embeddings=("embed_in",),
        final_norms=("final_layer_norm",),
    ),
    "OPT, BART, Whisper": Architecture(
        attention=("q_proj", "k_proj", "v_proj", "out_proj"),
        feed_forwards=(FeedForward(("fc1",), "fc2"),),
        layers=(
            ResidualLayer(
                ("self_attn.out_proj", "fc2"),
                branch_norms=("self_attn_layer_norm", "final_layer_norm"),
            ),
            ResidualLayer(
                ("self_attn.out_proj", "encoder_attn.out_proj", "fc2"),
                branch_norms=("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
            ),
        ),
        embeddings=("embed_tokens", "shared", "conv2"),
        positions=("embed_positions",),
        embedding_norms=("layernorm_embedding",),
        final_norms=("decoder.final_layer_norm", "encoder.layer_norm", "decoder.layer_norm"),
    ),
    "T5": Architecture(
        attention=("q", "k", "v", "o"),
        tied_heads=(
            ("layer.0.SelfAttention", "relative_attention_bias"),
            ("layer.1.EncDecAttention", "relative_attention_bias"),
        ),
        feed_forwards=(FeedForward(("wi_0", "wi_1"), "wo"), FeedForward(("wi",), "wo")),
        layers=(
            ResidualLayer(
                ("layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo"),
                branch_norms=("layer.0.layer_norm", "layer.1.layer_norm"),
            ),
            ResidualLayer(
                ("layer.0.SelfAttention.o", "layer.1.EncDecAttention.o", "layer.2.DenseReluDense.wo"),
                branch_norms=("layer.0.layer_norm", "layer.1.layer_norm", "layer.2.layer_norm"),
            ),
        ),
        embeddings=("shared", "embed_tokens"),
        final_norms=("final_layer_norm",),
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
        attention=("q_lin", "k_lin", "v_lin", "out_lin"),
        feed_forwards=(FeedForward(("lin1",), "lin2"),),
        layers=(
            ResidualLayer(
                ("attention.out_lin", "ffn.lin2"),
                stream_norms=("sa_layer_norm", "output_layer_norm"),
            ),
        ),
        embeddings=("word_embeddings",),
        positions=("position_embeddings",),
        embedding_norms=("embeddings.LayerNorm",),
    ),
    "ModernBERT": Architecture(
        fused_attention=FusedAttention("Wqkv", "Wo"),
        feed_forwards=(FeedForward(("Wi",), "Wo"),),
        layers=(ResidualLayer(("attn.Wo", "mlp.Wo"), branch_norms=("attn_norm", "mlp_norm")),),
        embeddings=("tok_embeddings",),
        embedding_norms=("embeddings.norm",),
        final_norms=("final_norm",),
    ),
    "ViT": Architecture(
        attention=("q_proj", "k_proj", "v_proj", "o_proj"),
        feed_forwards=(FeedForward(("fc1",), "fc2"),),
        layers=(ResidualLayer(("attention.o_proj", "mlp.fc2"), branch_norms=("layernorm_before", "layernorm_after")),),
        embeddings=("cls_token", "patch_embeddings.projection"),
        positions=("position_embeddings",),
        final_norms=("layernorm",),
    ),
    "ResNet of transformers": Architecture(
        layers=(ResidualLayer(("layer.2.normalization",)), ResidualLayer(("layer.1.normalization",))),
    ),
    "nn.TransformerEncoderLayer": Architecture(feed_forwards=(FeedForward(("linear1",), "linear2"),)),
}
# the numbers of heads that attentions keep beside their weights, the sizes of a head, and of all heads
HEAD_ATTRIBUTES = ("num_heads", "n_heads", "num_attention_heads", "num_key_value_heads")
HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
WIDTH_ATTRIBUTES = ("all_head_size", "split_size", "inner_dim")
