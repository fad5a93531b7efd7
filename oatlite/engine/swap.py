"""The weights of policy and reference in host memory, to hold one in the place of the other for a while."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Weights = dict[str, "torch.Tensor"]


class SwappedWeights:
    """Of the two models at paths ``policy`` and ``reference``, which ``load`` gives; names are Hugging Face's.

    The policy's are those of the last sync, and those at its path before the first.
    """

    def __init__(self, policy: str, reference: str, load: Callable[[str], Any], *, is_pinned: bool) -> None:
        self._policy_path = policy
        self._reference_path = reference
        self._load = load
        self._is_pinned = is_pinned
        self._policy: Weights = {}
        self._reference: Weights = {}

    def share_reference(self, model: Any) -> None:
        """Take the parameters of a reference that is loaded already, wherever they are."""
        self._reference = _named(model)

    def keep(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Copy what a sync brings of the policy."""
        import torch

        for name, tensor in tensors:
            if name not in self._policy:
                self._policy[name] = torch.empty_like(tensor, device="cpu", pin_memory=self._is_pinned)
            self._policy[name].copy_(tensor)

    def reference(self) -> Mapping[str, torch.Tensor]:
        if not self._reference:
            weights = _named(self._load(self._reference_path))
            # A GPU copies from pinned memory at full speed.
            self._reference = {name: one.pin_memory() for name, one in weights.items()} if self._is_pinned else weights
        return self._reference

    def policy(self) -> Mapping[str, torch.Tensor]:
        if self._policy:
            return self._policy
        is_reference = self._policy_path == self._reference_path
        return self.reference() if is_reference else _named(self._load(self._policy_path))


def _named(model: Any) -> Weights:
    return {name: parameter.data for name, parameter in model.named_parameters()}
