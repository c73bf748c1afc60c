"""Where the datasets of the MNIST family live, and how their files are recognized."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True)
class Source:
    """A dataset in `sources.toml`, where the fields are explained."""

    url: str
    torchvision: str
    sha256: list[str]
    unzipped_sha256: list[str]


SOURCES = {
    name: Source(**fields)
    for name, fields in tomllib.loads(
        Path(__file__).with_name("sources.toml").read_text(encoding="utf-8")
    ).items()
}
