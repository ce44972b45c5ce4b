"""The backends of the dense CRF as test parameters."""
import pytest

from refinement.densecrf import BACKENDS
from tests.conftest import needs_pydensecrf

ALL_BACKENDS = [
    pytest.param(name, marks=needs_pydensecrf if name == "pydensecrf" else ()) for name in BACKENDS
]
