"""Images by number, in an order of the seed alone.

They lie in folders of a class each (ImageFolder) or in WebDataset tars.

    train = open_images("imagenet", "train", transform, seed=0)
    image, label = train[i]

Both kinds are map-style: a tar is indexed once, then its images are read by their offsets. So
sample i depends on (seed, i) alone, whichever process reads it, and a run that takes its samples by
number resumes exactly.
"""

from __future__ import annotations

import io
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from examples.data.order import Order
from examples.data.tars import Tars

log = logging.getLogger(__name__)


class Source(Protocol):
    """Where the images lie: item 0 to len() - 1."""

    num_classes: int

    def __len__(self) -> int: ...
    def label(self, item: int) -> int: ...
    def read(self, item: int) -> bytes: ...
    def name(self, item: int) -> str: ...


class Images(Dataset[tuple[Any, int]]):
    """``images[i]`` is (transform(image), label), the image in RGB, for any i >= 0.

    `len()` samples are an epoch. The random numbers that a transform takes from torch, NumPy and
    Python depend on (seed, i); those that the process draws otherwise are not disturbed.

    ValueError: an image that cannot be read, unless `on_error` is "skip": then its name is logged,
    once in each process, and the next image that can be read is taken in its place. IndexError:
    i < 0.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Image.Image], Any] | None = None,
        seed: int = 0,
        on_error: str = "raise",
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f'on_error takes "raise" or "skip", got {on_error!r}')
        self.source, self.transform, self.on_error = source, transform, on_error
        self.num_classes = source.num_classes
        self.order = Order(len(source), seed)
        self._logged: set[int] = set()

    def __len__(self) -> int:
        return self.order.count

    def __getitem__(self, i: int) -> tuple[Any, int]:
        first = self.order(i)
        for step in range(len(self) if self.on_error == "skip" else 1):
            item = (first + step) % len(self)
            try:
                image = _decode(self.source.read(item))
            except Unreadable as error:
                got = f"{self.source.name(item)}: {error}"
                sentence = f"an image takes a format that Pillow reads, got {got}"
                if self.on_error == "raise":
                    raise ValueError(sentence) from None
                if item not in self._logged:
                    log.warning("%s; the next is taken in its place", sentence)
                    self._logged.add(item)
                continue
            if self.transform is None:
                return image, self.source.label(item)
            with _seeded(self.order.seed, int(i)):
                return self.transform(image), self.source.label(item)
        raise ValueError(f"images take one that can be read, got {len(self)} that cannot")


class Unreadable(Exception):
    """Bytes that are not an image."""


def _decode(data: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data)) as image:
            rgb: Image.Image = image.convert("RGB")
            return rgb
    # Pillow's formats fail with OSError, SyntaxError, struct.error and others.
    except Exception as error:
        reason = "is none" if isinstance(error, UnidentifiedImageError) else str(error)
        raise Unreadable(f"{len(data)} bytes, {reason}") from None


@contextmanager
def _seeded(seed: int, i: int) -> Iterator[None]:
    """Within it, the global generators that transforms draw from start from (seed, i)."""
    python, legacy = random.getstate(), numpy.random.get_state()
    words = numpy.random.SeedSequence([seed, i]).generate_state(3)
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reset the GPUs' generators, too.
        torch.default_generator.manual_seed(int(words[0]))
        numpy.random.seed(words[1])
        random.seed(int(words[2]))
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(legacy)


class Folder:
    """An ImageFolder, whose classes are its folders in the order of their names."""

    def __init__(self, root: Path) -> None:
        try:
            from torchvision.datasets import ImageFolder
        except ModuleNotFoundError:
            takes = "path takes `pip install torchvision` for folders of images"
            raise ValueError(f"{takes}, got {root}") from None
        try:
            folder = ImageFolder(str(root))
        except FileNotFoundError as error:
            takes = "path takes images in every class' folder"
            raise ValueError(f"{takes}, got {root}: {error}") from None
        self.classes: list[str] = folder.classes
        self.num_classes = len(folder.classes)
        self._paths: list[str] = [path for path, _ in folder.samples]
        self._labels = numpy.array([label for _, label in folder.samples], dtype=numpy.int32)

    def __len__(self) -> int:
        return len(self._paths)

    def label(self, item: int) -> int:
        return int(self._labels[item])

    def read(self, item: int) -> bytes:
        return Path(self._paths[item]).read_bytes()

    def name(self, item: int) -> str:
        return self._paths[item]


def open_images(
    path: str | Path,
    split: str,
    transform: Callable[[Image.Image], Any] | None = None,
    seed: int = 0,
    on_error: str = "raise",
) -> Images:
    """The images of path/split, which holds WebDataset tars or an ImageFolder's folders.

    ValueError of one sentence: a folder that is missing or has neither, a tar that is cut short, an
    image without a label, class folders that are not those of path/train.
    """
    root = Path(path, split)
    if not root.is_dir():
        entries = Path(path).iterdir() if Path(path).is_dir() else ()
        there = ", ".join(sorted(entry.name for entry in entries if entry.is_dir())) or "none"
        raise ValueError(f"split takes a folder in {path}, got {split}, and there is {there}")
    tars = sorted(root.glob("*.tar"))
    if tars:
        return Images(Tars(tars), transform, seed, on_error)
    folder, train = Folder(root), Path(path, "train")
    if split != "train" and train.is_dir():
        # Labels are numbers in the order of the names: with a folder less they mean other classes.
        classes = sorted(entry.name for entry in train.iterdir() if entry.is_dir())
        if classes != folder.classes:
            differing = ", ".join(sorted(set(classes) ^ set(folder.classes))[:5])
            got = f"{root}, which differs in {differing}"
            raise ValueError(f"{split} takes the class folders of train, got {got}")
    return Images(folder, transform, seed, on_error)
