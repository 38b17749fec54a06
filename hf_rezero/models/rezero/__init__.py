"""The two files that a Hub repository needs: `configuration_rezero.py` and `modeling_rezero.py`."""
