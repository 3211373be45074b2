"""The rows of the visual embedding table, against transformers' Ovis2: from a tower's features to tokens."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.models.ovis2.configuration_ovis2 import Ovis2VisionConfig
from transformers.models.ovis2.modeling_ovis2 import Ovis2VisionModel, Ovis2VisualEmbeddingTable

from ..models.vet import VetConnector, ZooVetConfig
from .engine import Case, Equality, close, row
from .scale import Scale


INDICATORS = 5
ALLOWED = 1e-5


class Ovis2Head(nn.Module):
    """What transformers' Ovis2 makes of a tower's features: its own tower without layers, and its own table."""

    def __init__(self, config: ZooVetConfig):
        super().__init__()
        vision = config.vision_config
        tower = Ovis2VisionModel(
            Ovis2VisionConfig(
                hidden_size=vision.hidden_size,
                num_hidden_layers=0,
                image_size=vision.image_size,
                patch_size=vision.patch_size,
                vocab_size=config.visual_vocab_size,
                hidden_stride=config.hidden_stride,
                num_visual_indicator_tokens=INDICATORS,
                tokenize_function=config.tokenize_function,
            )
        )
        tower.transformer = Given()
        self.tower = tower
        self.table = Ovis2VisualEmbeddingTable(config.visual_vocab_size, config.text_config.hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`float[P, N, Dv]` to `float[P, n, Dt]`, in the lines of `Ovis2Model.get_image_features`."""
        probabilities = self.tower(features).pooler_output
        zeros = probabilities.new_zeros(*probabilities.shape[:2], INDICATORS)
        return self.table(torch.cat([probabilities, zeros], dim=2))


class ZooHead(VetConnector):
    """The same, of features of whole views."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`float[P, N, Dv]` to `float[P, n, Dt]`."""
        groups = self.join(features)
        return super().forward(groups.flatten(0, 1)).unflatten(0, groups.shape[:2])


class Given(nn.Module):
    """Stands in for a tower: the features are there already."""

    def forward(self, features: torch.Tensor, **kwargs) -> tuple[torch.Tensor]:
        return (features,)


class Sides:
    """Both heads with the same weights, and features of one view of 16 x 16 patches."""

    def __init__(self, scale: Scale, function: str):
        side = 16
        config = ZooVetConfig(
            vision_config={
                "model_type": "siglip_vision_model",
                "hidden_size": scale.visual_features,
                "image_size": side * 14,
                "patch_size": 14,
                "num_hidden_layers": 1,
            },
            text_config={"model_type": "llama", "hidden_size": scale.visual_embeddings, "num_attention_heads": 1},
            num_prefix_tokens=0,
            visual_vocab_size=scale.visual_vocab_size,
            tokenize_function=function,
        )
        torch.manual_seed(0)
        # Rounding decides no word in float32, which is also what towers and heads train in
        self.ours, self.peer = ZooHead(config, scale.visual_features), Ovis2Head(config)
        self.features = torch.randn(1, side * side, scale.visual_features)
        with torch.no_grad():
            self.ours.table.weight.normal_()
            self.ours.norm.weight.normal_(mean=1.0, std=0.1)
            self.ours.norm.bias.normal_(std=0.1)
            self.peer.table.weight.copy_(self.ours.table.weight)
            self.peer.tower.head_linear.weight.copy_(self.ours.head.weight)
            self.peer.tower.head_norm.load_state_dict(self.ours.norm.state_dict())
        self.gradient = torch.randn(1, side * side, scale.visual_embeddings)
        for name in ("ours", "peer"):
            setattr(self, name, getattr(self, name).to(scale.device).eval())
        self.features, self.gradient = self.features.to(scale.device), self.gradient.to(scale.device)

    @torch.no_grad()
    def embed(self, head: nn.Module) -> torch.Tensor:
        return head(self.features)

    def train(self, head: nn.Module) -> list[torch.Tensor]:
        """A backward pass: the gradients of the features, of the linear layer, of its norm and of the table."""
        features = self.features.detach().requires_grad_()
        head.zero_grad(set_to_none=True)
        head(features).backward(self.gradient)
        linear, norm = (
            (head.head, head.norm)
            if isinstance(head, VetConnector)
            else (head.tower.head_linear, head.tower.head_norm)
        )
        return [features.grad, linear.weight.grad, norm.weight.grad, norm.bias.grad, head.table.weight.grad]

    def compare(self, training: bool) -> Equality:
        """The tokens; in training the gradients too."""
        ours, peer = self.embed(self.ours), self.embed(self.peer)
        equality = close(f"{ours.shape[1]} tokens", ours, peer, ALLOWED * max(1.0, peer.abs().max().item()))
        if training:
            names = ("features", "linear layer", "norm's weight", "norm's bias", "table")
            pairs = zip(names, self.train(self.ours), self.train(self.peer), strict=True)
            for name, one, other in pairs:
                equality &= close(f"gradient of the {name}", one, other, ALLOWED, relative=True)
        return equality


def head_case(scale: Scale, function: str, training: bool) -> Case:
    """One view to tokens, or with `training` there and back."""
    sides = Sides(scale, function)
    step: Callable[[nn.Module], object] = sides.train if training else sides.embed
    linear, features = sides.ours.head.weight, sides.features.flatten(0, 1)
    return Case(
        peer=f"Ovis2's head and table, {function}, {features.shape[0]} tokens of {features.shape[1]} features, "
        f"{scale.visual_vocab_size} words of {scale.visual_embeddings}, float32" + (", a training step" * training),
        ours=lambda: step(sides.ours),
        theirs=lambda: step(sides.peer),
        compare=lambda: sides.compare(training),
        limit="" if training else "the linear layer alone, into rows that are a multiple of a cache line",
        limit_step=None if training else lambda: features @ linear[: len(linear) // 16 * 16].t(),
    )


@row("visual_head", target=1.5, memory_target=0.25)
def visual_head(scale: Scale) -> Case:
    """One word a token: it is looked up, where the peer multiplies the table by ones and zeros."""
    return head_case(scale, "st_argmax", training=False)


@row("visual_head_softmax", target=1.2)
def visual_head_softmax(scale: Scale) -> Case:
    """The mean of all words: the same products, the first of them in blocks."""
    return head_case(scale, "softmax", training=False)


@row("visual_head_training", target=1.4, memory_target=1.02)
def visual_head_training(scale: Scale) -> Case:
    """One word a token, with the gradient of the mean of all."""
    return head_case(scale, "st_argmax", training=True)


@row("visual_head_softmax_training", target=0.97, memory_target=1.02)
def visual_head_softmax_training(scale: Scale) -> Case:
    """The mean of all words, and its gradient: the same products."""
    return head_case(scale, "softmax", training=True)
