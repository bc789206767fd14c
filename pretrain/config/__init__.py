"""Configuration: the blocks of a run, strict typing, the composition of recipes, and the command lines of tools.

Everything that other packages use is exported here.
"""

from __future__ import annotations

from pretrain.config.blocks import (
    PRECISIONS,
    BatchConfig,
    CorpusConfig,
    CropConfig,
    DataConfig,
    ExpectedConfig,
    OptimizerConfig,
    RunConfig,
    TrainerConfig,
    check_seed,
    run_config,
    save_yaml,
)
from pretrain.config.command_line import (
    parse_cli,
    run_tool,
)
from pretrain.config.compose import (
    CONF_DIR,
    ROOT,
    check_overrides,
    compose_recipe,
    hydra_errors,
    recipe_method_block,
    recipe_names,
)
from pretrain.config.encoders import (
    MAX_LAYERS,
    MAX_SIZE,
    MAY_BE_ZERO,
    check_bounds,
    encoder_config,
    typed_method,
    upgraded,
)
from pretrain.config.strict import (
    ConfigError,
    check_keys,
    nearest,
    nested_class,
    typed,
    typed_values,
    variant,
    with_defaults,
)

__all__ = [
    "CONF_DIR",
    "MAX_LAYERS",
    "MAX_SIZE",
    "MAY_BE_ZERO",
    "PRECISIONS",
    "ROOT",
    "BatchConfig",
    "ConfigError",
    "CorpusConfig",
    "CropConfig",
    "DataConfig",
    "ExpectedConfig",
    "OptimizerConfig",
    "RunConfig",
    "TrainerConfig",
    "check_bounds",
    "check_keys",
    "check_overrides",
    "check_seed",
    "compose_recipe",
    "encoder_config",
    "hydra_errors",
    "nearest",
    "nested_class",
    "parse_cli",
    "recipe_method_block",
    "recipe_names",
    "run_config",
    "run_tool",
    "save_yaml",
    "typed",
    "typed_method",
    "typed_values",
    "upgraded",
    "variant",
    "with_defaults",
]
