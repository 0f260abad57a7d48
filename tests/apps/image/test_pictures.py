"""Windows against numpy's own slices, turns and mirrors; boxes and masks that follow."""

import types

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from apps import runner
from apps.image import pictures


def picture_of(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, [height, width, channels]).astype("float32")


@pytest.mark.parametrize(
    ("matrix", "turned"),
    [
        ([[1, 0], [0, 1]], lambda part: part),
        ([[1, 0], [0, -1]], np.fliplr),
        ([[-1, 0], [0, 1]], np.flipud),
        ([[0, 1], [-1, 0]], np.rot90),
        ([[0, 1], [1, 0]], lambda part: part.transpose(1, 0, 2)),
    ],
)
def test_a_window_is_a_slice_turned(matrix, turned):
    picture = picture_of(50, 70)
    window = pictures.Window(tf.constant([25.0, 36.0]), tf.constant(matrix, tf.float32), 32)
    for interpolation in ("bilinear", "nearest"):
        np.testing.assert_allclose(
            pictures.cut(picture, window, interpolation), turned(picture[9:41, 20:52]), atol=1e-3
        )


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(8, 80), width=st.integers(8, 80), augment=st.sampled_from(pictures.AUGMENTATIONS),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_boxes_and_masks_follow_the_picture(height, width, augment, seed):
    random = np.random.default_rng(seed)
    top, left = random.integers(0, height - 4), random.integers(0, width - 4)
    bottom, right = random.integers(top + 3, height), random.integers(left + 3, width)
    mask = np.zeros([height, width, 1], "uint8")
    mask[top:bottom, left:right] = 1
    window = pictures.draw_window(tf.constant([height, width]), 32, augment, tf.constant([1, seed]))
    box = pictures.move_boxes(tf.constant([[top, left, bottom, right]], tf.float32), window).numpy()[0]
    cut = pictures.cut(mask, window, "nearest", outside=0).numpy()[..., 0]
    rows, columns = np.nonzero(cut)
    clipped = np.clip(box, 0, 32)
    if len(rows):
        seen = [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
        np.testing.assert_allclose(seen, clipped, atol=0.51)  # a pixel counts where its middle is inside
    else:
        assert min(clipped[2:] - clipped[:2]) <= 1.01


@pytest.mark.parametrize("augment", pictures.AUGMENTATIONS)
@pytest.mark.parametrize("shape", [(40, 90), (20, 90), (10, 12)])
def test_windows_lie_in_the_picture_or_around_it(augment, shape):
    for seed in range(20):
        window = pictures.draw_window(tf.constant(shape), 32, augment, tf.constant([0, seed]))
        inside = pictures.cut(np.ones([*shape, 1], "float32"), window, "nearest").numpy()
        share = inside.mean()
        scale = np.abs(window.matrix.numpy()).sum() / 2
        expected = min(1, shape[0] / (32 * scale)) * min(1, shape[1] / (32 * scale))
        assert share == pytest.approx(expected, abs=0.07)
        if augment == "none" and min(shape) >= 32:
            assert share == 1


def test_every_way_is_drawn():
    for augment, ways in (("none", 1), ("flip", 2), ("turn", 8)):
        seen = {
            tuple(np.sign(pictures.draw_window(tf.constant([50, 50]), 32, augment, tf.constant([3, i])).matrix).ravel())
            for i in range(100)
        }
        assert len(seen) == ways
        if augment == "flip":
            assert seen == {(1, 0, 0, 1), (1, 0, 0, -1)}


def test_what_is_outside_of_the_picture_has_its_value():
    window = pictures.Window(tf.constant([4.0, 4.0]), tf.eye(2), 32)
    cut = pictures.cut(np.ones([8, 8, 1], "uint8"), window, "nearest", outside=255).numpy()
    assert cut.dtype == np.uint8
    assert np.sum(cut == 1) == 64
    assert np.sum(cut == 255) == 32 * 32 - 64


def test_colours_change_and_stay_in_range():
    picture = tf.constant(picture_of(16, 16))
    first, again, other = (pictures.change_colours(picture, tf.constant([1, seed])) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
    assert 0 <= np.min(first) <= np.max(first) <= 255


def test_kinds_of_pictures_become_one():
    grey = picture_of(4, 5, 1)
    np.testing.assert_array_equal(pictures.to_channels(grey, 3), np.repeat(grey, 3, axis=-1))
    alpha = np.concatenate([picture_of(4, 5), np.full([4, 5, 1], 51.0, "float32")], axis=-1)
    np.testing.assert_allclose(pictures.to_channels(alpha, 3), alpha[..., :3] / 5, rtol=1e-5)
    sixteen = (grey * 257).astype("uint16")
    np.testing.assert_allclose(pictures.to_channels(tf.constant(sixteen), 1), grey, atol=1e-3)
    red = np.zeros([1, 1, 3], "uint8")
    red[..., 0] = 100
    np.testing.assert_allclose(pictures.to_channels(red, 1), [[[29.9]]], rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "filled", "padded"),
    [((40, 30), (40, 30), (64, 32)), ((64, 32), (64, 32), (64, 32)), ((400, 100), (64, 16), (64, 32)),
     ((1, 1), (1, 1), (32, 32)), ((1000, 1), (64, 1), (64, 32))],
)  # fmt: skip
def test_pictures_of_any_size_fit_a_network(shape, filled, padded):
    batch = tf.ones([2, *shape, 3])
    out, seen = pictures.shrink_and_pad(batch, 64, 32)
    assert out.shape == (2, *padded, 3)
    assert tuple(seen.numpy()) == filled
    np.testing.assert_allclose(out[:, : filled[0], : filled[1]], 1, rtol=1e-5)
    assert float(tf.reduce_sum(out)) == pytest.approx(2 * 3 * filled[0] * filled[1], rel=1e-5)


def test_windows_are_a_pure_function_of_seed_and_epoch():
    examples = tf.data.Dataset.from_tensor_slices(np.arange(10))

    def batches(seed, epoch):
        options = types.SimpleNamespace(seed=seed, windows=3, batch_size=4)
        make, steps = pictures.training_windows(
            examples, 10, options, lambda example, seed: (example, tf.random.stateless_uniform([], seed))
        )
        assert steps == 7
        return [array for batch in make(epoch) for array in batch]

    first = batches(1, 0)
    assert len(first) == 2 * 7
    np.testing.assert_array_equal(first, batches(1, 0))
    assert np.any(np.array(first) != batches(1, 1))
    assert np.any(np.array(first) != batches(2, 0))
    values = np.concatenate(first[1::2])
    assert len(set(values.tolist())) == len(values), "no two windows are drawn alike"


@pytest.mark.parametrize(("split", "num"), [("train", 10), ("train[:90%]", 9)])
@pytest.mark.parametrize(("num_bytes", "reads"), [(1000, 1), (2**30, 2)])
def test_only_what_is_small_is_kept_in_memory(split, num, num_bytes, reads):
    read = []

    def examples():
        read.append(split)
        yield from range(num)

    dataset = tf.data.Dataset.from_generator(examples, output_signature=tf.TensorSpec([], tf.int32))
    splits = {
        "train": types.SimpleNamespace(num_bytes=num_bytes, num_examples=10),
        "train[:90%]": types.SimpleNamespace(num_bytes=0, num_examples=9),  # as TFDS has it
    }
    builder = types.SimpleNamespace(
        info=types.SimpleNamespace(splits=splits), as_dataset=lambda split, shuffle_files: dataset
    )
    found, count = pictures.read(builder, split)
    assert count == num
    assert [list(found.as_numpy_iterator()) for _ in range(2)] == [list(range(num))] * 2
    assert len(read) == reads


def test_validation_windows_are_the_same_for_every_seed():
    examples = tf.data.Dataset.from_tensor_slices(np.arange(5))

    def batches(seed):
        options = types.SimpleNamespace(seed=seed, windows=2, batch_size=4)
        made = pictures.validation_windows(
            examples, options, lambda example, seed: (example, tf.random.stateless_uniform([], seed))
        )
        return [np.asarray(array) for batch in made for array in batch]

    for one, two in zip(batches(1), batches(2), strict=True):
        np.testing.assert_array_equal(one, two)
    assert sum(len(array) for array in batches(1)[::2]) == 10


def test_a_batch_needs_windows():
    options = types.SimpleNamespace(seed=0, windows=2, batch_size=40)
    with pytest.raises(runner.AppError, match=r"--batch_size=40 is more than the 20 windows .* or raise --windows"):
        pictures.training_windows(tf.data.Dataset.range(10), 10, options, lambda example, seed: example)
