"""Class names of other tools are matched to classes."""
import pytest

from segmentation.class_names import find_class


@pytest.mark.parametrize(
    ("name", "classes", "index"),
    [
        ("dog", ["cat", "dog"], 1),
        (" dog\n", ["cat", "dog"], 1),
        ("DOG", ["cat", "dog"], 1),
        ("hot_dog", ["dog", "Hot-Dog"], 1),
        ("hot  dog", ["dog", "hot dog"], 1),
        ("Dog", ["dog", "Dog"], 1),
        ("DOG", ["dog", "Dog"], None),
        ("hotdog", ["hot dog"], None),
        ("cafe\u0301", ["caf\u00e9"], 0),
        ("", ["dog"], None),
    ],
)
def test_find_class_ignores_case_and_separators_without_an_exact_match(name, classes, index):
    assert find_class(name, classes) == index
