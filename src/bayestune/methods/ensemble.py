"""Deep ensemble: K adapters trained apart from one another on one base; predictions average their probabilities."""

from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftModel
from torch import Tensor

from bayestune.errors import PosteriorError
from bayestune.sampling.base import Posterior, Sampler, SubstitutedDraws, refuse_draws
from bayestune.storage.state import active_adapter, adapter_tensors, describe, parameter_names, tensor_fault


class Ensemble(Posterior):
    """``p(y|x) = 1/K sum_k softmax(logits(x; theta_k))`` over K members (Lakshminarayanan et al., arXiv 1612.01474).

    Draw k is member k whatever the seed; a prediction takes the first `draws` of them. There is no mean: the average
    of the members' weights is none of them.

    Args:
        model: the base with one plain LoRA adapter, whose weights are those of member 0.
        members: for each member the tensors of its adapter, heads of its own included, by their key in a LoRA file.

    Raises:
        PosteriorError: no member, or one whose tensors are not those of the adapter.
    """

    kind = "ensemble"

    def __init__(self, model: PeftModel, members: Sequence[Mapping[str, Tensor]], *, temperature: float = 1.0) -> None:
        super().__init__(model, temperature=temperature)
        _, adapter, _ = active_adapter(model)
        own = adapter_tensors(model, adapter)
        for number, member in enumerate(members):
            fault = tensor_fault(describe(own), describe(member))
            if fault:
                raise PosteriorError(f"ensemble member {number}: {fault}.")
        if not members:
            raise PosteriorError("ensemble: found no member, expected at least one.")
        self.members = [dict(member) for member in members]
        self.default_draws = len(members)

    def more_members(self) -> Sequence[Mapping[str, Tensor]]:
        return self.members[1:]

    @classmethod
    def from_saved(
        cls,
        model: PeftModel,
        settings: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        members: Sequence[Mapping[str, Tensor]],
    ) -> "Ensemble":
        _, adapter, _ = active_adapter(model)
        return cls(model, [adapter_tensors(model, adapter), *members])

    def sampler(self, *, draws: int, seed: int) -> Sampler:
        if not 1 <= draws <= len(self.members):
            raise refuse_draws(draws, f"this ensemble has members to average, expected 1 to {len(self.members)}.")
        _, adapter, _ = active_adapter(self.model)
        names = parameter_names(self.model, adapter)
        device = next(self.model.parameters()).device
        chosen = self.members[:draws]
        weights = [{name: member[key].to(device) for key, name in names.items()} for member in chosen]
        return SubstitutedDraws(self.model, weights)
