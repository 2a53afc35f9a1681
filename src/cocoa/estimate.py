"""Rough memory and time of a stage: pure functions of counts, for `cocoa preview`.

Units: bytes, floating-point operations (a multiply and an add are two) and hours. Weights, gradients and
optimiser states are exact sums; activations are within a tenth of what autograd keeps on a CPU (a
test measures it); time is what the arithmetic takes at the throughput that the reader assumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Tuning = Literal["full", "lora", "dora"]
Layer = Literal["text", "qwen2_vl", "qwen2_5_vl"]
"""A layer of the text model, or of one architecture's vision tower."""

TRAINED_BYTES = 4
"""Bytes of a trained weight: float32, whatever the recipe's dtype."""
STATE_BYTES = 12
"""Bytes beside a trained weight: its gradient and AdamW's two moments, float32."""
LOGIT_BYTES = 16
"""Bytes of one logit: four float32 copies at the peak (masked, softmax, and the gradient of each)."""
ASSUMPTIONS = (
    "Memory: a device holds all weights (with --split its share of them, and whole what lies outside the layers and "
    "two layers), the trained ones with gradient (two, where several devices add up several passes) and AdamW states "
    "in float32, and its sequences, all taken to be as long as the longest seen. Activations are a rule of thumb. "
    "Nothing for buffers and fragmentation: allow 10 to 20 % more.",
    "Time: each device reaches the throughput that --tflops says (400 is 40 % of an H100's dense bfloat16 "
    "peak). Per token and parameter 6 operations where it is trained and 4 where it is frozen, 2 more for "
    "gradient checkpointing and 2 more for GradCache's extra forward pass. Nothing for padding, attention "
    "scores, loading and validation.",
)
"""What the estimates rest on, in sentences for the reader."""
KEPT: dict[tuple[Layer, Tuning], dict[int, tuple[int, int]]] = {
    ("text", "full"): {4: (40, 16), 2: (34, 8)},
    ("text", "lora"): {4: (72, 20), 2: (52, 12)},
    ("text", "dora"): {4: (88, 28), 2: (48, 14)},
    ("qwen2_vl", "full"): {4: (44, 8), 2: (22, 4)},
    ("qwen2_vl", "lora"): {4: (48, 12), 2: (28, 8)},
    ("qwen2_vl", "dora"): {4: (64, 16), 2: (32, 8)},
    ("qwen2_5_vl", "full"): {4: (52, 16), 2: (32, 8)},
    ("qwen2_5_vl", "lora"): {4: (56, 20), 2: (38, 12)},
    ("qwen2_5_vl", "dora"): {4: (72, 28), 2: (40, 14)},
}
"""Bytes that autograd keeps a token and layer, for each unit of width and of MLP width.

By layer, tuning and bytes of an activation. Counted with `torch.autograd.graph.saved_tensors_hooks` (a test
does it again), with CoCoA's adapters and attention that keeps no (T, T) scores.
"""


@dataclass(frozen=True, slots=True)
class Stack:
    """A stack of equal layers that tokens pass through, and how many tokens do.

    Args:
        layer: what kind.
        layers: how many.
        width: of the hidden state.
        intermediate: width of the MLP.
        trained: parameters that are trained.
        frozen: parameters that are not; together the N of 2 N operations a token, so without the embedding.
        tokens: a pair's, on average.
        longest: tokens of the longest sequence.
        reached: does the loss's gradient pass through? (A frozen tower at the input's end keeps nothing.)
    """

    layer: Layer
    layers: int
    width: int
    intermediate: int
    trained: int
    frozen: int
    tokens: float
    longest: int
    reached: bool = True


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on each device at the peak of a step."""

    weights: int
    states: int
    activations: int
    checkpointed: int
    """Activations where they are computed again in the backward pass."""
    logits: int

    def total(self, checkpointing: bool) -> int:
        """All of it, with or without gradient checkpointing."""
        return self.weights + self.states + self.logits + (self.checkpointed if checkpointing else self.activations)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Memory on each device, and time, of a stage.

    Args:
        memory: on each device.
        checkpointing: does the recipe turn gradient checkpointing on?
        rows_at_once: sequences in the device's forward pass.
        longest: tokens of the longest sequence that was seen.
        flops: operations of the whole stage, over all devices.
        tflops: 10^12 operations a second that a device is assumed to reach.
        devices: how many share the work.
    """

    memory: Memory
    checkpointing: bool
    rows_at_once: int
    longest: int
    flops: float
    tflops: float
    devices: int

    @property
    def hours(self) -> float:
        """Of the whole stage."""
        return hours(self.flops, self.tflops, self.devices)


