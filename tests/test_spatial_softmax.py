"""spatial_softmax and its backward: within the promised bounds on every target, in every dtype, shape and layout."""

import numpy as np
import pytest

import gpusoftmax
from gpusoftmax import _dry_run
from gpusoftmax.kernels.cpu import run as run_module
from gpusoftmax.kernels.cpu.walk import ACROSS, ALONG
from tests import inputs, tolerances
from tests.calls import Untouched, same_bits
from tests.conftest import Cpu
from tests.emulator import emulated_gpu
from tests.test_regimes import WAYS, force

INF, NAN = np.inf, np.nan
F32 = np.dtype(np.float32)
IMAGES = [
    (1, 1),  # 0, 0
    (5, 1),  # x is 0
    (1, 5),  # y is 0
    (4, 7),  # less than a warp
    (16, 32),  # all that the smallest block holds
    (19, 27),  # one more
    (3, 1500),  # lines longer than a chunk of the GPU
    (1500, 3),
    (64, 65),  # five chunks of the GPU, three of the CPU
]
ROW_DTYPE = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}


def maps(height, width, dtype, n_rows=2):
    return inputs.every_family(n_rows, height * width, dtype, seed=width).reshape(-1, height, width)


def coordinates(target, features, **options):
    return np.asarray(target.get(gpusoftmax.spatial_softmax(target.array(features), **options)))


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
@pytest.mark.parametrize("image", IMAGES, ids=str)
def test_matches_oracle(target, dtype, image):
    features = maps(*image, dtype)
    found = coordinates(target, features)
    assert found.dtype == ROW_DTYPE[dtype.name] and found.shape == (len(features), 2)
    tolerances.check_spatial_softmax(found, features)


@pytest.mark.parametrize("temperature", [1e-37, 0.7, 3.0, 1e38])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_temperature(target, dtype, temperature):
    features = maps(13, 17, dtype)
    found = coordinates(target, features, temperature=temperature)
    tolerances.check_spatial_softmax(found, features, temperature)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 4), (40, 5), (1, 3000), (70, 33)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_certain_pixel(target, dtype, height, width):
    """x first, to the right; then y, down; both exactly those of linspace."""
    pixels = np.unique(np.linspace(0, height * width - 1, 30).astype(int))
    features = np.full((len(pixels), height * width), -INF).astype(dtype)
    features[np.arange(len(pixels)), pixels] = inputs.make("spread", (len(pixels),), dtype)
    found = coordinates(target, features.reshape(-1, height, width))
    lines, places = np.divmod(pixels, width)
    x, y = 2 * places / max(width - 1, 1) - (width > 1), 2 * lines / max(height - 1, 1) - (height > 1)
    np.testing.assert_allclose(found, np.stack([x, y], axis=-1), rtol=0, atol=np.finfo(found.dtype).eps / 2)


def test_special_values(target):
    features = inputs.make("spread", (6, 40, 33), F32)
    features[0, 7, 5], features[1, 0, 0] = NAN, INF
    features[2], features[3] = -INF, INF
    features[4, :35] = -INF
    found = coordinates(target, features)
    assert np.isnan(found[:4]).all() and np.isfinite(found[4:]).all() and found[4, 1] > 0.75
    tolerances.check_spatial_softmax(found, features)


def test_batch_axes(target):
    features = inputs.make("spread", (2, 3, 6, 40), F32).reshape(2, 3, 6, 8, 5)
    tolerances.check_spatial_softmax(coordinates(target, features), features)
    assert coordinates(target, features[0, 0, 0]).shape == (2,)
    assert coordinates(target, features[:0]).shape == (0, 3, 6, 2)


