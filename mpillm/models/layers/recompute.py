"""Recompute activations in the backward pass instead of keeping them (Chen et al., "Training deep
nets with sublinear memory cost", 2016).

The forward pass keeps the arguments of a layer, and a handle in place of each tensor that autograd
saves. The first handle that a backward pass opens runs the layer again, which fills all of them.
Each tensor then lives as long as its handle, and so as long as autograd keeps what it saved.

The rule for a backward pass in two halves (split_backward.py): the input half recomputes, once. The
weight half opens the same handles, so between the halves the activations live as they do without
recomputation. torch.utils.checkpoint fills its handles again in each call of autograd: it would
recompute once for each group of weights.
"""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return `function(*arguments)`, whose backward pass calls it again.

    `function` must compute the same each time: no random numbers but those of its arguments. The
    first argument is a tensor. Where no gradient is wanted, it is a plain call.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    frame = _Frame(function, arguments)
    with saved_tensors_hooks(frame.make_handle, _open):
        return function(*arguments)


class _Handle:
    """The place of a tensor that autograd saved: empty until its frame runs."""

    __slots__ = ("__weakref__", "frame", "tensor")

    def __init__(self, frame: "_Frame") -> None:
        self.frame: _Frame | None = frame
        self.tensor: Tensor | None = None


def _open(handle: _Handle) -> Tensor:
    if handle.frame is not None:
        handle.frame.run()
    assert handle.tensor is not None
    return handle.tensor


class _Frame:
    """One call of a layer: its arguments, and the handles that another call will fill."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._function = function
        # Detached: the second call builds a graph of its own, which ends here.
        self._arguments = [_leaf(argument) for argument in arguments]
        # Autograd alone keeps the handles: no cycle holds the arguments when a graph is dropped.
        self._handles: list[weakref.ref[_Handle]] = []
        self._autocast = _autocast_now(arguments[0].device.type)

    def make_handle(self, saved: Tensor) -> _Handle:
        handle = _Handle(self)
        self._handles.append(weakref.ref(handle))
        return handle

    def run(self) -> None:
        """Call the layer again, and put each tensor that autograd saves into its handle."""
        waiting = iter(self._handles)
        left = len(self._handles)

        def fill(saved: Tensor) -> None:
            nonlocal left
            handle, left = next(waiting)(), left - 1
            if handle is not None:
                # Without its frame: a handle that waits for the weight half keeps no arguments.
                handle.tensor, handle.frame = saved, None
            if not left:
                # The layer's last operation saves its inputs before it computes: its result is
                # not needed.
                raise _Filled

        # The graph of this call keeps nothing: `fill` returns None in place of each tensor.
        hooks = saved_tensors_hooks(fill, _refuse)
        with suppress(_Filled), torch.enable_grad(), self._autocast, hooks:
            self._function(*self._arguments)
        assert not left, "a layer that is recomputed saves the same tensors each time"


def _leaf(argument: Any) -> Any:
    """Return a tensor without its graph; anything else as it is."""
    if not isinstance(argument, Tensor):
        return argument
    return argument.detach().requires_grad_(argument.requires_grad)


class _Filled(Exception):
    """All handles of a frame are filled."""


def _refuse(saved: None) -> Tensor:
    raise AssertionError("the graph of a recomputation has no backward pass")


def _autocast_now(device: str) -> AbstractContextManager[object]:
    """Return the autocast of this moment: a backward pass runs outside of it."""
    return torch.autocast(
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
        cache_enabled=torch.is_autocast_cache_enabled(),
    )
