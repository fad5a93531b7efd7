"""Low-rank adapters (LoRA, arXiv 2106.09685), by peft: what is trained, what the actors are sent, what is saved.

The policy is the base with its adapter, and the base alone, the adapter off, is the reference. Actors are sent either
*merged* weights, under the names that the base has without an adapter, or the *adapter* alone, which a vLLM engine
adds to its own copy of the base.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oatlite.config.schema import LoraConfig
from oatlite.errors import ConfigError

PEFT_PREFIX = "base_model.model."  # what peft and vLLM expect before a module's name in an adapter's file
HAS_ADAPTER = "give a folder such as runs/NAME/adapter"
_NAME = "default"
_ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterOptions:
    """The adapter adds ``alpha / rank`` times the product of two matrices to the weights of each target.

    ``targets`` are the last parts of modules' names; none: every linear layer but the output head.
    """

    rank: int
    alpha: int
    targets: tuple[str, ...] = ()


def adapter_of(config: LoraConfig) -> AdapterOptions | None:
    """The adapter that a resolved configuration asks for, if it does."""
    if not config.rank:
        return None
    assert config.alpha is not None, "resolved first"
    return AdapterOptions(rank=config.rank, alpha=config.alpha, targets=config.targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A tensor that is sent under a name of its own: ``value`` makes it of the parameters called ``sources``.

    ``value`` gets a function from a source's name to the whole parameter.
    """

    shape: tuple[int, ...]
    sources: tuple[str, ...]
    value: Callable[[Callable[[str], torch.Tensor]], torch.Tensor]


def all_parameters(model: nn.Module) -> dict[str, Published]:
    """Every parameter by name, as it is or, where it has 4 bits a weight, as what these stand for."""
    return {
        name: Published(shape=_shape(parameter), sources=(name,), value=_whole(name, parameter))
        for name, parameter in model.named_parameters()
    }


def _shape(parameter: Any) -> tuple[int, ...]:
    state = getattr(parameter, "quant_state", None)
    return tuple(parameter.shape if state is None else state.shape)


def _whole(name: str, parameter: Any) -> Callable[[Callable[[str], torch.Tensor]], torch.Tensor]:
    if getattr(parameter, "quant_state", None) is None:
        return _same(name)

    def value(get: Callable[[str], torch.Tensor]) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(get(name), parameter.quant_state)

    return value


def _same(name: str) -> Callable[[Callable[[str], torch.Tensor]], torch.Tensor]:
    return lambda parameter: parameter(name)


def add_adapter(model: nn.Module, options: AdapterOptions, seed: int) -> None:
    """Freeze ``model`` and put an adapter into it that changes nothing yet; its random half is drawn from ``seed``.

    Raises ConfigError for targets that are not there, or are no linear layers, or the output head.
    """
    import peft
    from transformers.pytorch_utils import Conv1D

    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        target_modules=list(options.targets) or _ALL_LINEAR,
    )
    head = model.get_output_embeddings()  # type: ignore[operator]
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    fix = f"name some of {', '.join(sorted(linear))}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(config, model, adapter_name=_NAME)
        except ValueError as error:
            raise ConfigError(f"lora.targets: {str(error).splitlines()[0]}", fix) from error
    head = model.get_output_embeddings()  # type: ignore[operator]  # which is another, if it was a target
    for name, layer in _adapted(model):
        if layer is head or not isinstance(layer.get_base_layer(), nn.Linear | Conv1D):
            raise ConfigError(
                f"lora.targets names {name.rpartition('.')[2]}, which is no linear layer within the network", fix
            )


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def merged_parameters(model: nn.Module) -> dict[str, Published]:
    """Every parameter of the base, those of the targets with the adapter added in float32, under the base's names.

    Where they are sent in bfloat16, what the adapter adds is rounded together with the weight.
    """
    found = all_parameters(model)
    for name, layer in _adapted(model):
        for key in [key for key in found if key.startswith(f"{name}.lora_")]:
            del found[key]
        weight = f"{name}.base_layer.weight"
        pair = tuple(f"{name}.lora_{side}.{_NAME}.weight" for side in "AB")
        found[weight] = Published(
            shape=found[weight].shape, sources=(weight, *pair), value=_merged(weight, layer, found[weight].value)
        )
    return {name.replace(".base_layer.", "."): published for name, published in found.items()}


def _merged(
    weight: str, layer: Any, base: Callable[[Callable[[str], torch.Tensor]], torch.Tensor]
) -> Callable[[Callable[[str], torch.Tensor]], torch.Tensor]:
    name = weight.removesuffix(".base_layer.weight")

    def value(parameter: Callable[[str], torch.Tensor]) -> torch.Tensor:
        down, up = (parameter(f"{name}.lora_{side}.{_NAME}.weight").float() for side in "AB")
        change = up @ down * layer.scaling[_NAME]
        return base(parameter).float() + (change.T if layer.fan_in_fan_out else change)

    return value


def adapter_parameters(model: nn.Module) -> dict[str, Published]:
    """The adapter's two matrices of each target, under the names that peft gives them in a file."""
    found = all_parameters(model)
    return {
        f"{PEFT_PREFIX}{name.replace(f'.{_NAME}.', '.')}": published
        for name, published in found.items()
        if ".lora_A." in name or ".lora_B." in name
    }


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what its base does."""
    layers = [layer for _, layer in _adapted(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], options: AdapterOptions, *, base: str) -> None:
    """Write an adapter by its file names (:func:`adapter_parameters`) as peft and vLLM load it."""
    from safetensors.torch import save_file

    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": options.rank,
        "lora_alpha": options.alpha,
        "lora_dropout": 0.0,
        "target_modules": targets_of(tensors),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")


def read_adapter(folder: Path) -> tuple[list[tuple[str, torch.Tensor]], AdapterOptions]:
    """The tensors and the options of an adapter that :func:`write_adapter` or peft wrote.

    Raises ConfigError where there is none, or one that does more than :class:`AdapterOptions` says.
    """
    from safetensors.torch import load_file

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder} holds no LoRA adapter: it has no {name}", HAS_ADAPTER)
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        options = AdapterOptions(rank=config["r"], alpha=config["lora_alpha"], targets=tuple(targets_of(tensors)))
    except Exception as error:  # of files that are torn, some of a type that safetensors keeps to itself
        raise ConfigError(f"{folder} holds no LoRA adapter: {type(error).__name__}: {error}", HAS_ADAPTER) from error
    extras = [name for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern") if config.get(name)]
    if extras:
        raise ConfigError(f"the adapter {folder} has {', '.join(extras)}", "merge it into its base with peft")
    return list(tensors.items()), options


def targets_of(names: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """The last parts of the names of the modules that an adapter's tensors belong to."""
    return sorted({name.split(".lora_")[0].rpartition(".")[2] for name in names})
