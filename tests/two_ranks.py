"""What engine, checkpoints and teachers are tested on with two processes, started by torchrun two_ranks.py <folder>."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from small_hubert import KINDS, small_method
from small_method import OPTIMIZER, SAVED_AT, UPDATES, SmallMethod, engine_of, plain, train
from small_teacher import ZERO, TaughtMethod, taught_updates

from pretrain.method import Batch, Example, Method, Progress
from pretrain.models.batch_norm import update_running_statistics
from pretrain.training import checkpoint
from pretrain.training.engine import Engine
from pretrain.world import World, join_world

STAGES = (0, 1, 2, 3)
# (stage that wrote, stage that reads)
CHANGES = ((0, 0), (1, 1), (2, 2), (3, 3), (1, 3), (3, 0), (0, 2))
SHARED_OUT = {"stage": 3, "stage3_param_persistence_threshold": 0}


def save(run: Path, engine: Engine, world: World, step: int, keep: int = 2) -> str | None:
    """Publish a checkpoint at `step`."""
    scalars = engine.scalars()
    state = checkpoint.RunState(step, step, 0, scalars["adam_steps"], scalars["loss_scale"], {})
    return checkpoint.save(run, engine, state, {"method": {"name": "small"}}, world, keep)


def load(run: Path, stage: int, precision: str, world: World) -> Engine:
    """A fresh engine with the newest checkpoint's weights and optimiser state."""
    return resumed(run, SmallMethod(), {"stage": stage}, precision, world)


def resumed(run: Path, method: Method, zero: dict[str, Any], precision: str, world: World) -> Engine:
    """An engine around `method` with the newest checkpoint's weights and optimiser state."""
    found, _ = checkpoint.find_resumable(run, world)
    assert found is not None, f"{run} holds no complete checkpoint"
    state = checkpoint.load_state(found)
    method.load_state_dict(checkpoint.load_weights(found))
    engine = Engine(method, OPTIMIZER, {"zero_optimization": zero}, precision, world.device)
    with checkpoint.moment_reader(found) as read:
        engine.load_optimizer_state(read, {"adam_steps": state.adam_steps, "loss_scale": state.loss_scale})
    return engine


def unbroken(folder: Path, stage: int, world: World) -> dict[str, Any]:
    """A whole run of `stage`, which leaves a checkpoint of its middle behind."""
    engine = engine_of(stage, "fp32", world)
    history = train(engine, world, 0, SAVED_AT)
    problem = save(folder / f"world{world.size}_stage{stage}", engine, world, SAVED_AT)
    history += train(engine, world, SAVED_AT, UPDATES)
    return {"history": history, "weights": plain(engine.weights(keep=True)), "problem": problem}


def continued(folder: Path, wrote: int, stage: int, world: World, written_by: int) -> dict[str, Any]:
    """The second half of a run whose first half `written_by` ranks made at stage `wrote`."""
    engine = load(folder / f"world{written_by}_stage{wrote}", stage, "fp32", world)
    loaded = plain(engine.optimizer_state())
    history = train(engine, world, SAVED_AT, UPDATES)
    return {"history": history, "weights": plain(engine.weights(keep=True)), "moments": loaded}


def taught_run(folder: Path, zero: dict[str, Any], precision: str, world: World) -> dict[str, Any]:
    """All weights after each of four updates of a method with a teacher: at once, and resumed from the second."""
    engine = Engine(TaughtMethod(), OPTIMIZER, {"zero_optimization": zero}, precision, world.device)
    weights = list(taught_updates(engine, world, 0, 2))
    save(folder, engine, world, 2)
    weights += taught_updates(engine, world, 2, 4)
    again = list(taught_updates(resumed(folder, TaughtMethod(), zero, precision, world), world, 2, 4))
    return {"weights": [plain(state) for state in weights], "again": [plain(state) for state in again]}


def one_rank_fails_to_write(folder: Path, world: World) -> dict[str, Any]:
    """The second rank cannot write its share: nobody may publish."""
    run = folder / "failing"
    engine = engine_of(1, "fp32", world)
    first = save(run, engine, world, 1)
    original = checkpoint.save_file
    if world.rank == 1:
        checkpoint.save_file = _no_space
    second = save(run, engine, world, 2)
    checkpoint.save_file = original
    dist.barrier()
    found, passed_over = checkpoint.find_resumable(run, world)
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    return {"first": first, "second": second, "found": found and found.name, "passed_over": passed_over, "left": left}


def _failed_on_main(world: World) -> str:
    """The message of an error that only the main rank meets, as every rank sees it."""
    try:
        world.from_main(_no_space)
    except OSError as error:
        return str(error)
    return ""


