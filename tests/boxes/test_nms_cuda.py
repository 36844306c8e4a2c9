import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from detkit.boxes.kernels import nms_cuda

CHECKS = Path(__file__).with_name("nms_cuda_checks.py")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("simulator", ["1", pytest.param("0", marks=needs_gpu)], ids=["simulator", "gpu"])
def test_checks(simulator):
    # Numba reads the variable when it is imported, which other tests of this process have done.
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": simulator}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(CHECKS)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_sizes_of_the_kernels_fit():
    from detkit.boxes.kernels import nms_cuda_kernels as kernels

    assert kernels.WORD == 64
    assert kernels.ROUND == kernels.WORD * kernels.WORDS
    assert kernels.ROUND % kernels.SLICE == 0
    assert kernels.RESOLVE_THREADS % kernels.WORDS == 0
    assert 8 * (kernels.ROUND + kernels.WORDS) <= 48 * 1024
    assert kernels.WORDS <= 65535  # blocks along y
    assert max(kernels.THREADS, kernels.RESOLVE_THREADS) <= 1024


@pytest.mark.parametrize("threshold", [0.0, 1e-300, 1e-45, 0.1, 0.3, 1 / 3, 0.5, 0.7, 1 - 1e-12, 1.0])
def test_threshold_as_float32_decides_as_the_double_does(threshold):
    below = nms_cuda._float32_below(threshold)
    assert below.dtype == np.float32
    near = np.float32(threshold)
    for iou in (near, np.nextafter(near, np.float32(2)), np.nextafter(near, np.float32(-1)), np.float32(0)):
        assert (iou > below) == (float(iou) > threshold)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu():
    assert not nms_cuda.available()
    with pytest.raises(ValueError, match=r"boxes must be on a device of type cuda, but are on cpu; .*detkit.boxes.nms"):
        nms_cuda.nms_padded(torch.zeros(3, 4), torch.zeros(3), 0.5)