def weight_bytes(frozen: int, trained: int, frozen_bytes: int) -> int:
    """Bytes of the weights: `frozen` parameters of `frozen_bytes` each, trained ones in float32."""
    return frozen * frozen_bytes + trained * TRAINED_BYTES


def whole_bytes(frozen: int, trained: int, frozen_bytes: int) -> int:
    """Bytes of weights that are whole on a device which holds its share of a split model, gradients with them."""
    return weight_bytes(frozen, trained, frozen_bytes) + trained * TRAINED_BYTES


def activation_bytes(
    layer: Layer, tokens: int, width: int, intermediate: int, tuning: Tuning, element_bytes: int
) -> int:
    """Bytes of activations that one layer keeps for the backward pass.

    Args:
        layer: what kind.
        tokens: in the forward pass, over all its sequences.
        width: of the hidden state.
        intermediate: width of the MLP.
        tuning: adapters keep their own inputs and outputs too.
        element_bytes: of an activation: 2 in bfloat16, 4 in float32.
    """
    for_width, for_intermediate = KEPT[layer, tuning][element_bytes]
    return tokens * (for_width * width + for_intermediate * intermediate)


def stage_memory(
    stacks: Sequence[Stack],
    *,
    frozen: int,
    trained: int,
    frozen_bytes: int,
    element_bytes: int,
    tuning: Tuning,
    rows_at_once: int,
    logits: float,
    passes: int = 1,
    shares: int = 1,
    whole: int = 0,
    exchanged: bool = False,
) -> Memory:
    """Memory of a training step on one device.

    With gradient checkpointing, a layer keeps its input alone, and one layer at a time is computed again.

    Args:
        stacks: that the tokens pass through.
        frozen: parameters that are not trained, in all.
        trained: parameters that are, in all.
        frozen_bytes: of a frozen weight.
        element_bytes: of an activation.
        tuning: how the stacks are trained.
        rows_at_once: sequences in a forward pass, each taken to be as long as the longest.
        logits: entries of the logit matrix (hidden tokens x vocabulary); 0 without a head.
        passes: forward passes that are kept at a time.
        shares: devices that weights, gradients and states are split over.
        whole: bytes of weights that a device has beside its share; see `whole_bytes`.
        exchanged: devices have exchanged gradients before, in buffers that stay; new ones of several passes are added
            up beside them.
    """
    stream_bytes = TRAINED_BYTES if tuning == "full" else element_bytes
    lowered = tuning == "full" and element_bytes < TRAINED_BYTES
    copies = trained * element_bytes * lowered  # by autocast, until a forward pass ends, or else the backward pass
    activations, inputs, largest_layer = copies, 0, 0
    for stack in stacks:
        tokens = rows_at_once * stack.longest
        if not stack.layers or not stack.reached:
            continue
        width, intermediate = stack.width, stack.intermediate
        one = activation_bytes(stack.layer, tokens, width, intermediate, tuning, element_bytes)
        activations += passes * stack.layers * one
        inputs += passes * stack.layers * tokens * width * stream_bytes
        largest_layer = max(largest_layer, one)
    return Memory(
        weights=weight_bytes(frozen, trained, frozen_bytes) // shares + whole,
        states=trained * (STATE_BYTES + TRAINED_BYTES * exchanged) // shares,
        activations=activations,
        checkpointed=min(activations, inputs + max(largest_layer, copies)),
        logits=round(logits * LOGIT_BYTES),
    )


def training_flops(
    tokens: float,
    trained: int,
    frozen: int,
    *,
    reached: bool = True,
    checkpointing: bool = False,
    cached: float = 0.0,
) -> float:
    """Operations of training on `tokens` tokens.

    Per parameter and token: 2 forward; 2 for the gradient of the input, where the gradient is `reached`; 2
    for that of a trained weight; 2 for the forward pass again with `checkpointing`; 2 for the one without
    gradients that GradCache takes first of a share of the tokens (`cached`). So 6 N for trained weights, 8 N with
    checkpointing.
    """
    forward = 2 * (1 + cached + (checkpointing and reached))
    through = 2 if reached else 0
    return tokens * ((forward + through) * (trained + frozen) + 2 * trained)


def stage_flops(stacks: Sequence[Stack], pairs: int, checkpointing: bool, cached: float) -> float:
    """Operations of a stage that sees `pairs` pairs, over all devices."""
    return sum(
        training_flops(
            pairs * stack.tokens,
            stack.trained,
            stack.frozen,
            reached=stack.reached,
            checkpointing=checkpointing,
            cached=cached,
        )
        for stack in stacks
    )


def hours(flops: float, tflops: float, devices: int = 1) -> float:
    """Hours that `flops` operations take on `devices` devices of `tflops` 10^12 operations a second each."""
    return flops / (tflops * 1e12 * devices) / 3600
