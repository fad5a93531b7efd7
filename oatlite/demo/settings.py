"""What ``demo`` stands for, in a configuration."""

from __future__ import annotations

from oatlite.config.schema import Config


def with_demo(config: Config) -> Config:
    """Put the folders of the embedded demo where the configuration says ``demo``, building them on first use."""
    if "demo" not in (config.model.path, config.data.prompts, *config.oracle.path, *config.eval.oracle):
        return config
    from oatlite.demo.build import ensure_demo

    demo = ensure_demo()
    values = config.model_dump()
    for section, key, path in (
        ("model", "path", demo.policy),
        ("model", "reference", demo.policy),
        ("data", "prompts", demo.prompts),
    ):
        if values[section][key] == "demo":
            values[section][key] = str(path)
    for section, key in (("oracle", "path"), ("eval", "oracle")):
        values[section][key] = [str(demo.reward_model) if name == "demo" else name for name in values[section][key]]
    return Config.model_validate(values)


def policy_of(name: str) -> str:
    """``name``, or the folder of the demo's policy where it is ``demo``, which is built on first use."""
    if name != "demo":
        return name
    from oatlite.demo.build import ensure_demo

    return str(ensure_demo().policy)
