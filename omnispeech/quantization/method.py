"""What every method of quantizing one decoder layer takes and gives."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from omnispeech.layers.packing import QuantizedWeight
from omnispeech.models.qwen3 import Block
from omnispeech.quantization.methods.salient import SalientColumns
from omnispeech.quantization.stream import Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearReport:
    """One linear of the layer, judged on the calibration tokens."""

    loss: float  # mean squared error of its output, over the mean square of the output itself
    nearest_loss: float  # the same for plain rounding to nearest
    notes: Mapping[str, Any] = field(default_factory=dict)  # what the method did: ratio, passes


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LayerResult:
    """Names are relative to the layer: self_attn.q_proj, input_layernorm.weight."""

    weights: Mapping[str, QuantizedWeight]  # of linears that were quantized
    plain: Mapping[str, Tensor]  # every other tensor of the layer, as it is to be stored
    linears: Mapping[str, LinearReport]
    salient: Mapping[str, SalientColumns] = field(default_factory=dict)  # of linears, if asked for


class Method(Protocol):
    def quantize(
        self, block: Block, floats: Stream, quantized: Stream, kept: Collection[str] = ()
    ) -> LayerResult:
        """Quantizes one layer in place: afterwards `block` computes what the stored tensors mean.

        block: float32, on the device of the streams.
        floats: states in front of the layer in the float model.
        quantized: the same behind the layers that are quantized already.
        kept: linears that stay float, though channel scales may pass through them; of those that
            read the same vectors all or none.
        """
        ...
