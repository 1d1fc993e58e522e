"""`BACKBONES`: what keras-hub compares a preset's backbone with, to find a class that takes several kinds."""

from keras_t5gemma.models.backbone import T5GemmaBackbone
from keras_t5gemma.models.encoder import T5GemmaEncoder


class OneOf:
    """Equals each of several classes. keras-hub's `from_preset` looks for a class whose `backbone_cls` equals another.

    Args:
        *classes: the classes.
    """

    def __init__(self, *classes: type):
        self.classes = classes

    def __eq__(self, other: object) -> bool:
        return other is self or other in self.classes

    def __hash__(self) -> int:
        return hash(self.classes)


BACKBONES = OneOf(T5GemmaEncoder, T5GemmaBackbone)
