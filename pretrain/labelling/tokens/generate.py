"""Making a token directory: a trained quantizer's codes of every file, as it streams by, then numbers for them.

A token directory is a label directory (`pretrain.data.labels`) with `dict.txt` and `tokenizer/`, a native export of
the network that made the codes.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pretrain.data.folders import resolve_data_dir
from pretrain.data.label_files import LabelWriter
from pretrain.data.labels import SAMPLE_RATE, LabelError
from pretrain.data.manifest import Manifest
from pretrain.labelling.directory import LabelData, labels_of, publish, read_manifests, work_directory
from pretrain.labelling.kmeans.generate import ensure_mfcc_labels
from pretrain.labelling.kmeans.model import KMeansModel
from pretrain.labelling.ranks import labelling_world, share_of
from pretrain.labelling.stream import WaveformStream, check_problems
from pretrain.labelling.tokens.dictionary import UNKNOWN_CLASS, TokenDictionary, code_numbers
from pretrain.labelling.tokens.tokenizer import (
    FOLDER,
    KMEANS,
    KMeansTokenizer,
    Tokenizer,
    build_tokenizer,
    load_tokenizer,
    tokenizer_of,
)
from pretrain.weights.export import find_kmeans, write_native
from pretrain.weights.interop.files import read_json, read_safetensors
from pretrain.weights.read import load_strictly, read_weights
from pretrain.world import World

MAX_SAMPLES = 1_300_000  # of a piece that is encoded at once, as in fairseq's featurizer
MAX_COMBINATIONS = 2**24  # a table of them is kept


@dataclass
class TokenOptions:
    """`checkpoint` is a trained quantizer: a run, an export or a .pt (then `method` names its method). In its place,
    `kmeans` is a label directory whose k-means on MFCC or log-mel gives the codes, or `tokens` a token directory whose
    tokenizer and dictionary are used again, for more data with the same tokens.
    """

    output: str
    data: LabelData
    checkpoint: str | None = None
    method: str | None = None
    kmeans: str | None = None
    tokens: str | None = None
    overwrite: bool = False


@dataclass
class Source:
    """A tokenizer, the method that it is of, and the dictionary, None where the data has to give it."""

    tokenizer: Any
    method_name: str
    dictionary: TokenDictionary | None = None


@dataclass
class SplitTally:
    """What one rank saw of a split: `used` counts combinations, `frames` holds the number of codes of each row."""

    samples: int
    used: np.ndarray
    frames: list[int] = field(default_factory=list)
    problems: dict[int, str] = field(default_factory=dict)


def generate_tokens(options: TokenOptions) -> dict[str, Any]:
    """Tokenize the splits of `options.data.dir` and write the token directory; returns the report.

    Runs alone or on all of torchrun's ranks. Raises LabelError for an output that exists and for options that do not
    go together, InteropError for an unreadable checkpoint, StreamError where too many files are unreadable.
    """
    return tokenize(_source(options), options.data, options.output, options.overwrite)


def ensure_kmeans_tokens(data_dir: Path, output_dir: Path, clusters: int) -> Path:
    """Tokens of `data_dir` by k-means on its MFCC, under `output_dir`; made unless they are there already.

    Call it on all ranks. Returns the token directory.
    """
    labels = ensure_mfcc_labels(data_dir, output_dir / f"sample_mfcc{clusters}", clusters)
    output = output_dir / f"sample_tokens{clusters}"
    source = _kmeans_source(labels)
    with labelling_world() as world:
        current = world.from_main(lambda: _is_current(output, data_dir, source.tokenizer))
    if not current:
        tokenize(source, LabelData(str(data_dir)), str(output), overwrite=True)
    return output


def tokenize(source: Source, data: LabelData, output: str, overwrite: bool) -> dict[str, Any]:
    """Codes of every file into shards, the dictionary from the training split, then classes in place of the codes."""
    started = time.monotonic()
    manifests = read_manifests(resolve_data_dir(data.dir))
    groups, entries = code_shape(source.tokenizer, source.method_name)
    with work_directory(Path(output), overwrite) as (world, work):
        source.tokenizer.float().eval().to(world.device)
        mine, total = {}, {}
        for split, manifest in manifests.items():
            stream = WaveformStream(manifest, data.max_bad_share, data.workers)
            mine[split] = _encode_split(split, stream, source.tokenizer, work, world)
            total[split] = _merged(world.gather(mine[split]))
            check_problems(total[split].problems, len(manifest), data.max_bad_share)
        dictionary = source.dictionary or TokenDictionary.from_counts(total["train"].used, groups, entries)
        for split, tally in mine.items():
            _number_split(split, tally, dictionary, work, world.rank)
        world.barrier()
        report = _report(source, dictionary, total, world.size, time.monotonic() - started)
        world.from_main(lambda: _publish(work, Path(output), source, dictionary, manifests, total, report))
    return report


def code_shape(tokenizer: Any, origin: str) -> tuple[int, int]:
    """Groups and entries per group. Raises LabelError for an encoder without codes, or with too many kinds of them."""
    groups, entries = getattr(tokenizer, "code_shape", (0, 0))
    if not groups:
        raise LabelError(f"{origin}: its encoder has no codebook; give a trained vq-wav2vec")
    if entries**groups > MAX_COMBINATIONS:
        raise LabelError(f"{origin}: {groups} groups of {entries} codes make too many tokens; give one with fewer")
    return groups, entries


def utterance_codes(tokenizer: Tokenizer, waveform: Tensor, max_samples: int = MAX_SAMPLES) -> Tensor:
    """(T,) waveform to (F, G) codes; one longer than `max_samples` in equal pieces, which bounds the memory.

    Pieces overlap by what a frame sees, so that they have the frames of the whole; norms over time end at a border.
    """
    stride, field_samples = tokenizer.stride_samples, tokenizer.receptive_field_samples
    frames = max(0, (len(waveform) - field_samples) // stride + 1)
    if frames == 0:
        return torch.zeros(0, tokenizer.code_shape[0], dtype=torch.int64)
    per_piece = math.ceil(frames / math.ceil(len(waveform) / max_samples))
    codes = []
    for first in range(0, frames, per_piece):
        last = first + per_piece
        end = len(waveform) if last >= frames else (last - 1) * stride + field_samples
        codes.append(tokenizer.codes(waveform[None, first * stride : end], None)[0][0])
    return torch.cat(codes)


def describe(report: dict[str, Any]) -> str:
    """The report in a few lines."""
    lines = [f"{report['tokens']} tokens in the dictionary, {report['rate_hz']} per second"]
    for split, values in report["splits"].items():
        lines.append(
            f"{split}: {values['rows']} files, {values['hours']:.2f} h, {values['frames']} tokens of "
            f"{values['kinds']} kinds, perplexity {values['perplexity']:.1f}, {values['unknown_share']:.2%} unknown, "
            f"{len(values['unreadable'])} files unreadable"
        )
    return "\n".join([*lines, f"{report['wall_seconds']:.1f} s"])


def _source(options: TokenOptions) -> Source:
    given = [name for name in ("checkpoint", "kmeans", "tokens") if getattr(options, name) is not None]
    if len(given) != 1:
        raise LabelError(f"checkpoint, kmeans, tokens: {len(given)} are given; give one of them")
    if options.kmeans is not None:
        return _kmeans_source(Path(options.kmeans))
    if options.tokens is not None:
        directory = Path(options.tokens)
        method_name, config = tokenizer_of(directory)
        tokenizer = build_tokenizer(method_name, config)
        load_tokenizer(tokenizer, directory)
        return Source(tokenizer, method_name, TokenDictionary.read(directory, *tokenizer.code_shape))
    assert options.checkpoint is not None  # the one of three that is left
    weights = read_weights(options.checkpoint, options.method)
    tokenizer = weights.build_encoder()
    load_strictly(tokenizer, weights.encoder_state, weights.origin)
    return Source(tokenizer, weights.method_name)


def _kmeans_source(labels: Path) -> Source:
    return Source(KMeansTokenizer.of(KMeansModel.load(find_kmeans(labels)), str(labels)), KMEANS)


def _is_current(directory: Path, data_dir: Path, tokenizer: KMeansTokenizer) -> bool:
    if labels_of(directory, data_dir) is None:
        return False
    centroids = read_safetensors(directory / FOLDER / "encoder.safetensors")["centroids"]
    return torch.equal(centroids, tokenizer.centroids)


def _encode_split(split: str, stream: WaveformStream, tokenizer: Any, work: Path, world: World) -> SplitTally:
    """Codes of this rank's rows into a file of its own, as flat int32 numbers."""
    lengths = stream.manifest.lengths
    rows = share_of(world, lengths)
    groups, entries = tokenizer.code_shape
    tally = SplitTally(int(lengths[list(rows)].sum()), np.zeros(entries**groups, dtype=np.int64))
    bar = tqdm(stream.read(rows), f"tokenizing {split}", len(rows), unit="file", disable=world.rank > 0 or None)
    with _code_file(work, split, world.rank).open("wb") as file:
        for _, waveform in bar:
            numbers = np.empty(0, dtype=np.int32)
            if waveform is not None:
                codes = utterance_codes(tokenizer, waveform.to(world.device))
                numbers = code_numbers(codes, entries).cpu().numpy().astype(np.int32)
            file.write(numbers.tobytes())
            tally.frames.append(len(numbers))
            np.add.at(tally.used, numbers, 1)
    tally.problems = stream.problems
    return tally


