"""How many inputs are tried: 300 in all, or as many as HF_REZERO_FUZZ says, each test its share."""

import os

from hypothesis import HealthCheck, settings


SURFACES = 10
COUNT = int(os.environ.get("HF_REZERO_FUZZ", "300"))

settings.register_profile(
    "fuzz",
    max_examples=max(1, COUNT // SURFACES),
    deadline=None,
    derandomize="HF_REZERO_FUZZ" not in os.environ,  # CI tries the same inputs every time, `make soak` new ones
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("fuzz")
