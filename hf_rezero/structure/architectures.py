"""The parts of attentions and feed-forward layers, by architecture."""

# query, key, value and output projections, from the module that owns them all
ATTENTIONS = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("self.query", "self.key", "self.value", "output.dense"),
    ("q_lin", "k_lin", "v_lin", "out_lin"),
)


HEAD_ATTRIBUTES = ("num_heads", "n_heads", "num_attention_heads", "num_key_value_heads")


# what produces the neurons, and what reads them
FEED_FORWARDS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("c_fc",), "c_proj"),
    (("intermediate.dense",), "output.dense"),
    (("lin1",), "lin2"),
    (("linear1",), "linear2"),
)
