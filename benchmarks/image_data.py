"""The images that `images.py` trains on: where they come from, and how they are cut."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

ON_THE_HUB = {
    "mnist": ("ylecun/mnist", "image"),
    "fashion_mnist": ("zalando-datasets/fashion_mnist", "image"),
    "cifar10": ("uoft-cs/cifar10", "img"),
    "celeba": ("flwrlabs/celeba", "image"),
}
# RealNVP, section 4.1: the middle of each picture, and the side that it is shrunk to.
CROPS = {"celeba": (148, 64)}
HELD_OUT = 0.1  # of data that come without a test set


def load(name: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Return images to train on and to hold out, (n, C, H, W), and their number of grey levels."""
    if name == "digits":
        from sklearn.datasets import load_digits

        return (*split(channels_first(load_digits().images.astype("uint8"))), 17)
    if name in ON_THE_HUB:
        return (*from_the_hub(*ON_THE_HUB[name], *CROPS.get(name, (None, None))), 256)
    path = Path(name)
    if not path.is_file():
        raise SystemExit(
            f"--data {name}: no such file; pass digits, {', '.join(ON_THE_HUB)} or an .npz file "
            "with x_train and x_test"
        )
    with np.load(path) as file:
        if "x_train" in file:
            return channels_first(file["x_train"]), channels_first(file["x_test"]), 256
        return (*split(channels_first(file["x"])), 256)


def from_the_hub(
    repository: str, column: str, side: int | None, size: int | None
) -> tuple[np.ndarray, np.ndarray]:
    if not importlib.util.find_spec("datasets"):
        raise SystemExit(
            "--data: this set comes from the Hugging Face hub: pip install datasets, or pass the "
            "path of an .npz file with x_train and x_test"
        )
    from datasets import load_dataset

    sets = load_dataset(repository)
    return tuple(
        channels_first(np.stack([pixels(image, side, size) for image in sets[part][column]]))
        for part in ("train", "test")
    )


def pixels(image: Any, side: int | None, size: int | None) -> np.ndarray:
    """Return a picture's pixels; of its middle, `side` pixels wide, shrunk to `size`."""
    if side is None:
        return np.asarray(image)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)).resize((size, size)))


def middle(x: np.ndarray, crop: int | None) -> np.ndarray:
    """Cut the middle out of images; random windows are for training."""
    if crop is None:
        return x
    top, left = ((side - crop) // 2 for side in x.shape[-2:])
    return x[..., top : top + crop, left : left + crop]


def channels_first(x: np.ndarray) -> np.ndarray:
    return x[:, None] if x.ndim == 3 else np.moveaxis(x, -1, 1)


def validation(x: np.ndarray, crop: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Keep some of the training images back, to stop by and to choose the parameters by."""
    count = min(500, int(HELD_OUT * len(x)))
    return x[:-count], middle(x[-count:], crop)


def split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hold out the last of data that come without a test set."""
    count = int(HELD_OUT * len(x))
    return x[:-count], x[-count:]
