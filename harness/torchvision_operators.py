"""Lets torchvision be imported where its compiled part does not match the installed torch.

`harness.environment` copies this file into site-packages, beside a `.pth` file that imports it at interpreter start,
and only where a plain `import torchvision` fails ("operator torchvision::nms does not exist", seen with CPU builds of
torch). ComfyUI imports torchvision at module level but needs neither operator on the paths used here. It must stay
self-contained and cheap: torch is imported no earlier than torchvision itself would import it.
"""

import sys


class _DeclareOperators:
    """A meta path finder that finds nothing, but declares the missing operators before torchvision's first import."""

    def find_spec(self, name, path=None, target=None):
        """Asked for every module that is imported for the first time."""
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")  # the operators live as long as this object
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules[__name__].declared = self
        return None


sys.meta_path.insert(0, _DeclareOperators())
