"""Checked settings of a model: the published config.json in, one frozen ModelConfig out, and back."""

from fireflyer.config.messages import validation_message
from fireflyer.config.model_config import LATENT_NORM_EPS, ModelConfig, RopeScaling, load_config

__all__ = ["LATENT_NORM_EPS", "ModelConfig", "RopeScaling", "load_config", "validation_message"]
