"""Looks into a running speech decoder: forward hooks, so that the networks know nothing of it."""

from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from omnispeech.models.speech_decoder import SpeechDecoder


class Recorder:
    """Keeps, under its golden name, what each stage gave when it was first called."""

    def __init__(self, decoder: SpeechDecoder) -> None:
        self.stages: dict[str, Tensor] = {}
        self._decoder = decoder
        self._estimates = 0
        self._handles: list[RemovableHandle] = []
        self._prompt_frames = 0
        self._units = 0

    def __enter__(self) -> "Recorder":
        flow, hift = self._decoder.flow, self._decoder.hift
        for name, module in {**flow_stages(self._decoder), **hift_stages(self._decoder)}.items():
            self._watch(name, module)
        estimator = flow.decoder.estimator
        for watched, hook in (
            (flow, self._on_flow),
            (flow.decoder, self._on_matching),
            (estimator.time_embeddings, self._on_times),
            (estimator, self._on_estimate),
            (hift, self._on_vocoder),
        ):
            self._handles.append(watched.register_forward_hook(hook))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def clear(self) -> None:
        self.stages = {}
        self._estimates = 0

    def lengths(self, units: int) -> dict[str, int | bool]:
        """Of the block just decoded, which brought so many units."""
        mel, new = self.stages["mel"].shape[2], self.stages["flow_out"].shape[2]
        return {
            "prompt_tokens": self._units - units,
            "prompt_frames": self._prompt_frames,
            "total_frames": self._prompt_frames + new,
            "flow_out": new,
            "hift_in": mel,
            "returned_mel": mel,
        }

    def _watch(self, name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            self.stages.setdefault(name, first[:1])  # the free estimate is the second row

        self._handles.append(module.register_forward_hook(hook))

    def _on_flow(self, module: nn.Module, args: tuple[Any, ...], mel: Tensor) -> None:
        units, _, _, prompt = args
        self._units, self._prompt_frames = len(units), prompt.shape[2]

    def _on_matching(self, module: nn.Module, args: tuple[Any, ...], mel: Tensor) -> None:
        self.stages["cfm_noise"] = args[0]

    def _on_times(self, module: nn.Module, args: tuple[Any, ...], encoded: Tensor) -> None:
        calls = 2 if self._decoder.flow.config.guidance else 1  # the original calls one by one
        self.stages["cfm_t"] = args[0].repeat_interleave(calls)

    def _on_estimate(self, module: nn.Module, args: tuple[Any, ...], v: Tensor) -> None:
        k = self._estimates
        self._estimates += 1
        self.stages[f"cfm_x_before_step{k}"] = args[0][:1]
        self.stages[f"cfm_v_cond_step{k}"] = v[:1]
        self.stages[f"cfm_v_uncond_step{k}"] = v[1:]

    def _on_vocoder(self, module: nn.Module, args: tuple[Any, ...], samples: Tensor) -> None:
        self.stages["mel"] = args[0]


def flow_stages(decoder: SpeechDecoder) -> dict[str, nn.Module]:
    flow = decoder.flow
    stages: dict[str, nn.Module] = {
        "embedding": flow.input_embedding,
        "spk": flow.spk_embed_affine_layer,
        "enc_embed": flow.encoder.embed,
        "enc_pos": flow.encoder.embed.pos_enc,
        "encoder_out": flow.encoder,
        "encoder_proj": flow.encoder_proj,
        "mu": flow.length_regulator,
        "time_emb_step0": flow.decoder.estimator.time_mlp,
        "flow_out": flow,
    }
    stages.update({f"enc_layer_{i}": layer for i, layer in enumerate(flow.encoder.encoders)})
    for part in ("down", "mid", "up"):
        found = _stages_of(part, getattr(flow.decoder.estimator, f"{part}_blocks"))
        stages.update(found)
    return stages


def _stages_of(part: str, blocks: nn.Module) -> dict[str, nn.Module]:
    stages: dict[str, nn.Module] = {}
    for i, block in enumerate(blocks.children()):
        resnet, transformers, *resize = block.children()
        stages[f"est_{part}{i}_resnet"] = resnet
        for j, transformer in enumerate(transformers.children()):
            stages[f"est_{part}{i}_tfm{j}"] = transformer
        stages[f"est_{part}{i}_out"] = resize[0] if resize else transformer
        stages[f"est_{part}_out"] = stages[f"est_{part}{i}_out"]  # the last one stays
    return stages


def hift_stages(decoder: SpeechDecoder) -> dict[str, nn.Module]:
    hift = decoder.hift
    stages: dict[str, nn.Module] = {
        "f0": hift.f0_predictor,
        "source": hift.m_source,
        "sine_waves": hift.m_source.l_sin_gen,
        "hift_conv_pre": hift.conv_pre,
        "hift_conv_post": hift.conv_post,
    }
    for name, modules in (
        ("up", hift.ups),
        ("source_down", hift.source_downs),
        ("source_res", hift.source_resblocks),
        ("res", hift.resblocks),
    ):
        stages.update({f"hift_{name}{i}": module for i, module in enumerate(modules)})
    return stages
