"""The numba backend caches its compiled code."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from refinement.densecrf import densecrf

SECOND_PROCESS = """
import sys
import numpy as np
from refinement.densecrf import densecrf
assert not {"numba", "torch"} & sys.modules.keys()
densecrf(np.zeros((5, 6, 3), np.uint8), np.ones((3, 5, 6), np.float16))
from refinement.densecrf_numba import embed, link, mean_field, normalize
for function in (embed, link, mean_field, normalize):
    assert sum(function.stats.cache_hits.values()), function
    assert not function.stats.cache_misses, (function, function.stats)
"""


def test_second_process_uses_the_cache_and_does_not_compile():
    densecrf(np.zeros((5, 6, 3), np.uint8), np.ones((3, 5, 6), np.float16), backend="numba")
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", SECOND_PROCESS], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
