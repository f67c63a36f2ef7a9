"""Whether a drawing can be read."""

from itertools import combinations

from pipeline.planner.pictures.drawing import Dot, Drawing, Rectangle
from pipeline.planner.pictures.heading import Subject

SUBJECT = Subject("pretrain", "H100 80 GB", measured=False, details="CoAtNet-7, bf16; not counted: cuDNN. " * 5)
LONG = Subject("s" * 40, "W" * 40, measured=True)


def assert_readable(drawing: Drawing) -> None:
    """Nothing is outside the image, and no texts overlap."""
    boxes = [(text, text.box) for text in drawing.texts]
    for text, (left, top, right, bottom) in boxes:
        assert left >= 0, text
        assert top >= 0, text
        assert right <= drawing.width, text
        assert bottom <= drawing.height, text
    for (one, (left, top, right, bottom)), (other, (left2, top2, right2, bottom2)) in combinations(boxes, 2):
        apart = right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top
        assert apart, f"{one} and {other}"
    for shape in drawing.shapes:
        match shape:
            case Rectangle():
                corners = [(shape.left, shape.top), (shape.right, shape.bottom)]
            case Dot():
                reach = shape.radius
                corners = [(shape.x - reach, shape.y - reach), (shape.x + reach, shape.y + reach)]
            case _:
                corners = list(shape.points)
        for x, y in corners:
            assert 0 <= x <= drawing.width, shape
            assert 0 <= y <= drawing.height, shape


def words(drawing: Drawing) -> list[str]:
    """The texts."""
    return [text.text for text in drawing.texts]