def _no_space(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def damage_seen_by_one_rank(folder: Path, world: World) -> dict[str, Any]:
    """Each rank hashes its part of the files; a change in any of them makes both take the checkpoint before."""
    found = {}
    for name in ("model.safetensors", "optimizer-00000-of-00002.safetensors", "optimizer-00001-of-00002.safetensors"):
        run = folder / f"damaged_{name}"
        engine = engine_of(1, "fp32", world)
        for step in (1, 2):
            save(run, engine, world, step)
        if world.is_main:
            path = run / "checkpoints" / "step_00000002" / name
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(bytes(content))
        dist.barrier()
        chosen, passed_over = checkpoint.find_resumable(run, world)
        found[name] = [chosen and chosen.name, passed_over]
    return found


def hubert_losses(world: World) -> dict[str, list[float]]:
    """Three updates of a HuBERT with LayerDrop at ZeRO 1, and at ZeRO 3 with no weight held whole between uses."""
    losses: dict[str, list[float]] = {}
    for name, zero in (("1", {"stage": 1}), ("3", SHARED_OUT)):
        method = small_method(dropout=0.0, attention_dropout=0.0, dropout_input=0.0, encoder_layerdrop=0.5).train()
        engine = Engine(method, OPTIMIZER, {"zero_optimization": zero}, "fp32", world.device)
        losses[name] = [_hubert_update(engine, update, world) for update in range(3)]
    return losses


def conformer_run(world: World, zero: dict[str, Any], checkpoint_activations: bool) -> dict[str, list[float]]:
    """Three updates of a HuBERT with conformer layers: its losses, and one running variance at the end."""
    method = small_method(KINDS[1], layer_type="conformer", pos_enc_type="rel_pos", dropout=0.0, dropout_input=0.0)
    if checkpoint_activations:
        method.encoder.checkpoint_activations()
    engine = Engine(method.train(), OPTIMIZER, {"zero_optimization": zero}, "fp32", world.device)
    losses = [_hubert_update(engine, update, world) for update in range(3)]
    variance = method.encoder.encoder.layers[1].conv_module.batch_norm.running_var
    return {"losses": losses, "variance": variance.tolist()}


def _hubert_update(engine: Engine, update: int, world: World) -> float:
    """One update of two micro-batches, which one rank makes alone or two share; the loss over both."""
    engine.method.before_step(Progress(update, 3, seed=1))
    batches = [_hubert_batch(engine, update, index) for index in range(2)]
    units, total = sum(batch.sample_size for batch in batches), torch.zeros(())
    for index in range(world.rank, 2, world.size):
        output = engine.forward(batches[index])
        engine.backward(output.loss * (world.size / units), last=index + world.size >= 2)
        total += output.loss.detach()
    dist.all_reduce(total)
    assert engine.step(1e-2, torch.zeros(()))
    update_running_statistics(engine.method, applied=True)
    return total.item()


def _hubert_batch(engine: Engine, update: int, index: int) -> Batch:
    rngs = [np.random.default_rng([update, index, row]) for row in range(2)]
    waveforms = [torch.from_numpy(0.1 * rng.standard_normal(8_000, dtype=np.float32)) for rng in rngs]
    labels = [{f"labels_{i}": rng.integers(0, 7, size=24) for i in range(2)} for rng in rngs]
    collator = engine.method.collator(engine.method.config)
    return collator([Example(waveforms[row], row, 0, labels[row], rngs[row]) for row in range(2)])


def main(folder: Path) -> None:
    """Run everything and leave the main rank's answers in `two_ranks.json`."""
    world = join_world()
    torch.set_num_threads(1)
    results = {
        "unbroken": {stage: unbroken(folder, stage, world) for stage in STAGES},
        "same_world": [continued(folder, wrote, stage, world, written_by=2) for wrote, stage in CHANGES],
        "from_one_rank": [continued(folder, wrote, stage, world, written_by=1) for wrote, stage in CHANGES],
        "hubert": hubert_losses(world),
        "conformer": conformer_run(world, SHARED_OUT, checkpoint_activations=True),
        "taught": {name: taught_run(folder / f"taught{name}", zero, "fp32", world) for name, zero in ZERO.items()},
        "failing": one_rank_fails_to_write(folder, world),
        "damaged": damage_seen_by_one_rank(folder, world),
        "from_main": world.from_main(lambda: {"rank": world.rank}),
        "gathered": world.gather(world.rank),
        "failed_on_main": _failed_on_main(world),
    }
    others = [None] * world.size
    dist.all_gather_object(others, json.dumps(results))
    results["ranks_agree"] = others[0] == others[1]
    if world.is_main:
        (folder / "two_ranks.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
