"""The two files that a Hub repository needs: `configuration_rezero_mlp.py` and `modeling_rezero_mlp.py`."""
