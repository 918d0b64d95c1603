"""Perceptual distance between images: ST-LPIPS, whose weights come with a package, and LPIPS where it is installed.

Both compare the unit-length features of two images after five layers of a classifier, square the differences, weight
them by channel with learned factors, and average over positions. ST-LPIPS (Ghildyal and Liu, ECCV 2022,
https://arxiv.org/abs/2207.13686) is the variant that tolerates small shifts: its networks blur before they subsample.
Its numbers are on a scale of their own and are never to be reported as LPIPS.
"""

import importlib.util
from abc import abstractmethod
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

from .errors import DAVAEError, LatentError

PerceptualName = Literal["st-lpips-alex", "st-lpips-vgg", "lpips-alex", "lpips-vgg"]

_SHIFT = (-0.030, -0.088, -0.188)  # from [-1, 1] to the range that the classifiers were trained on
_SCALE = (0.458, 0.448, 0.450)
_SMALLEST = {"st-lpips-alex": 21, "st-lpips-vgg": 18, "lpips-alex": 31, "lpips-vgg": 16}


class PerceptualDistance(nn.Module):
    """Two images to one distance each; frozen, always in eval mode, differentiable with respect to both images.

    Attributes:
        name: the metric to report, as given to :func:`load_perceptual`.
        smallest: the shortest side accepted, in pixels.
    """

    def __init__(self, name: PerceptualName) -> None:
        super().__init__()
        self.name: PerceptualName = name
        self.smallest = _SMALLEST[name]

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Distances, float32 ``[B]``, at least 0, between ``a`` and ``b``, ``[B, 3, H, W]`` in [-1, 1].

        Raises:
            LatentError: the shapes differ, are not those of RGB images, or a side is too short for the network.
        """
        if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3:
            raise LatentError(
                f"{self.name} compares two [B, 3, H, W] images of one shape; given {[*a.shape]}, {[*b.shape]}"
            )
        if min(a.shape[2:]) < self.smallest:
            raise LatentError(
                f"{self.name} needs images of at least {self.smallest} px a side; given {a.shape[3]} x {a.shape[2]}. "
                "Enlarge both, or compare larger crops"
            )
        return self._distance(a, b)

    @abstractmethod
    def _distance(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor: ...

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Stay in eval mode, whatever the module that holds this one is set to."""
        return super().train(False)


def load_perceptual(name: PerceptualName) -> PerceptualDistance:
    """The frozen metric of that name, on the CPU in float32.

    ``st-lpips-*`` read the weights inside the installed package ``stlpips_pytorch``, without importing it.
    ``lpips-*`` use the package ``lpips``, which may download the weights of its classifier.

    Raises:
        DAVAEError: the name is unknown, or the package or its weights are missing or damaged.
    """
    if name not in get_args(PerceptualName):
        raise DAVAEError(f"unknown perceptual distance {name!r}; choose one of {', '.join(get_args(PerceptualName))}")
    metric: PerceptualDistance = _ShiftTolerant(name).load() if name.startswith("st-") else _Classic(name)
    return metric.requires_grad_(False).eval()


def perceptual_shape(name: PerceptualName) -> PerceptualDistance:
    """The network of that name without its weights, to count what it needs; reads no file. LPIPS is as ST-LPIPS."""
    return _ShiftTolerant("st-lpips-alex" if name.endswith("alex") else "st-lpips-vgg").requires_grad_(False).eval()


class _ShiftTolerant(PerceptualDistance):
    """ST-LPIPS; parameters are named as in the package's files, so that they load as they are."""

    def __init__(self, name: PerceptualName) -> None:
        super().__init__(name)
        stages, widths = _alex() if name == "st-lpips-alex" else _vgg()
        self.scaling_layer = _Scaling()
        self.net = _numbered(stages)
        for i, width in enumerate(widths):
            self.add_module(f"lin{i}", _Head(width))

    def load(self) -> "_ShiftTolerant":
        """Read the weights; raises as :func:`load_perceptual` does."""
        path = _package_weights(self.name)
        try:
            self.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as problem:  # a damaged pickle can raise anything
            raise DAVAEError(
                f"{path.name} does not hold the {self.name} weights ({type(problem).__name__}). Install them again: "
                "pip install --no-deps --force-reinstall stlpips_pytorch==0.0.2"
            ) from problem
        return self

    def _distance(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a, b = self.scaling_layer(a), self.scaling_layer(b)
        total = a.new_zeros(len(a))
        for i, stage in enumerate(self.net.children()):
            a, b = stage(a), stage(b)
            total = total + self.get_submodule(f"lin{i}")(_unit(a), _unit(b))
        return total


class _Scaling(nn.Module):
    """From [-1, 1] to the classifiers' input, float32."""

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() - self.shift) / self.scale


