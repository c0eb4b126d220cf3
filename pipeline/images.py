"""What an image model needs to know of its examples, before there is a model or torch."""

from pipeline.errors import InputError


def image_shape(model: str, input_shape: tuple[int, ...], *, patch: int = 1, least: int = 1) -> tuple[int, int, int]:
    """Channels, height and width of one example.

    Args:
        model: name of the model, for messages.
        input_shape: shape of one example.
        patch: both sides must be multiples of it.
        least: both sides must be at least this.

    Raises:
        InputError: if the examples are no images, or none that the model takes.
    """
    what = f"model.name = {model}: one example has shape {input_shape}"
    if len(input_shape) != 3:
        raise InputError(
            f'{what}; must be (channels, height, width): give the digits as images with data.shape = "image", '
            "or a file whose x is (n, channels, height, width)"
        )
    channels, height, width = input_shape
    if height % patch or width % patch:
        raise InputError(f"{what}; height and width must be multiples of model.patch = {patch}: choose another patch")
    if min(height, width) < least:
        raise InputError(f"{what}; height and width must be at least {least}: choose fewer layers or larger images")
    return channels, height, width
