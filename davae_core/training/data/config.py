"""Which images a training is on, and how they are cut."""

from dataclasses import dataclass

from ...errors import DAVAEError


@dataclass(frozen=True)
class DataConfig:
    """Where the images are and how they are cut."""

    images: tuple[str, ...]
    """Folders of images (png, jpg, webp, bmp, tiff, gif, avif; searched recursively) and WebDataset shards (.tar, with
    * and {000..012}). The caption of an image is in a .txt, .caption or .json (key "caption", text or list) of the same
    name. Settings of a folder follow after two colons each: "cats::repeats=3::prefix=a photo of::suffix=, film" goes
    through cats three times an epoch and puts these words before and after its captions; "cats::size=512" cuts its
    images to that size, so that a model learns several: name a folder once for each."""
    size: int = 1024
    """Side of the square that images are cut to; with buckets the square root of their area. The largest, where folders
    have sizes of their own."""
    buckets: bool = False
    """Cut to about the image's own aspect ratio, from 1:2 to 2:1, instead of a square."""
    enlarge: bool = False
    """Enlarge images that are smaller than that, instead of leaving them out. Enlarged photographs teach that there is
    no detail."""
    held_out: tuple[str, ...] = ()
    """Images to measure on and never to train on: a share of all, as "2%", chosen by their content, or folders and
    shards of their own. Copies of these are not trained on either."""
    random_crop: bool = False
    """Crop at a random place instead of the centre."""
    flip: bool = True
    """Mirror half of the images, chosen anew every time."""
    workers: int = 2
    """Processes that load images; 0 loads in the training process."""
    cache: bool = False
    """Keep all images in memory after the first reading, as they are before cropping, and load in the training process.
    For small sets."""
    max_broken: int = 10
    """Unreadable images that are named and left out; at one more, training stops."""

    def __post_init__(self) -> None:
        if self.size < 1 or self.workers < 0 or self.max_broken < 0:
            raise DAVAEError(f"size must be at least 1, workers and max_broken not negative, got {self}")
        shares = [entry for entry in self.held_out if entry.endswith("%")]
        if shares and (len(self.held_out) > 1 or not 0 < self.held_share <= 0.5):
            raise DAVAEError(
                f"--data.held-out is one share above 0% and up to 50%, or folders and shards, got {self.held_out}"
            )

    @property
    def held_share(self) -> float:
        """The share of images that is held out; 0 where folders or none are."""
        if len(self.held_out) != 1 or not self.held_out[0].endswith("%"):
            return 0.0
        try:
            return float(self.held_out[0][:-1]) / 100
        except ValueError:
            return 0.0

    @property
    def held_folders(self) -> tuple[str, ...]:
        """The folders and shards that are held out."""
        return () if self.held_share else self.held_out
