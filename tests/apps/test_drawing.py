"""Colours; boxes and masks are tested through apps.predict."""

from apps import drawing


def test_palette_tells_classes_apart():
    colours = [drawing.colour_of(index) for index in range(42)]
    assert len(set(colours[:21])) == 21
    assert colours[:21] == colours[21:]
