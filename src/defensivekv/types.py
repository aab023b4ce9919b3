"""Shapes as types. Letters are the same everywhere.

b  batch rows              h  key-value heads          g  query heads per key-value head
q  query heads (h * g)     w  window queries           t  tokens of the prompt
n  scored tokens (t less the protected window)         d  size of a query or key head
m  slots of a head that entries stand in
v  size of a value head    s  stored entries           x  query positions
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

Queries = Float[Tensor, "b q w d"]
Keys = Float[Tensor, "b h t d"]
Values = Float[Tensor, "b h t v"]
OutputProjection = Float[Tensor, "hidden qv"]

Importance = Float[Tensor, "h g w n"]
HeadScores = Float[Tensor, "h n"]
SlotScores = Float[Tensor, "h m"]
LayerScores = Float[Tensor, "b h t"]
Kept = Bool[Tensor, "b h t"]

Positions = Int[Tensor, " s"]
