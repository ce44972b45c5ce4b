"""Training samples: order and augmentation depend only on the seed and the position; errors for bad files."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from segmentation.benchmark import voc_palette
from segmentation.dataset import Batch, Draw, Order, TrainingSet, check_files, read_labels
from segmentation.masks import write_mask
from segmentation.transforms import JitterScaleCrop, ScaleCrop
from tests import training_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    training_world.write_world(root, train=7, val=0)
    return root


SMALL = ScaleCrop(33, (0.75, 1.0))


def dataset_of(root: Path, transform=SMALL, names=None) -> TrainingSet:
    names = names or (root / "train.txt").read_text().split()
    folders = str(root / "JPEGImages"), str(root / "SegmentationClass")
    return TrainingSet(names, *folders, 21, transform, seed=3)


@settings(deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 12), st.integers(0, 3), st.booleans(), st.integers(1, 4), st.data()
)
def test_every_epoch_uses_each_image_at_most_once(images, batch_size, seed, drop_last, epochs, data):
    if drop_last and images < batch_size:
        with pytest.raises(ValueError, match=f"{images} images do not fill one batch of {batch_size}"):
            Order(images, batch_size, seed, drop_last)
        return
    order = Order(images, batch_size, seed, drop_last)
    whole, rest = divmod(images, batch_size)
    sizes = [batch_size] * whole + ([rest] if rest and not drop_last else [])
    seen = []
    for epoch in range(epochs):
        batches = [order.batch(epoch * len(sizes) + number) for number in range(len(sizes))]
        assert [len(batch) for batch in batches] == sizes
        draws = [draw for batch in batches for draw in batch]
        assert [draw.position for draw in draws] == list(range(sum(sizes)))
        assert {draw.epoch for draw in draws} == {epoch}
        indices = [draw.index for draw in draws]
        assert len({*indices}) == len(indices) and {*indices} <= set(range(images))
        assert drop_last or sorted(indices) == list(range(images))
        seen.append(indices)
    number = data.draw(st.integers(0, epochs * len(sizes) - 1))  # a batch does not depend on earlier calls
    assert Order(images, batch_size, seed, drop_last).batch(number) == order.batch(number)


def test_order_differs_between_epochs_and_between_seeds():
    def first(seed, epoch):
        return [draw.index for draw in Order(30, 30, seed).batch(epoch)]

    orders = [first(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9


@pytest.mark.parametrize("images, batch_size", [(0, 1), (1, 0)])
def test_order_without_images_or_with_batch_size_0_raises(images, batch_size):
    with pytest.raises(ValueError, match=f"got {images} images and batch_size {batch_size}"):
        Order(images, batch_size, 0)


def merged(parts: list[Batch]) -> dict[str, tuple[bytes, bytes]]:
    """The samples of one batch, from the parts of all ranks: name -> bytes of image and labels."""
    return {
        name: (image.tobytes(), labels.tobytes())
        for part in parts
        for name, image, labels in zip(part.names, part.images, part.labels, strict=True)
    }


@pytest.mark.parametrize("transform", [ScaleCrop(33, (0.75, 1.0)), JitterScaleCrop(33)])
def test_samples_do_not_depend_on_ranks_threads_or_first_batch(world, transform):
    dataset, order = dataset_of(world, transform), Order(7, 4, 3)
    expected = [merged([batch]) for batch in dataset.batches(order, range(6))]
    assert [len(batch) for batch in expected] == [4, 3] * 3
    assert len({sample for batch in expected for sample in batch.values()}) == 21  # all of 3 epochs differ
    for ranks, threads, start in ((1, 5, 0), (2, 1, 0), (2, 3, 3), (3, 2, 1), (4, 2, 2)):
        parts = [dataset.batches(order, range(start, 6), rank, ranks, threads) for rank in range(ranks)]
        for number, batches in enumerate(zip(*parts, strict=True), start=start):
            filled = [batch for batch, draw in zip(batches, range(len(expected[number])), strict=False)]
            assert merged(filled) == expected[number]
            for batch in batches[len(filled) :]:  # a rank without samples gets one ignored sample
                assert len(batch.images) == 1 and (batch.labels == 255).all()
                assert batch.images.shape[1:] == (3, 33, 33)


def test_sample_generator_is_seeded_by_seed_epoch_and_position(world):
    dataset = dataset_of(world, lambda image, mask, draw: (draw.random(), image, mask))
    found, image, mask = dataset.sample(Draw(2, 5, 0))
    assert found == random.Random("sample 3 2 5").random()
    file = world / "JPEGImages" / "image_0.png"
    assert np.array_equal(image, np.asarray(Image.open(file))) and mask.shape == image.shape[:2]


def error_message(world: Path, tmp_path: Path, damage) -> str:
    """The error when `damage` has changed the files of image_0."""
    for folder in ("JPEGImages", "SegmentationClass"):
        (tmp_path / folder).mkdir()
        file = world / folder / "image_0.png"
        (tmp_path / folder / file.name).write_bytes(file.read_bytes())
    damage(tmp_path / "JPEGImages" / "image_0.png", tmp_path / "SegmentationClass" / "image_0.png")
    batches = dataset_of(tmp_path, names=["image_0"]).batches(Order(1, 1, 0), range(3))
    with pytest.raises((ValueError, OSError)) as caught:
        next(batches)
    return str(caught.value)


def save(pixels: np.ndarray):
    return lambda image, mask: Image.fromarray(pixels).save(mask)


DAMAGED = {
    "other size": (save(np.zeros((40, 51), np.uint8)),
                   r"mask .*image_0.png is \(40, 51\) but its image is .*52\)"),
    "16 bits": (save(np.zeros((40, 52), np.uint16)), "mask .*image_0.png has mode I;16"),
    "RGB": (save(np.zeros((40, 52, 3), np.uint8)), "mask .*image_0.png has mode RGB"),
    "no class": (save(np.full((40, 52), 21, np.uint8)),
                 "mask .*image_0.png has the value 21, .* 21 class indices"),
    "no mask": (lambda image, mask: mask.unlink(), "Class/image_0.png does not exist"),
    "no image": (lambda image, mask: image.unlink(), "no image image_0 .* in .*JPEGImages"),
    "cut image": (
        lambda image, mask: image.write_bytes(image.read_bytes()[:2000]), "image_0.png cannot be read",
    ),
    "text file": (lambda image, mask: mask.write_text("mask"), "image_0.png cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_error_names_the_file_and_the_fault(world, tmp_path, case):
    damage, message = DAMAGED[case]
    assert re.search(message, error_message(world, tmp_path, damage))


def test_check_files_raises_for_a_missing_image_or_mask(world, tmp_path):
    names = (world / "train.txt").read_text().split()
    check_files(names, world / "JPEGImages", world / "SegmentationClass")
    with pytest.raises(FileNotFoundError, match="no image absent"):
        check_files([*names, "absent"], world / "JPEGImages", world / "SegmentationClass")
    write_mask(tmp_path / "image_0.png", np.zeros((2, 2), np.uint8), voc_palette())
    with pytest.raises(FileNotFoundError, match=r"mask .*image_1.png of image image_1 does not exist"):
        check_files(names, world / "JPEGImages", tmp_path)


def test_read_labels_accepts_class_indices_and_255_only(tmp_path):
    labels = np.array([[0, 3, 255]], np.uint8)
    write_mask(tmp_path / "m.png", labels, voc_palette())
    np.testing.assert_array_equal(read_labels(tmp_path, "m", 4, (1, 3)), labels)
    write_mask(tmp_path / "m.png", np.array([[0, 4, 255]], np.uint8), voc_palette())
    with pytest.raises(ValueError, match=r"m.png has the value 4, .* 4 class indices \(0 to 3\) or 255"):
        read_labels(tmp_path, "m", 4, (1, 3))
