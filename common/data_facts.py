"""What is known of the data of a run, and kept with its checkpoints for those who use it."""

from collections.abc import Mapping

from common.errors import InputError


def check_data_facts(facts: Mapping, name: str, num_classes: int | None = None) -> None:
    """Check facts that a program may have set itself, or that a file holds.

    Parameters
    ----------
    facts
        Of what it has, ``image_shape`` is (height, width), ``class_names`` are texts, and
        ``classes`` are the labels of these classes in the data, whole numbers, one for each.
    name
        What the message calls them.
    num_classes
        K of the network, where it is known.

    Raises
    ------
    InputError
        If one of them is something else.
    """
    for key, kind, count, wanted in (
        ('image_shape', int, 2, 'two whole numbers, height and width'),
        ('class_names', str, None, 'a list of texts'),
        ('classes', int, num_classes, 'a list of whole numbers, one for each class'),
    ):
        value = facts.get(key, ())
        fits = isinstance(value, list | tuple) and all(type(item) is kind for item in value)
        if key in facts and not (fits and len(value) == (count or len(value))):
            raise InputError(f'{name}: {key} has to be {wanted}, not {value!r:.200}')
