"""`Decoder`: a language model; each token looks at those before it, the head tells the next."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.networks.blocks.block import Back
from diba_np.networks.inputs import as_ids, as_mask
from diba_np.networks.network import Network
from diba_np.networks.steps import Linear, State, StateBack

Array = NDArray[Any]


class Decoder(Network):
    """A language model; see `Network`."""

    def begin(self, inputs: ArrayLike, mask: ArrayLike | None = None) -> State:
        """Return the state before the first step: ids and mask (S, T)."""
        ids = as_ids(inputs, self.config)
        return {"ids": ids, "mask": as_mask(mask, ids.shape)}

    def start(self, state: State, linear: Linear) -> tuple[State, StateBack]:
        """Return the state with the embeddings "x" in the place of the ids."""
        rest = dict(state)
        ids = rest.pop("ids")
        x, back_tokens = self.layers[str(self.token_name)].lookup(ids)
        places = self.tensors.find("positions")
        back_places = None
        if places is not None:
            table: Any = self.blocks[places]
            at = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
            more, back_places = table.forward(at)
            x = x + more

        def back(gradients: State) -> State:
            back_tokens(gradients["x"])
            if back_places is not None:
                back_places(gradients["x"])
            return {}

        return {**rest, "x": x}, back

    def head(self, x: Array, *, linear: Linear | None = None) -> tuple[Array, Back]:
        """Return the logits (..., vocabulary) of last hidden states and the step back."""
        y, back = (linear or self.linear)(self.need_head(), x)
        return y, back
