"""Writes a small speech decoder of random weights, in the format of glm-4-voice-decoder."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from omnispeech.checkpoint.decoder_config import read_config
from omnispeech.checkpoint.files import build_on_meta
from omnispeech.models.flow import Flow, FlowConfig
from omnispeech.models.hift import HiFT, HiFTConfig
from omnispeech.tiny.weights import random_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """The defaults speak in real time on one core; the published sizes stand behind them."""

    unit_width: int = 48  # 512
    encoder_width: int = 64  # 512
    encoder_heads: int = 4  # 8
    encoder_inner: int = 96  # 2048
    encoder_layers: int = 2  # 6
    unet_width: int = 16  # 256
    unet_heads: int = 4  # 8
    unet_head_width: int = 8  # 64
    unet_blocks: int = 2  # 4
    unet_middle: int = 2  # 12
    vocoder_width: int = 32  # 512
    pitch_width: int = 24  # 512
    guidance: float = 0.7


CONFIG = """\
__set_seed1: !apply:random.seed [1986]
__set_seed2: !apply:numpy.random.seed [1986]
__set_seed3: !apply:torch.manual_seed [1986]
__set_seed4: !apply:torch.cuda.manual_seed_all [1986]

sample_rate: 22050
text_encoder_input_size: 16
llm_input_size: 16
llm_output_size: 16
spk_embed_dim: 192

llm: !new:cosyvoice.llm.llm.TransformerLM
    text_encoder_input_size: !ref <text_encoder_input_size>
    llm_input_size: !ref <llm_input_size>
    llm_output_size: !ref <llm_output_size>
    text_token_size: 32
    speech_token_size: 32
    length_normalized_loss: True
    lsm_weight: 0
    spk_embed_dim: !ref <spk_embed_dim>
    text_encoder: !new:cosyvoice.transformer.encoder.ConformerEncoder
        input_size: !ref <text_encoder_input_size>
        output_size: 16
        attention_heads: 2
        linear_units: 16
        num_blocks: 1
        input_layer: 'linear'
        pos_enc_layer_type: 'rel_pos_espnet'
        selfattention_layer_type: 'rel_selfattn'
    llm: !new:cosyvoice.transformer.encoder.TransformerEncoder
        input_size: !ref <llm_input_size>
        output_size: !ref <llm_output_size>
        attention_heads: 2
        linear_units: 16
        num_blocks: 1
        input_layer: 'linear_legacy'
        pos_enc_layer_type: 'rel_pos_espnet'
        selfattention_layer_type: 'rel_selfattn'

flow: !new:cosyvoice.flow.flow.MaskedDiffWithXvec
    input_size: {unit_width}
    output_size: 80
    spk_embed_dim: !ref <spk_embed_dim>
    output_type: 'mel'
    vocab_size: {units}
    input_frame_rate: 12.5
    only_mask_loss: True
    encoder: !new:cosyvoice.transformer.encoder.BlockConformerEncoder
        output_size: {encoder_width}
        attention_heads: {encoder_heads}
        linear_units: {encoder_inner}
        num_blocks: {encoder_layers}
        dropout_rate: 0.1
        positional_dropout_rate: 0.1
        attention_dropout_rate: 0.1
        normalize_before: True
        input_layer: 'linear'
        pos_enc_layer_type: 'rel_pos_espnet'
        selfattention_layer_type: 'block_rel_selfattn'
        input_size: {unit_width}
        use_cnn_module: False
        macaron_style: False
        block_size: 10
    length_regulator: !new:cosyvoice.flow.length_regulator.InterpolateRegulator
        channels: 80
        sampling_ratios: [1, 1, 1, 1]
    decoder: !new:cosyvoice.flow.flow_matching.ConditionalCFM
        in_channels: 240
        n_spks: 1
        spk_emb_dim: 80
        cfm_params: !new:omegaconf.DictConfig
            content:
                sigma_min: 1e-06
                solver: 'euler'
                t_scheduler: 'cosine'
                training_cfg_rate: 0.2
                inference_cfg_rate: {guidance}
                reg_loss_type: 'l1'
        estimator: !new:cosyvoice.flow.decoder.ConditionalDecoder
            in_channels: 320
            out_channels: 80
            channels: [{unet_width}, {unet_width}]
            dropout: 0
            attention_head_dim: {unet_head_width}
            n_blocks: {unet_blocks}
            num_mid_blocks: {unet_middle}
            num_heads: {unet_heads}
            act_fn: 'gelu'