class _Head(nn.Module):
    """One weight per channel on the mean squared difference of two feature maps ``[B, C, h, w]``; gives ``[B]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"1": nn.Conv2d(width, 1, 1, bias=False)})

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        weight = self.get_parameter("model.1.weight").flatten()
        return ((a - b).square().mean((2, 3)) * weight).sum(1)  # no convolution: autocast would round the differences


class _Blur(nn.Module):
    """Half the size through a binomial filter, two pixels mirrored at each side: n px become (n + 1) // 2 + 1."""

    filt: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("filt", torch.empty(width, 1, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), self.filt, stride=2, groups=x.shape[1])


def _unit(features: torch.Tensor) -> torch.Tensor:
    """Length one at each position, in float32; where all channels are zero they stay so, and so does the gradient."""
    return F.normalize(features.float(), dim=1, eps=1e-10)


def _alex() -> tuple[list[list[nn.Module]], list[int]]:
    """AlexNet's convolutions without their stride; the first blur stands before the activation."""
    relu = nn.ReLU(inplace=True)
    stages: list[list[nn.Module]] = [
        [nn.Conv2d(3, 64, 11, padding=2), _Blur(64), relu],
        [nn.MaxPool2d(3, 1), _Blur(64), nn.Conv2d(64, 192, 5, padding=2), relu],
        [nn.MaxPool2d(3, 1), _Blur(192), nn.Conv2d(192, 384, 3, padding=1), relu],
        [nn.Conv2d(384, 256, 3, padding=1), relu],
        [nn.Conv2d(256, 256, 3, padding=1), relu],
    ]
    return stages, [64, 192, 384, 256, 256]


def _vgg() -> tuple[list[list[nn.Module]], list[int]]:
    """VGG-16's convolutions up to the last activation."""
    stages: list[list[nn.Module]] = []
    widths = [64, 128, 256, 512, 512]
    before = 3
    for convolutions, width in zip((2, 2, 3, 3, 3), widths, strict=True):
        stage: list[nn.Module] = [nn.MaxPool2d(2, 1), _Blur(before)] if stages else []
        for _ in range(convolutions):
            stage += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(inplace=True)]
            before = width
        stages.append(stage)
    return stages, widths


def _numbered(stages: list[list[nn.Module]]) -> nn.Module:
    """``slice1``, ``slice2``, ... whose layers are numbered through all of them."""
    net, number = nn.Module(), 0
    for i, stage in enumerate(stages, 1):
        layers = nn.Sequential()
        for layer in stage:
            layers.add_module(str(number), layer)
            number += 1
        net.add_module(f"slice{i}", layers)
    return net


def _package_weights(name: PerceptualName) -> Path:
    found = importlib.util.find_spec("stlpips_pytorch")
    for folder in (found.submodule_search_locations or ()) if found else ():
        path = Path(folder, "weights", "vST0.0", f"{name.removeprefix('st-lpips-')}_shift_tolerant.pth")
        if path.is_file():
            return path
    raise DAVAEError(
        f"{name} needs the weights in the package stlpips_pytorch, which is "
        f"{'installed without them' if found else 'not installed'}: pip install --no-deps stlpips_pytorch==0.0.2 "
        "(only its files are read; it is not imported). The metric is ST-LPIPS, a shift-tolerant variant, and never to "
        "be reported as LPIPS"
    )


class _Classic(PerceptualDistance):
    """LPIPS 0.1 of the package ``lpips``."""

    def __init__(self, name: PerceptualName) -> None:
        super().__init__(name)
        try:
            import lpips
        except ImportError as problem:
            raise DAVAEError(
                f"{name} needs the package lpips with torchvision ({problem}): pip install lpips. It downloads the "
                "weights of its classifier when first used; st-lpips-alex works offline: "
                "pip install --no-deps stlpips_pytorch==0.0.2"
            ) from problem
        try:
            self.metric = lpips.LPIPS(net=name.removeprefix("lpips-"), verbose=False)
        except OSError as problem:
            raise DAVAEError(
                f"{name} could not get the weights of its classifier ({problem}). Connect to the network once, or use "
                "st-lpips-alex, which works offline"
            ) from problem

    def _distance(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.metric(a.float(), b.float()).float().flatten()
