import os

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# some hundred processes that tests start would each translate the package's modules anew
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# the first example pays for compilation
settings.register_profile(
    "diba_np", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("diba_np")


@pytest.fixture
def rng():
    return np.random.default_rng(20260507)


@pytest.fixture(scope="session")
def attention():
    """The real 384 x 384 attention matrix."""
    from pathlib import Path

    return np.load(Path(__file__).parent.parent / "data" / "minilm_attention_384x384.npy")
