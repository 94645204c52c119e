"""`Encoder`: every token looks at all others; heads for masked tokens, classes, whole sentences."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.networks.blocks.activations import ACTIVATIONS
from diba_np.networks.blocks.block import Back
from diba_np.networks.inputs import as_arrays, as_ids, as_mask
from diba_np.networks.network import Network
from diba_np.networks.steps import Linear, State, StateBack

Array = NDArray[Any]


class Encoder(Network):
    """A network that reads whole rows; see `Network`.

    Its head is for masked tokens where the source has one, else for classes.
    """

    def begin(self, inputs: ArrayLike, mask: ArrayLike | None = None) -> State:
        """Return the state before the first step: ids and mask (S, T), or patches."""
        if not self.config.vocabulary:
            if mask is not None:
                raise ValueError("mask must be left out where patches are read")
            patches = self._patches(inputs)
            beside = sum(self.tensors.find(place) is not None for place in ("first", "second"))
            return {
                "patches": patches,
                "mask": np.ones((len(patches), patches.shape[1] + beside), bool),
            }
        ids = as_ids(inputs, self.config)
        return {"ids": ids, "mask": as_mask(mask, ids.shape)}

    def _patches(self, inputs: ArrayLike) -> Array:
        """Return the patches (S, patches, channels rows columns) of images or spectrograms."""
        c = self.config
        images = as_arrays(inputs)
        if self.kind.pool == "pair":  # spectrograms come frame by frame
            images = images[:, None].swapaxes(2, 3) if images.ndim == 3 else images
            expected: tuple[int, ...] = c.image[::-1]
        else:
            expected = (c.channels, *c.image)
        if images.ndim != 4 or images.shape[1:] != (c.channels, *c.image):
            wanted = ", ".join(map(str, expected))
            raise ValueError(f"inputs must have shape (S, {wanted}), got {np.shape(inputs)}")
        windows = np.lib.stride_tricks.sliding_window_view(images, c.patch, axis=(2, 3))
        windows = windows[:, :, :: c.stride[0], :: c.stride[1]].transpose(0, 2, 3, 1, 4, 5)
        return windows.reshape(len(images), -1, windows[0, 0, 0].size).astype(self.dtype)

    def start(self, state: State, linear: Linear) -> tuple[State, StateBack]:
        """Return the state with the embeddings "x" in the place of what was read."""
        rest = dict(state)
        if "patches" in rest:
            x, back_x = self._start_patches(rest.pop("patches"), linear)
        else:
            x, back_x = self._start_tokens(rest.pop("ids"), rest["mask"])

        def back(gradients: State) -> State:
            back_x(gradients["x"])
            return {}

        return {**rest, "x": x}, back

    def _start_tokens(self, ids: Array, mask: Array) -> tuple[Array, Any]:
        c, find = self.config, self.tensors.find
        x, back_tokens = self.layers[str(self.token_name)].lookup(ids)
        at = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        if c.first_position:  # padding has the position before the first
            at = np.where(mask, np.cumsum(mask, axis=1), 0) + c.first_position - 1
        backs = [back_tokens]
        for name, numbers in ((find("positions"), at), (find("types"), np.zeros_like(ids))):
            if name is not None:
                table: Any = self.blocks[name]
                more, back_more = table.forward(numbers)
                x = x + more
                backs.append(back_more)
        norm: Any = self.blocks[self.tensors.need("start_norm")]
        y, back_norm = norm.forward(x)

        def back(gradient: Array) -> None:
            g = back_norm(gradient)
            for step in backs:
                step(g)

        return y, back

    def _start_patches(self, patches: Array, linear: Linear) -> tuple[Array, Any]:
        y, pull = linear(self.tensors.need("patches"), patches)
        pair = [self.tensors.find(place) for place in ("first", "second")]
        names = [name for name in pair if name is not None]
        before = [
            np.broadcast_to(self.blocks[name].parameters[""], (len(y), 1, y.shape[2]))
            for name in names
        ]
        places = self.blocks[self.tensors.need("places")]
        x = np.concatenate([*before, y], axis=1)
        x += places.parameters[""]

        def back(gradient: Array) -> None:
            places.gradients[""] += gradient.sum(axis=0, keepdims=True)
            for i, name in enumerate(names):
                self.blocks[name].gradients[""] += gradient[:, i].sum(axis=0)
            pull(np.ascontiguousarray(gradient[:, len(names) :]))

        return x, back

    # -- heads -------------------------------------------------------------------------------------

    def head(self, x: Array, *, linear: Linear | None = None) -> tuple[Array, Back]:
        """Return the logits of last hidden states (S, T, width) and the step back.

        Raises
        ------
        ValueError
            The network has neither head.
        """
        if self.head_name is not None:
            return self.predict(x, linear)
        if self.tensors.find("classifier") is not None:
            return self.classify(x, linear)
        raise ValueError("logits need a head for masked tokens or classes, the network has none")

    def predict(self, x: Array, linear: Linear | None = None) -> tuple[Array, Back]:
        """Return the logits (..., vocabulary) of hidden states (..., width) and the step back."""
        call, need = linear or self.linear, self.tensors.need
        y, back_dense = call(need("masked_dense"), x)
        y, back_active = ACTIVATIONS[self.kind.masked_activation or self.config.activation](y)
        norm: Any = self.blocks[need("masked_norm")]
        y, back_norm = norm.forward(y)
        y, back_head = call(str(self.head_name), y)
        shift = self.blocks[f"{need('masked_bias')}."]
        y += shift.parameters["bias"]

        def back(gradient: Array) -> Array:
            shift.gradients["bias"] += gradient.reshape(-1, gradient.shape[-1]).sum(axis=0)
            return back_dense(back_active(back_norm(back_head(gradient))))

        return y, back

    def classify(self, x: Array, linear: Linear | None = None) -> tuple[Array, Back]:
        """Return the logits (S, classes) of hidden states (S, T, width) and the step back."""
        call, find = linear or self.linear, self.tensors.find
        count = 2 if self.kind.pool == "pair" else 1
        y = x[:, :count].mean(axis=1)
        steps: list[Back] = []
        pooler, norm_name = find("pooler"), find("classifier_norm")
        if pooler is not None:
            y, step = call(pooler, y)
            y, bend = ACTIVATIONS[self.kind.pool_activation](y)
            steps += [step, bend]
        if norm_name is not None:
            norm: Any = self.blocks[norm_name]
            y, step = norm.forward(y)
            steps.append(step)
        y, step = call(self.tensors.need("classifier"), y)
        steps.append(step)

        def back(gradient: Array) -> Array:
            for step in reversed(steps):
                gradient = step(gradient)
            g = np.zeros_like(x)
            g[:, :count] = gradient[:, None] / count
            return g

        return y, back
