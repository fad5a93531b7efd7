"""The options of each algorithm: ``[algorithm]`` of a configuration, told apart by ``name``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, NonNegativeFloat, PositiveFloat, Tag

from oatlite.config.section import Section

NAMES = "simpo, dpo, ..., or your own: file.py:Class"


class SimPOConfig(Section):
    name: Literal["simpo"] = Field("simpo", description=NAMES)
    beta: PositiveFloat = Field(2.0, description="scale of the implicit reward")
    gamma_beta_ratio: NonNegativeFloat = 0.5
    loss_type: Literal["sigmoid", "hinge"] = "sigmoid"


class DPOConfig(Section):
    name: Literal["dpo"] = "dpo"
    beta: PositiveFloat = 0.1


class CDPOConfig(Section):
    name: Literal["cdpo"] = "cdpo"
    beta: PositiveFloat = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.1


class IPOConfig(Section):
    name: Literal["ipo"] = "ipo"
    beta: PositiveFloat = 0.1


class SLiCConfig(Section):
    name: Literal["slic"] = "slic"
    beta: PositiveFloat = 0.1


class LRDPOConfig(Section):
    name: Literal["lr_dpo"] = "lr_dpo"
    beta: PositiveFloat = 0.1
    length_alpha: NonNegativeFloat = 0.01


class DPOPositiveConfig(Section):
    name: Literal["dpo_positive"] = "dpo_positive"
    beta: PositiveFloat = 0.3
    positive_lambda: NonNegativeFloat = 50.0


class DPOSFTConfig(Section):
    name: Literal["dpo_sft"] = "dpo_sft"
    beta: PositiveFloat = 0.1
    sft_weight: NonNegativeFloat = 1.0


class BNFConfig(Section):
    name: Literal["bnf"] = "bnf"


class KTOConfig(Section):
    name: Literal["kto"] = "kto"
    beta: PositiveFloat = 0.1
    desirable_weight: NonNegativeFloat = 1.0
    undesirable_weight: NonNegativeFloat = 1.0


class KLConfig(Section):
    name: Literal["kl"] = "kl"
    beta: PositiveFloat = 0.1
    margin_scale: PositiveFloat = 1.0


class RevKLConfig(Section):
    name: Literal["rev_kl"] = "rev_kl"
    beta: PositiveFloat = 0.1
    margin_scale: PositiveFloat = 1.0


class XPOConfig(Section):
    name: Literal["xpo"] = "xpo"
    beta: PositiveFloat = 0.1
    alpha: NonNegativeFloat = Field(5e-6, description="weight of the optimism term")


class CustomAlgorithmConfig(Section):
    """``file.py:Class`` or ``package.module:Class``; ``options`` go to the class, which validates them."""

    name: Annotated[str, Field(pattern=r"^[^:]+:[A-Za-z_]\w*$")]
    options: dict[str, Any] = Field(default_factory=dict)


def _tag(value: Any) -> str:
    name = value.get("name", "simpo") if isinstance(value, dict) else getattr(value, "name", "simpo")
    return name if isinstance(name, str) and name in ALGORITHM_CONFIGS else "custom"


AlgorithmConfig = Annotated[
    Annotated[SimPOConfig, Tag("simpo")]
    | Annotated[DPOConfig, Tag("dpo")]
    | Annotated[CDPOConfig, Tag("cdpo")]
    | Annotated[IPOConfig, Tag("ipo")]
    | Annotated[SLiCConfig, Tag("slic")]
    | Annotated[LRDPOConfig, Tag("lr_dpo")]
    | Annotated[DPOPositiveConfig, Tag("dpo_positive")]
    | Annotated[DPOSFTConfig, Tag("dpo_sft")]
    | Annotated[BNFConfig, Tag("bnf")]
    | Annotated[KTOConfig, Tag("kto")]
    | Annotated[KLConfig, Tag("kl")]
    | Annotated[RevKLConfig, Tag("rev_kl")]
    | Annotated[XPOConfig, Tag("xpo")]
    | Annotated[CustomAlgorithmConfig, Tag("custom")],
    Discriminator(_tag),
]

ALGORITHM_CONFIGS: dict[str, type[Section]] = {
    "simpo": SimPOConfig,
    "dpo": DPOConfig,
    "cdpo": CDPOConfig,
    "ipo": IPOConfig,
    "slic": SLiCConfig,
    "lr_dpo": LRDPOConfig,
    "dpo_positive": DPOPositiveConfig,
    "dpo_sft": DPOSFTConfig,
    "bnf": BNFConfig,
    "kto": KTOConfig,
    "kl": KLConfig,
    "rev_kl": RevKLConfig,
    "xpo": XPOConfig,
}
"""By name; a new algorithm is added here, to the union above and to ``oatlite.algorithms.ALGORITHMS``."""
