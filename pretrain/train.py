"""Pre-train: `torchrun pretrain/train.py recipe=<name> [option=value ...]`; `--cfg job` prints the configuration."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# The script's own folder would shadow modules of the same name and hide `recipes` from a clean clone.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# Before torch is loaded: threads that spin while they wait make a busy machine many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from contextlib import ExitStack

import hydra
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from pretrain.config import CONF_DIR, check_overrides, hydra_errors, run_config
from pretrain.config.strict import plain_mapping
from pretrain.errors import UserError


@hydra.main(config_path=str(CONF_DIR), config_name="config", version_base="1.3")
def main(values: DictConfig) -> None:
    """Compose, check, train; leaves with status 75 when a signal stopped the run after a checkpoint."""
    from pretrain.planning.dry_run import dry_run
    from pretrain.training.setup import build_trainer  # imports deepspeed, which `--cfg job` does without

    recipe = HydraConfig.get().runtime.choices["recipe"]
    try:
        with hydra_errors():
            plain = plain_mapping(values, resolve=True)
        config = run_config({**plain, "recipe": recipe})
        with ExitStack() as resources:
            status = dry_run(config) if config.trainer.dry_run else build_trainer(config, resources).fit()
    except UserError as error:
        sys.exit(f"error: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(status)


if __name__ == "__main__":
    if not {"--help", "-h", "--hydra-help"} & set(sys.argv):
        try:
            sys.argv[1:] = check_overrides(sys.argv[1:])
        except UserError as wrong:
            sys.exit(f"error: {wrong}")
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # it raises its errors, instead of printing them, to be worded here
    try:
        with hydra_errors():
            main()
    except UserError as wrong:
        sys.exit(f"error: {wrong}")
