"""What is trained: a registry of models `(options, input_shape, outputs) -> nn.Module`, and the user's own by path."""

from pipeline.models.layers import ACTIVATIONS
from pipeline.models.norm import LayerNorm
from pipeline.models.registry import MODELS, build_model

__all__ = ["ACTIVATIONS", "MODELS", "LayerNorm", "build_model"]
