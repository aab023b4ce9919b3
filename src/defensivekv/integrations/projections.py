"""Where models have the projection that maps attention's heads to the residual stream."""

from torch import nn

OUTPUT_PROJECTIONS = ("o_proj", "dense", "out_proj", "c_proj")
"""Its names, in attention modules."""


def find_projection(module: nn.Module) -> nn.Module | None:
    """The first of these names that the attention module has."""
    found = (getattr(module, name, None) for name in OUTPUT_PROJECTIONS)
    return next((projection for projection in found if isinstance(projection, nn.Module)), None)
