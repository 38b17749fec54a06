"""Stands in for the values, none of them a default, that the configuration tests of transformers hand to a config."""

config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["SomeModel"],
    "id2label": {0: "spam", 1: "ham", 2: "eggs"},
    "label2id": {"spam": 0, "ham": 1, "eggs": 2},
    "problem_type": "regression",
}
