"""Try the largest shapes of a plan before the first update, so that a run fails in its first minute or not at all."""

from __future__ import annotations

import contextlib

import torch

from pretrain.config import BatchConfig, ConfigError
from pretrain.data.loader import MicroBatchReader
from pretrain.distributed import World
from pretrain.engine import DTYPES
from pretrain.method import Method
from pretrain.metrics import peak_memory_gb


def probe_memory(
    method: Method, reader: MicroBatchReader, precision: str, world: World, batch_config: BatchConfig
) -> str:
    """Forward and backward once on the largest micro-batches; a sentence with the peak.

    Runs before DeepSpeed hooks into the gradients. Raises ConfigError, naming the shape and the fix, where the device
    has too little memory.
    """
    shapes = []
    buffers = {name: value.clone() for name, value in method.named_buffers()}
    autocast = torch.autocast(world.device.type, DTYPES[precision]) if precision in DTYPES else contextlib.nullcontext()
    for micro_batch in reader.plan.largest_shapes():
        batch = reader[micro_batch]
        shapes.append(f"{batch.waveforms.shape[0]} x {batch.waveforms.shape[1] / 16_000:.2f} s")
        try:
            with autocast:
                loss = method(batch.to(world.device)).loss
            loss.backward()
        except (torch.OutOfMemoryError, MemoryError) as error:
            seconds, steps = batch_config.seconds_per_micro_batch, batch_config.micro_batches_per_step
            raise ConfigError(
                f"batch.seconds_per_micro_batch: {shapes[-1]} does not fit into the memory of {world.device}; take "
                f"batch.seconds_per_micro_batch={seconds / 2:g} batch.micro_batches_per_step={steps * 2}, which is the "
                f"same update ({str(error).splitlines()[0]})"
            ) from None
        finally:
            method.zero_grad(set_to_none=True)
            # Running statistics and the like must not learn from the probe.
            for name, value in method.named_buffers():
                value.copy_(buffers[name])
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    return (
        f"memory: {peak_memory_gb(world.device):.2f} GB at the largest shapes ({', '.join(shapes)}), to which the "
        f"optimiser adds {trained * 8 / 1e9:.2f} GB over all ranks that share it"
    )
