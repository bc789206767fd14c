"""BEST-RQ's training step in another project, for tools/benchmark.py; a peer is named like the package it needs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.method import Batch
from recipes.best_rq.encoder import SUBSAMPLING
from recipes.best_rq.method import BestRqConfig

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "swish": nn.SiLU}


class SpeechbrainBestRq(nn.Module):
    """speechbrain's modules, put together as its recipe's `train.py` does, with our masks and noise.

    Features are its own: one Fourier transform and one normalisation for the batch. The network is not streaming.
    """

    def __init__(self, config: BestRqConfig) -> None:
        from speechbrain.lobes.features import Fbank
        from speechbrain.lobes.models.convolution import ConvolutionFrontEnd
        from speechbrain.lobes.models.transformer.TransformerASR import EncoderWrapper, TransformerASR
        from speechbrain.nnet.linear import Linear
        from speechbrain.nnet.quantisers import RandomProjectionQuantizer
        from speechbrain.processing.features import InputNormalization

        super().__init__()
        encoder = config.encoder
        dim, bins = encoder.encoder_embed_dim, encoder.front_end.dim
        self.fbank = Fbank(sample_rate=16_000, n_fft=400, n_mels=bins)
        self.normalize = InputNormalization(norm_type="sentence")
        self.convs = ConvolutionFrontEnd(
            input_shape=(8, 10, bins),
            num_blocks=2,
            num_layers_per_block=1,
            out_channels=encoder.conv_channels,
            kernel_sizes=[3, 3],
            strides=[2, 2],
            residuals=[False, False],
            dropout=encoder.dropout,
        )
        transformer = TransformerASR(
            tgt_vocab=1,
            input_size=bins // SUBSAMPLING * encoder.conv_channels[-1],
            d_model=dim,
            nhead=encoder.encoder_attention_heads,
            num_encoder_layers=encoder.encoder_layers,
            num_decoder_layers=0,
            d_ffn=encoder.encoder_ffn_embed_dim,
            dropout=encoder.dropout,
            kernel_size=encoder.depthwise_conv_kernel_size,
            conformer_activation=ACTIVATIONS[encoder.activation],
            encoder_module="conformer",
            attention_type="RelPosMHAXL",
            normalize_before=True,
            causal=False,
        )
        self.wrapper = EncoderWrapper(transformer)
        self.quantizer = RandomProjectionQuantizer(SUBSAMPLING * bins, config.codebook_dim, config.codebook_size)
        self.linear = Linear(input_size=dim, n_neurons=config.codebook_size)

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch without padding, summed over its hidden positions."""
        extras, whole = batch.extras, torch.ones(len(batch.waveforms), device=batch.waveforms.device)
        features = self.normalize(self.fbank(batch.waveforms), whole)
        features = features[:, : features.shape[1] // SUBSAMPLING * SUBSAMPLING].contiguous()
        masked = extras["masked_positions"]
        stacked = features.view(1, -1, SUBSAMPLING * features.shape[2])
        targets = self.quantizer(stacked[:, masked])[0]
        features.flatten(0, 1)[extras["masked_frames"]] = extras["noise"]
        states = self.wrapper(self.convs(features), whole)
        return F.cross_entropy(self.linear(states).flatten(0, 1)[masked], targets, reduction="sum")


REFERENCE_STEPS: dict[str, Callable[[BestRqConfig], nn.Module]] = {"speechbrain": SpeechbrainBestRq}
