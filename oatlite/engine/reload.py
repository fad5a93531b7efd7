"""vLLM's layerwise reload of a model that is in use, and what it leaves undone.

Between :func:`begin_reload` and :func:`finish_reload` the weights come by the model's own ``load_weights``, in pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def begin_reload(model: Any, device: str) -> None:
    """From here on the old weights are given up layer by layer."""
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    if device == "cpu":
        _forget_expert_kernels(model)
    initialize_layerwise_reload(model)


def finish_reload(model: Any, model_config: Any) -> None:
    """All weights have come: complete what waits for that."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    finalize_layerwise_reload(model, model_config)
    _process_tied_layers(model)


def release(model: Any, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Clone what vLLM still holds of a bucket of ``tensors``.

    Its layerwise reload buffers the weights of a layer until the layer is complete. Buckets end on module
    boundaries, but a layer whose parameter is padded (an embedding over a vocabulary that is no multiple of 64)
    counts as incomplete until the end, and would read the bucket after it has been refilled.
    """
    import torch
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    memory = {tensor.untyped_storage().data_ptr() for _, tensor in tensors}
    for layer in model.modules():
        for _, bound in get_layerwise_info(layer).loaded_weights:
            for name, value in bound.arguments.items():
                if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in memory:
                    bound.arguments[name] = value.clone()


def _forget_expert_kernels(model: Any) -> None:
    """Let the experts of a mixture be packed anew on the CPU, where vLLM does that only with its first kernel.

    A reload would copy the plain weights to where the packed ones are expected.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, UnquantizedFusedMoEMethod):
            method.moe_kernel = None


def _process_tied_layers(model: Any) -> None:
    """Let a layer that shares another's parameter see the new values.

    An output head tied to the embedding is sent no weights, so vLLM's reload leaves it alone: right where it
    reads the shared parameter, but on CPU it multiplies by a packed copy of the old one.
    """
    owners: dict[int, torch.nn.Module] = {}
    for layer in model.modules():
        for parameter in layer.parameters(recurse=False):
            if owners.setdefault(id(parameter), layer) is not layer:
                layer.quant_method.process_weights_after_loading(layer)
