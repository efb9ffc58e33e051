"""What is copied to a device piece by piece is the whole array; without a card the device is the CPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from ossia.ops.upload import Uploader  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("buffer_bytes", [8, 40, 100, 1 << 20])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.float16, np.float32, ml_dtypes.bfloat16])
def test_every_number_arrives_whatever_the_pieces(dtype, buffer_bytes):
    uploader = Uploader(DEVICE, buffer_bytes)
    numbers = np.random.default_rng(0).integers(0, 100, (5, 7, 3)).astype(dtype)
    numbers.flags.writeable = False
    for values in (numbers, numbers[:, 1::2], numbers.T, numbers[0, 0, :1].reshape(()), numbers[:0], numbers[2]):
        for wanted in (torch.float32, torch.bfloat16):
            met = uploader.upload(values, wanted)
            assert met.dtype == wanted and met.is_contiguous() and met.device.type == DEVICE.type
            np.testing.assert_array_equal(met.float().cpu().numpy(), values.astype(np.float32))


def test_bits_of_one_dtype_stay_as_they_are():
    bits = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    met = Uploader(DEVICE, 1000).upload(bits, torch.bfloat16)
    np.testing.assert_array_equal(met.view(torch.int16).cpu().numpy(), bits.view(np.int16))


def test_threads_do_not_mix_their_arrays():
    uploader = Uploader(DEVICE, 256)
    arrays = [np.full((40, 33), number, np.float32) for number in range(40)]
    with ThreadPoolExecutor(4) as threads:
        for values, met in zip(
            arrays, threads.map(lambda one: uploader.upload(one, torch.float32), arrays), strict=True
        ):
            np.testing.assert_array_equal(met.cpu().numpy(), values)