def _number_split(split: str, tally: SplitTally, dictionary: TokenDictionary, work: Path, rank: int) -> None:
    """Classes of this rank's rows into a shard of the label files; the codes go."""
    table, path = dictionary.class_of_number(), _code_file(work, split, rank)
    writer = LabelWriter(work, split, dictionary.num_classes, shard=rank)
    with path.open("rb") as file:
        for frames in tally.frames:
            writer.write(table[np.fromfile(file, np.int32, frames)])
    writer.close()
    path.unlink()


def _code_file(work: Path, split: str, rank: int) -> Path:
    return work / f".{split}.{rank}.codes"


def _merged(tallies: list[SplitTally]) -> SplitTally:
    merged = SplitTally(sum(tally.samples for tally in tallies), cast(np.ndarray, sum(tally.used for tally in tallies)))
    for tally in tallies:
        merged.frames += tally.frames
        merged.problems |= tally.problems
    return merged


def _report(
    source: Source, dictionary: TokenDictionary, tallies: dict[str, SplitTally], world_size: int, seconds: float
) -> dict[str, Any]:
    """`perplexity` is the exponential of the entropy of the combinations, in or out of the dictionary."""
    known = dictionary.class_of_number() != UNKNOWN_CLASS
    splits = {}
    for split, tally in tallies.items():
        frames = int(tally.used.sum())
        share = tally.used[tally.used > 0] / max(1, frames)
        splits[split] = {
            "rows": len(tally.frames),
            "hours": tally.samples / SAMPLE_RATE / 3600,
            "frames": frames,
            "kinds": len(share),
            "perplexity": float(np.exp(-(share * np.log(share)).sum())),
            "unknown_share": float(tally.used[~known].sum() / max(1, frames)),
            "unreadable": list(tally.problems.values()),
        }
    return {
        "tokens": len(dictionary.numbers),
        "rate_hz": SAMPLE_RATE // source.tokenizer.stride_samples,
        "splits": splits,
        "world_size": world_size,
        "wall_seconds": seconds,
    }


def _publish(
    work: Path,
    output: Path,
    source: Source,
    dictionary: TokenDictionary,
    manifests: dict[str, Manifest],
    tallies: dict[str, SplitTally],
    report: dict[str, Any],
) -> None:
    """Write dictionary and network and finish the directory; for one rank."""
    dictionary.write(work)
    write_native(source.method_name, source.tokenizer, work / FOLDER)
    weights = read_json(work / FOLDER / "config.json")["files"]["encoder.safetensors"]
    # What binds tokens to their meaning: the network and the order of the dictionary.
    digest = hashlib.sha256((weights + dictionary.text()).encode()).hexdigest()
    unreadable = {split: tally.problems for split, tally in tallies.items()}
    publish(work, output, manifests, unreadable, report, report["rate_hz"], dictionary.num_classes, digest)
