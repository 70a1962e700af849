"""`BayesLoraModel`: PEFT's LoRA model with random matrices. Only this file uses PEFT's private injection hooks."""

from typing import Any

from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from bayestune.adapters.caches import check_cache, mark_cache
from bayestune.adapters.config import BayesLoraConfig
from bayestune.adapters.dropout import DropoutLinear
from bayestune.adapters.gaussian import GaussianLinear
from bayestune.adapters.layers import tied_head
from bayestune.adapters.noise import TrainingNoise, find_noise
from bayestune.adapters.random import FullPrecisionLinear, RandomLinear, refuse_in_draw
from bayestune.errors import ConfigError

# The last is the `out_proj` of nn.MultiheadAttention, which reads its weight without calling the layer.
_NOT_LINEAR = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, NonDynamicallyQuantizableLinear)


class BayesLoraModel(LoraModel):
    """A LoRA model whose ``lora_A[adapter]`` is a `RandomLinear`; B is kept in float32.

    Every PEFT layer type calls ``lora_B(lora_A(dropout(x)))``, so one module serves plain and quantized bases.

    Raises:
        ConfigError: a target is not a linear layer, or its forward does not call its A matrix.
    """

    prefix: str = "lora_"
    tuner_layer_cls = LoraLayer

    def _post_injection_hook(self, model: nn.Module, config: BayesLoraConfig, adapter_name: str) -> None:
        super()._post_injection_hook(model, config, adapter_name)
        if find_noise(model) is None:
            model.register_forward_pre_hook(TrainingNoise(config.estimator), with_kwargs=True)
            model.register_forward_pre_hook(check_cache, with_kwargs=True)
            model.register_forward_hook(mark_cache)

    def _check_new_adapter_config(self, config: BayesLoraConfig) -> None:
        """Check before any module is changed, so that an error leaves a model with other adapters unchanged."""
        super()._check_new_adapter_config(config)
        for key, module in self.model.named_modules():
            if config.target_modules is not None and isinstance(module, _NOT_LINEAR):
                if self._check_target_module_exists(config, key):
                    check_linear(key, module)
        noise = find_noise(self.model)
        if noise is None or noise.estimator == config.estimator:
            return
        if any(isinstance(module, RandomLinear) for module in self.model.modules()):
            raise ConfigError(
                f"the adapters of one model share their training noise: found estimator={config.estimator!r}, "
                f"expected {noise.estimator!r} as in the adapter already there."
            )
        noise.estimator = config.estimator

    def _create_and_replace(
        self,
        lora_config: BayesLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        layer = getattr(parent, target_name)
        linear = layer.lora_A[adapter_name] if adapter_name in layer.lora_A else None
        if not isinstance(linear, nn.Linear) or isinstance(layer, MultiheadAttention | ParamWrapper):
            raise _not_linear(current_key, layer.get_base_layer())
        a, b = _matrices(linear, layer.lora_B[adapter_name], lora_config, current_key)
        # PEFT makes new layers in training mode, even in a model that is in evaluation mode.
        layer.lora_A[adapter_name] = a.train(self.model.training)
        layer.lora_B[adapter_name] = b.train(self.model.training)
        if lora_config.distribution == "dropout":
            layer.lora_dropout[adapter_name] = nn.Identity()  # the masks are part of A

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Merge the mean into the base weights, as PEFT does.

        Raises:
            DrawError: inside `draw`.
        """
        refuse_in_draw("merge_adapter")
        super().merge_adapter(*args, **kwargs)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Merge the mean and return the base model; raise a DrawError inside `draw`."""
        refuse_in_draw("merge_and_unload")
        return super().merge_and_unload(*args, **kwargs)

    def _check_merge_allowed(self) -> None:
        tied = tied_head(self.model)
        if tied is not None:
            raise ConfigError(
                f"{tied} is adapted and its weight is tied to another layer's, such as the embeddings, so merging "
                "would change both: use the adapter unmerged, or untie the base model's weights first."
            )
        super()._check_merge_allowed()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raise an error: PEFT would drop the variances of a weighted sum of Gaussians.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "add_weighted_adapter would drop the variances of a BAYES_LORA adapter: "
            "combine means or draws that export_lora wrote."
        )


def _matrices(a: nn.Linear, b: nn.Linear, config: BayesLoraConfig, name: str) -> tuple[nn.Linear, nn.Linear]:
    """Return A and B of the adapted layer `name`, random as `config` says."""
    if config.distribution == "dropout":
        return DropoutLinear.from_linear(a, name=name, p=config.lora_dropout), FullPrecisionLinear.taking_over(b)
    settings = {"prior_std": config.prior_std, "rho_init": config.rho_init}
    gaussian = GaussianLinear.from_linear(a, name=name, **settings)
    if config.distribution == "gaussian_a":
        return gaussian, FullPrecisionLinear.taking_over(b)
    return gaussian, GaussianLinear.from_linear(b, name=f"{name}.lora_B", **settings)


def check_linear(key: str, module: nn.Module) -> None:
    """Raise a ConfigError if the module `key` is of a type whose adapter cannot have a posterior."""
    if isinstance(module, _NOT_LINEAR):
        raise _not_linear(key, module)


def _not_linear(key: str, module: nn.Module) -> ConfigError:
    return ConfigError(
        f"target module {key!r} is a {type(module).__name__}: a posterior needs a linear layer whose A matrix is "
        "called in the forward. Leave it out of target_modules."
    )
