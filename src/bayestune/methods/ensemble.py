"""Deep ensemble: K adapters trained independently on one base; predictions average their probabilities."""

from collections.abc import Sequence

import torch
from peft import PeftModel
from pydantic import Field

from bayestune.errors import PosteriorError
from bayestune.functional import derive_seed
from bayestune.methods.base import Fitting, Method
from bayestune.sampling.base import Members, Posterior, Sampler, SubstitutedDraws, Tensors, Values, refuse_draws
from bayestune.settings import LARGEST_WHOLE
from bayestune.storage.state import active_adapter, adapter_tensors, describe, parameter_names, tensor_fault


class EnsemblePosterior(Posterior):
    """``p(y|x) = 1/K sum_k softmax(logits(x; theta_k))`` over K members (Lakshminarayanan et al., arXiv 1612.01474).

    Draw k is member k whatever the seed; a prediction takes the first `draws` members. There is no mean, because the
    average of the members' weights was never trained.

    Args:
        model: the base with one plain LoRA adapter, whose weights are those of member 0.
        members: for each member, the tensors of its adapter (with its own heads) by their key in a LoRA file.
        temperature: the temperature of the averaged prediction.

    Raises:
        PosteriorError: there is no member, or a member's tensors do not match those of the adapter.
    """

    kind = "ensemble"
    has_mean = False

    def __init__(self, model: PeftModel, members: Sequence[Tensors], *, temperature: float = 1.0) -> None:
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

    def more_members(self) -> Sequence[Tensors]:
        return self.members[1:]

    @classmethod
    def from_saved(cls, model: PeftModel, settings: Values, tensors: Tensors, members: Members) -> "EnsemblePosterior":
        _, adapter, _ = active_adapter(model)
        return cls(model, [adapter_tensors(model, adapter), *members])

    def sampler(self, *, draws: int, seed: int) -> Sampler:
        if not 1 <= draws <= len(self.members):
            raise refuse_draws(draws, f"this ensemble has members to average, expected 1 to {len(self.members)}.")
        _, adapter, _ = active_adapter(self.model)
        names = parameter_names(self.model, adapter)
        own = dict(self.model.named_parameters())  # a base may be spread over devices
        chosen = self.members[:draws]
        weights = [{name: member[key].to(own[name].device) for key, name in names.items()} for member in chosen]
        return SubstitutedDraws(self.model, weights)


class Ensemble(Method):
    """Trains `members` independent adapters, one after another, on the same base.

    Member 0 has the seed of the run, so it is the adapter that plain LoRA trains. Each further member has its own
    seed, and with it its own initial weights and row order. In a run with checkpoints, finished members are saved
    beside them, so that a resumed run does not train them again.
    """

    name = "ensemble"
    label = "Ensemble"
    summary = "deep ensemble of plain LoRA adapters"
    paper = "Lakshminarayanan et al. 2017, arXiv 1612.01474"
    posterior = EnsemblePosterior
    one_training = False

    members: int = Field(3, ge=2, le=LARGEST_WHOLE, description="Number of adapters.")

    def draw_counts(self, draws: int) -> tuple[int, ...]:
        return (self.members,)

    def fit(self, model: PeftModel, run: Fitting) -> EnsemblePosterior:
        members = []
        for number in range(self.members):
            seed = run.seed if number == 0 else derive_seed("member", run.seed, number) % 2**31
            finished = run.folder / f"member_{number}"
            if number:
                model = run.renew(model, seed)
            if run.resume and finished.is_dir():
                model = run.restore(model, finished)
            else:
                label = f"member {number + 1} of {self.members}"
                run.train(model, label=label, seed=seed, folder=run.folder / f"steps_{number}")
                if run.checkpoints:
                    run.keep(model, finished)
            members.append({key: t.detach().clone() for key, t in adapter_tensors(model, "default").items()})
        with torch.no_grad():
            for key, tensor in adapter_tensors(model, "default").items():
                tensor.copy_(members[0][key])
        model.requires_grad_(False)
        return EnsemblePosterior(model.eval(), members)