@pytest.mark.parametrize("out_dtype", inputs.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_dtype_of_the_result(dtype, out_dtype):
    features = inputs.make("spread", (2, 9, 11), dtype)
    found = gpusoftmax.spatial_softmax(features, dtype=out_dtype)
    assert found.dtype == out_dtype
    tolerances.check_spatial_softmax(found, features)
    out = np.empty((2, 2), out_dtype)
    assert gpusoftmax.spatial_softmax(features, out=out) is out
    assert np.array_equal(out, found)


def test_the_widest_image():
    features = np.full((2, 2**22), -INF, F32)
    features[0, [0, -1]], features[1, 5000] = 3, 3
    x = (0 + 5000 + 2**22 - 1) / 3 * 2 / (2**22 - 1) - 1
    np.testing.assert_allclose(gpusoftmax.spatial_softmax(features), [x, -1 / 3], rtol=0, atol=1e-6)


# ---------------------------------------------------------------- layouts and bits


def layouts(features):
    """(name, view) of (n, c, h, w) maps; the last one has no single stride along its pixels and is copied."""
    n, c, h, w = features.shape
    padded = np.full((n, c + 2, h, w), NAN, features.dtype)
    padded[:, 1:-1] = features
    spread = np.full((n, c, h, 2 * w), NAN, features.dtype)
    spread[..., 1::2] = features
    cropped = np.full((n, c, h + 2, w + 3), NAN, features.dtype)
    cropped[..., 1:-1, 2:-1] = features
    yield "channels last", np.ascontiguousarray(features.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    yield "slice of channels", padded[:, 1:-1]
    yield "every other column", spread[..., 1::2]
    yield "reversed", features[:, :, ::-1, ::-1].copy()[:, :, ::-1, ::-1]
    yield "transposed batch", features.swapaxes(0, 1).copy().swapaxes(0, 1)
    yield "a window", cropped[..., 1:-1, 2:-1]


@pytest.mark.parametrize("image", [(5, 7), (9, 31), (45, 50)], ids=str)
def test_every_layout_has_the_same_bits(target, image):
    features = inputs.make("spread", (2, 16, *image), F32)
    expected = coordinates(target, features)
    for name, view in layouts(features):
        with Untouched(view):
            assert same_bits(coordinates(target, view), expected), name


def test_out_of_any_layout(target):
    features = inputs.make("spread", (3, 4, 9, 31), F32)
    expected = coordinates(target, features)
    for out in (np.zeros((3, 4, 6), F32)[..., 1:4:2], np.zeros((2, 4, 3), F32).T, np.zeros((3, 4, 2), F32)[::-1]):
        place = target.array(out)
        assert gpusoftmax.spatial_softmax(target.array(features), out=place) is place
        assert same_bits(np.ascontiguousarray(target.get(place)), expected)


@pytest.mark.parametrize("dtype", [F32, inputs.BFLOAT16], ids=str)
@pytest.mark.parametrize("image", [(4, 7), (64, 65)], ids=str)
def test_batch(target, dtype, image):
    features = maps(*image, dtype)
    expected = coordinates(target, features)
    for first, last in ((0, 1), (3, 5), (len(features) - 1, len(features))):
        assert same_bits(coordinates(target, features[first:last]), expected[first:last])


@pytest.mark.parametrize("image", [(1, 1), (3, 5), (8, 8), (10, 12), (40, 120)], ids=str)
def test_ways_to_walk_rows(monkeypatch, image):
    features = inputs.make("spread", (70, *image), F32)
    results = []
    for way in (ALONG, ACROSS):
        monkeypatch.setattr(run_module, "_way", lambda *_, way=way: way)
        results.append(gpusoftmax.spatial_softmax(features))
    assert all(same_bits(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [F32, pytest.param(inputs.BFLOAT16, marks=pytest.mark.matrix)], ids=str)
def test_regimes_agree(monkeypatch, dtype):
    features, expected = inputs.make("spread", (2, 151, 117), dtype), None
    for way in WAYS:
        force(monkeypatch, *way)
        with emulated_gpu("sm_90", track=False) as gpu:
            found = gpu.get(gpusoftmax.spatial_softmax(gpu.array(features)))
        expected = found if expected is None else expected
        assert same_bits(found, expected), way


@pytest.mark.parametrize("image", [(8, 16), (128, 32)], ids=str)
def test_every_pixel_is_read_once(image):
    features = inputs.make("spread", (2, *image), F32)
    with emulated_gpu("sm_90") as gpu:
        x = gpu.array(features)
        gpusoftmax.spatial_softmax(x)
        assert (gpu.reads(x) == 1).all() and len(gpu.stats) == 1


def test_maps_side_by_side_are_read_together():
    """Channels last: no copy, and whole sectors."""
    features = inputs.make("spread", (2, 12, 9, 64), F32).transpose(0, 3, 1, 2)
    with emulated_gpu("sm_90", multiprocessors=2) as gpu:
        x = gpu.array(features)
        gpusoftmax.spatial_softmax(x)
        (stats,) = gpu.stats
        assert stats.plan.regime == "columns" and (gpu.reads(x) == 1).all()


def test_explained():
    explained = gpusoftmax.explain("spatial_softmax", (8, 32, 60, 60), arch="sm_90")
    (kernel,) = explained["kernels"]
    assert kernel["grid"] == 256 and explained["row"] == {"read": 14400, "written": 8, "once": True}
    assert explained["expected_seconds"] == pytest.approx(256 * 14408 / _dry_run.DEVICES["sm_90"].bytes_per_second)


# ---------------------------------------------------------------- backward


def backward(target, features, *arrays, **options):
    arrays = [target.array(array) for array in (features, *arrays)]
    return np.asarray(target.get(gpusoftmax.spatial_softmax_backward(*arrays, **options)))


def forward_and_upstream(features, **options):
    points = gpusoftmax.spatial_softmax(features, **options)
    return points, inputs.make("peaked", points.shape, points.dtype, seed=1)


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
@pytest.mark.parametrize("image", IMAGES, ids=str)
def test_backward_matches_oracle(target, dtype, image):
    features = maps(*image, dtype)
    points, upstream = forward_and_upstream(features)
    dfeatures = backward(target, features, points, upstream)
    assert dfeatures.dtype == dtype
    tolerances.check_spatial_softmax_backward(dfeatures, features, points, upstream)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_backward_is_the_derivative(target, temperature):
    """Central differences in float64."""
    features = inputs.make("spread", (2, 5, 8), np.float64) / 3
    points, upstream = forward_and_upstream(features, temperature=temperature)
    dfeatures = backward(target, features, points, upstream, temperature=temperature)
    step, found = 1e-5, np.empty_like(features)
    for line, place in np.ndindex(5, 8):
        moved = np.zeros_like(features)
        moved[:, line, place] = step
        ends = [gpusoftmax.spatial_softmax(features + sign * moved, temperature=temperature) for sign in (1, -1)]
        found[:, line, place] = (upstream * (ends[0] - ends[1])).sum(axis=-1) / (2 * step)
    np.testing.assert_allclose(dfeatures, found, rtol=1e-6, atol=1e-6 * np.abs(found).max())


def test_special_values_of_the_backward(target):
    features = inputs.make("spread", (6, 15, 20), F32)
    features[0, 7, 3], features[1, 0, 0], features[2], features[3] = NAN, INF, -INF, INF
    features[4, :, 1::2] = -INF
    points, upstream = forward_and_upstream(features)
    dfeatures = backward(target, features, points, upstream)
    assert np.isnan(dfeatures[:4]).all() and np.isfinite(dfeatures[4:]).all() and not dfeatures[4, :, 1::2].any()
    tolerances.check_spatial_softmax_backward(dfeatures, features, points, upstream)


@pytest.mark.parametrize("image", [(5, 7), (45, 50)], ids=str)
def test_every_layout_of_the_backward_has_the_same_bits(target, image):
    features = inputs.make("spread", (2, 16, *image), F32)
    points, upstream = forward_and_upstream(features)
    expected = backward(target, features, points, upstream)
    strided = np.repeat(upstream, 2, axis=-1)[..., ::2], np.broadcast_to(upstream[:1, :1], upstream.shape)
    assert same_bits(backward(target, features, points.swapaxes(0, 1).copy().swapaxes(0, 1), strided[0]), expected)
    same = backward(target, features, points, np.ascontiguousarray(strided[1]))
    assert same_bits(backward(target, features, points, strided[1]), same)
    for name, view in layouts(features):
        with Untouched(view):
            assert same_bits(backward(target, view, points, upstream), expected), name
        with Untouched(view, but_view=True):
            place = target.array(view)
            found = gpusoftmax.spatial_softmax_backward(place, target.array(points), target.array(upstream), out=place)
            assert found is place and same_bits(np.ascontiguousarray(target.get(place)), expected), name


@pytest.mark.parametrize("dtype", [F32, inputs.BFLOAT16], ids=str)
@pytest.mark.parametrize("image", [(4, 7), (64, 65)], ids=str)
def test_batch_of_the_backward(target, dtype, image):
    features = maps(*image, dtype)
    points, upstream = forward_and_upstream(features)
    expected = backward(target, features, points, upstream)
    for first, last in ((0, 1), (3, 5), (len(features) - 1, len(features))):
        part = [array[first:last] for array in (features, points, upstream)]
        assert same_bits(backward(target, *part), expected[first:last])


@pytest.mark.parametrize("image", [(1, 1), (3, 5), (8, 8), (10, 12), (40, 120)], ids=str)
def test_ways_to_walk_rows_of_the_backward(monkeypatch, image):
    features = inputs.make("spread", (70, *image), F32)
    points, upstream = forward_and_upstream(features)
    results = []
    for way in (ALONG, ACROSS):
        monkeypatch.setattr(run_module, "_way", lambda *_, way=way: way)
        results.append(gpusoftmax.spatial_softmax_backward(features, points, upstream))
    assert all(same_bits(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [F32, pytest.param(inputs.BFLOAT16, marks=pytest.mark.matrix)], ids=str)
def test_regimes_of_the_backward_agree(monkeypatch, dtype):
    features, expected = inputs.make("spread", (2, 151, 117), dtype), None
    points, upstream = forward_and_upstream(features)
    for way in WAYS:
        force(monkeypatch, *way)
        with emulated_gpu("sm_90", track=False) as gpu:
            arrays = [gpu.array(array) for array in (features, points, upstream)]
            found = gpu.get(gpusoftmax.spatial_softmax_backward(*arrays))
        expected = found if expected is None else expected
        assert same_bits(found, expected), way


@pytest.mark.parametrize("image", [(8, 16), (128, 32)], ids=str)
def test_every_pixel_is_read_and_written_once(image):
    features = inputs.make("spread", (2, *image), F32)
    points, upstream = forward_and_upstream(features)
    with emulated_gpu("sm_90") as gpu:
        arrays = [gpu.array(array) for array in (features, points, upstream)]
        dfeatures = gpusoftmax.spatial_softmax_backward(*arrays)
        assert (gpu.reads(arrays[0]) == 1).all() and (gpu.writes(dfeatures) == 1).all() and len(gpu.stats) == 1


def test_arrays_that_do_not_fit():
    features, points = np.zeros((3, 4, 5), F32), np.zeros((3, 2), F32)
    for wrong, error, text in (
        (points[:2], ValueError, r"coordinates has shape \(2, 2\), expected \(3, 2\) to match features \(3, 4, 5\)"),
        (points.astype(np.float64), TypeError, "dcoordinates has dtype float32, expected float64 to match coordinates"),
    ):
        with pytest.raises(error, match=text):
            gpusoftmax.spatial_softmax_backward(features, wrong, points)
    with pytest.raises(ValueError, match="out shares memory with dcoordinates"):
        gpusoftmax.spatial_softmax_backward(features, points, features.reshape(-1)[:6].reshape(3, 2), out=features)


# ---------------------------------------------------------------- masks, and temperatures of maps


def check_masks_and_temperatures(target, of_backward):
    """What is masked is as -inf there, bit for bit, and has no gradient; powers of two are exact temperatures."""
    features = inputs.make("spread", (2, 3, 12, 9), F32)
    mask = np.random.default_rng(0).random((12, 9)) < 0.6
    temperature = 2.0 ** np.array([[0, 1, -1], [2, -2, 0]], np.float32)
    kept = np.where(mask, features, -INF).astype(F32)
    features[:, :, ~mask] = NAN
    x, given, per_map = target.array(features), target.array(mask), target.array(temperature)
    points = gpusoftmax.spatial_softmax(x, mask=given, temperature=per_map)
    everywhere = target.array(np.tile(mask, (2, 1, 1, 1)))
    found = np.asarray(target.get(points))
    assert same_bits(target.get(gpusoftmax.spatial_softmax(x, mask=everywhere, temperature=per_map)), found)
    for image in np.ndindex(2, 3):
        alone = gpusoftmax.spatial_softmax(target.array(kept[image]), temperature=float(temperature[image]))
        np.testing.assert_allclose(target.get(alone), found[image], rtol=2e-6, atol=2e-6)
    whole = np.asarray(target.get(gpusoftmax.spatial_softmax(x, mask=target.array(mask & False), temperature=per_map)))
    assert np.isnan(whole).all()
    if not of_backward:
        return
    upstream = inputs.make("spread", found.shape, found.dtype)
    gradients = gpusoftmax.spatial_softmax_backward(
        x, points, target.array(upstream), mask=given, temperature=per_map
    )  # fmt: skip
    gradients = np.asarray(target.get(gradients))
    assert (gradients[:, :, ~mask] == 0).all()
    for image in np.ndindex(2, 3):
        arrays = (target.array(one[image]) for one in (kept, found, upstream))
        back = gpusoftmax.spatial_softmax_backward(*arrays, temperature=float(temperature[image]))
        np.testing.assert_allclose(target.get(back), gradients[image], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("of_backward", [False, pytest.param(True, marks=pytest.mark.matrix)])
def test_masks_and_temperatures_of_maps(of_backward):
    check_masks_and_temperatures(Cpu(), of_backward)


@pytest.mark.matrix
def test_masks_and_temperatures_of_maps_on_a_gpu():
    with emulated_gpu("sm_90") as gpu:
        check_masks_and_temperatures(gpu, True)


def test_masks_that_do_not_fit():
    features = np.zeros((2, 4, 5), F32)
    with pytest.raises(ValueError, match=r"^mask has shape \(4,\), expected \(4, 5\), .* or \(2, 4, 5\)"):
        gpusoftmax.spatial_softmax(features, mask=np.ones(4, bool))
    with pytest.raises(TypeError, match="^mask has dtype int32, expected bool"):
        gpusoftmax.spatial_softmax(features, mask=np.ones((4, 5), np.int32))
    with pytest.raises(ValueError, match=r"^temperature has shape \(4, 5\), expected \(2,\)"):
        gpusoftmax.spatial_softmax(features, temperature=np.ones((4, 5), F32))