hift: !new:cosyvoice.hifigan.generator.HiFTGenerator
    in_channels: 80
    base_channels: {vocoder_width}
    nb_harmonics: 8
    sampling_rate: !ref <sample_rate>
    nsf_alpha: 0.1
    nsf_sigma: 0.003
    nsf_voiced_threshold: 10
    upsample_rates: [8, 8]
    upsample_kernel_sizes: [16, 16]
    istft_params:
        n_fft: 16
        hop_len: 4
    resblock_kernel_sizes: [3, 7, 11]
    resblock_dilation_sizes: [[1, 3, 5], [1, 3, 5], [1, 3, 5]]
    source_resblock_kernel_sizes: [7, 11]
    source_resblock_dilation_sizes: [[1, 3, 5], [1, 3, 5]]
    lrelu_slope: 0.1
    audio_limit: 0.99
    f0_predictor: !new:cosyvoice.hifigan.f0_predictor.ConvRNNF0Predictor
        num_class: 1
        in_channels: 80
        cond_channels: {pitch_width}
"""


def write_decoder(directory: Path, seed: int, shape: DecoderShape, units: int) -> None:
    """`config.yaml`, `flow.pt` and `hift.pt`; the files as published hold float32."""
    flow_config, hift_config = write_decoder_config(directory, shape, units)
    flow = random_weights(build_on_meta(lambda: Flow(flow_config)), seed, torch.float32)
    hift = random_weights(build_on_meta(lambda: HiFT(hift_config)), seed, torch.float32)
    _make_mels(flow)
    _make_sound(hift)
    write_decoder_weights(directory, flow, hift)


def write_decoder_config(
    directory: Path, shape: DecoderShape, units: int
) -> tuple[FlowConfig, HiFTConfig]:
    config = directory / "config.yaml"
    config.write_text(CONFIG.format(units=units, **asdict(shape)), encoding="utf-8")
    return read_config(config)


def write_decoder_weights(
    directory: Path, flow: dict[str, Tensor], hift: dict[str, Tensor]
) -> None:
    torch.save(flow, directory / "flow.pt")
    torch.save(with_weight_norm(hift), directory / "hift.pt")


def _make_mels(weights: dict[str, Tensor]) -> None:
    """The flow leads from noise to the level of a log-mel spectrum, falling with the pitch."""
    level = weights["decoder.estimator.final_proj.bias"]
    level.copy_(torch.linspace(-3.0, -7.0, len(level)))


def _make_sound(weights: dict[str, Tensor]) -> None:
    """An audible voice: the pitch near 120 Hz with pauses, no constant part, nothing clipped."""
    for name in ("conv_pre.weight", "f0_predictor.condnet.0.weight"):
        weights[name] -= weights[name].mean((1, 2), keepdim=True)  # deaf to the mean log-mel
    weights["f0_predictor.classifier.weight"] *= 200.0
    weights["f0_predictor.classifier.bias"].fill_(120.0)
    weights["m_source.l_linear.weight"].fill_(1.0)
    weight, bias = weights["conv_post.weight"], weights["conv_post.bias"]
    bins = len(bias) // 2
    weight *= 2.0
    bias[:bins] = torch.linspace(-0.7, -3.7, bins)  # log magnitude of each bin
    for part in (0, bins):  # the first two bins alike: their constant parts cancel
        weight[part], bias[part] = weight[part + 1], bias[part + 1]


def with_weight_norm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convolutions are published as direction and length, except those that take the source in."""
    split: dict[str, Tensor] = {}
    for name, value in weights.items():
        if value.dim() == 3 and not name.startswith("source_downs."):
            split[f"{name}_g"] = value.norm(dim=(1, 2), keepdim=True)
            split[f"{name}_v"] = value
        else:
            split[name] = value
    return split
