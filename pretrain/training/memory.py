"""What a rank holds between its updates, by kind; and a trial of the plan's largest shapes before the first update,
so that a run fails in its first minute or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pretrain.config import BatchConfig, ConfigError
from pretrain.data.loader import MicroBatchReader
from pretrain.method import Method
from pretrain.training.metrics import peak_memory_gb
from pretrain.training.precision import autocast, left_untouched
from pretrain.world import World

FP32_BYTES = 4
# Elements; DeepSpeed's defaults, which conf/deepspeed leaves alone.
REDUCE_BUCKET, PREFETCH_BUCKET, MAX_LIVE, SUB_GROUP = 5e8, 5e7, 1e9, 1e9


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one rank beside what forward and backward make.

    `optimizer` holds two moments and, under ZeRO, DeepSpeed's own copy of the weights. `buffers` are DeepSpeed's while
    backward runs: gradients on their way to other ranks, weights gathered from them; `step_buffers` those of the
    update itself, when the activations are gone.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    step_buffers: int


def state_bytes(trained: int, frozen: int, buffer_bytes: int, zero: dict[str, Any], ranks: int) -> StateBytes:
    """What a rank of `ranks` holds for `trained` and `frozen` parameters under DeepSpeed's `zero_optimization` block.

    Everything is float32 whatever the precision: bf16 and fp16 are autocast over float32 weights. Read off DeepSpeed
    0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py); tests/test_dry_run.py counts it over real updates.
    Offloading is not in it.
    """
    stage = zero["stage"]
    part = -(-trained // ranks)
    bucket = int(zero.get("reduce_bucket_size", REDUCE_BUCKET))
    if stage == 0:
        # After backward all gradients are copied side by side, a bucket at a time, to be summed over the ranks.
        elements = (trained + frozen, trained, 2 * trained, 0, min(trained, int(REDUCE_BUCKET)))
    elif stage < 3:
        buckets = bucket * (2 if zero.get("overlap_comm") else 1)
        gradients = trained if stage == 1 else part
        elements = (trained + frozen, gradients, 3 * part, buckets + part, part)
    else:
        # Weights that modules at work have gathered, and a bucket of those that come next.
        gathered = min(trained + frozen, int(zero.get("stage3_max_live_parameters", MAX_LIVE)))
        fetched = min(trained + frozen, int(zero.get("stage3_prefetch_bucket_size", PREFETCH_BUCKET)))
        gathered = gathered + fetched if ranks > 1 else 0
        step = min(part, int(zero.get("sub_group_size", SUB_GROUP)))
        elements = (-(-(trained + frozen) // ranks), part, 3 * part, bucket + gathered, bucket + step)
    weights, *others = (FP32_BYTES * count for count in elements)
    return StateBytes(weights + buffer_bytes, *others)


def probe_memory(
    method: Method,
    reader: MicroBatchReader,
    precision: str,
    world: World,
    batch_config: BatchConfig,
    zero: dict[str, Any],
) -> str:
    """Forward and backward once on the largest micro-batches; a sentence with the peak and what comes to it.

    `zero` is DeepSpeed's `zero_optimization` block. Runs before DeepSpeed hooks into the gradients. Raises
    ConfigError, naming the shape and the fix, where the device has too little memory.
    """
    shapes = []
    for micro_batch in reader.plan.largest_shapes():
        batch = reader[micro_batch]
        shapes.append(f"{batch.waveforms.shape[0]} x {batch.waveforms.shape[1] / 16_000:.2f} s")
        try:
            # Running statistics and the like must not learn from the probe.
            with left_untouched(method):
                with autocast(world.device, precision):
                    on_device = batch.to(world.device)
                    loss = method(on_device).total(on_device)
                loss.backward()
        except (torch.OutOfMemoryError, MemoryError) as error:
            seconds, steps = batch_config.seconds_per_micro_batch, batch_config.micro_batches_per_step
            raise ConfigError(
                f"batch.seconds_per_micro_batch: {shapes[-1]} does not fit into the memory of {world.device}; take "
                f"batch.seconds_per_micro_batch={seconds / 2:g} batch.micro_batches_per_step={steps * 2}, which is the "
                f"same update, or trainer.checkpoint_activations=true ({str(error).splitlines()[0]})"
            ) from None
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    state = state_bytes(trained, 0, 0, zero, world.size)
    return (
        f"memory: {peak_memory_gb(world.device):.2f} GB at the largest shapes ({', '.join(shapes)}), to which every "
        f"rank adds {state.optimizer / 1e9:.2f} GB of optimiser state and up to {state.buffers / 1e9:.2f} GB of "
        "DeepSpeed's buffers"
    )
