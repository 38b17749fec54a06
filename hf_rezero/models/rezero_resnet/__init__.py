"""The two files that a Hub repository needs: `configuration_rezero_resnet.py` and `modeling_rezero_resnet.py`."""
