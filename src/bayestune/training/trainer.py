"""`BayesTrainer`: transformers' Trainer for a posterior over adapter weights, or for plain LoRA."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from bayestune.adapters import gaussian_layers, random_layers, training_noise
from bayestune.errors import TrainingError
from bayestune.functional import gaussian_penalty
from bayestune.tasks import AnyRow, Task
from bayestune.training import checks, sharding
from bayestune.training.batches import ROW, Examples, LengthGrouped
from bayestune.training.callbacks import KLCallback, NoiseCallback
from bayestune.training.checkpoint import SafeTrainer
from bayestune.training.finite import Quantity, first_nonfinite, listed, nonfinite_rows, stopped
from bayestune.training.groups import parameter_groups
from bayestune.training.kl import KLSettings, posterior_summary
from bayestune.training.memory import BackOff, outputs_in_parts
from bayestune.training.posterior_std import default_kl


class BayesTrainer(SafeTrainer):
    """Trains a posterior over adapter weights by minimizing ``mean NLL + pi KL``; for plain LoRA, the MLE or MAP.

    The NLL, in nats, is averaged over all rows of an update (all micro-batches and processes) and, with
    `train_draws` = K, over K independent draws of the weights per row: the mean of the K NLLs, not the NLL of
    averaged logits. AdamW moves M, B and `modules_to_save`; `KLCallback` moves G and adds the KL (see `training.kl`;
    BLoB, arXiv 2406.11675, and its released code). Weight decay does not apply to M, which has the prior instead.
    Evaluation during training uses the posterior mean. Checkpoints are safetensors and JSON, and resume bit for bit.

    If a GPU runs out of memory, the update restarts with half the rows per forward (see `training.memory`), and later
    updates keep that size; a `BayestuneWarning` says so. If the CPU or the optimizer step runs out, the run ends.

    With FSDP2 the processes train shards, and `model` gets the trained adapter at the end (see `training.sharding`).

    Args:
        model: PEFT model with a Bayesian or plain LoRA adapter.
        task: the task, which defines prompts, labels and the loss.
        args: as in `transformers.Trainer`; `remove_unused_columns` is ignored and `data_seed` defaults to `seed`.
        train_rows: training rows; default `task.rows("train")`.
        eval_rows: rows that `evaluate()` and the evaluations during training (`eval_strategy`) score. They replace
            `Trainer`'s `eval_dataset`.
        kl: the KL term; default `default_kl`: a std of 0.3 x the prior's under a learning rate that falls linearly.
        prior_std: s_p of MAP training of plain LoRA: the loss is ``mean NLL + ||theta||^2 / (2 s_p^2 rows)`` over all
            trained weights, heads included. None for the MLE.
        train_draws: K, draws of the weights per row and update (uncorrelated but not independent with flipout).
        optimizer: replaces AdamW; its learning rate must be `args.learning_rate`.
        callbacks: further callbacks, as in `transformers.Trainer`.

    Raises:
        ConfigError: a setting is out of range, unsupported, or without effect.
        DataError: a row has no label, cannot be scored, or has a token without an embedding.
        TrainingError: the loss, a gradient or the KL is not finite, or memory ran out with one row per forward or in
            one of several processes; raised before the update.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PeftModel,
        *,
        task: Task,
        args: TrainingArguments,
        train_rows: Sequence[AnyRow] | None = None,
        eval_rows: Sequence[AnyRow] | None = None,
        kl: KLSettings | None = None,
        prior_std: float | None = None,
        train_draws: int = 1,
        optimizer: torch.optim.Optimizer | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
    ) -> None:
        args = checks.checked_arguments(args)
        self._optimizer_settings = optimizer and f"{type(optimizer).__name__} {optimizer.defaults}"
        if sharding.asked(args):
            model, optimizer = self._to_shard(model, optimizer), None
        self.task, self.train_draws, self.prior_std = task, train_draws, prior_std
        self._gaussian, random = gaussian_layers(model), random_layers(model)
        self._noise = training_noise(model) if random else None
        checks.check_model(model, bool(random), bool(self._gaussian), kl, prior_std, train_draws)
        self._train = train = Examples(task, task.rows("train") if train_rows is None else train_rows, model)
        checks.check_rows(args, len(train))
        if args.eval_strategy != "no":
            checks.check_eval_rows(eval_rows)
        self._noise_callback = NoiseCallback() if random else None
        if self._gaussian:
            kl = kl or default_kl(self._gaussian.values(), len(train), args)
            self._noise_callback = KLCallback(kl)
        self.kl = kl
        super().__init__(
            model=model,
            args=args,
            data_collator=train.collate,
            train_dataset=train,
            eval_dataset=None if eval_rows is None else Examples(task, eval_rows, model),
            compute_metrics=lambda found: task.metrics(*map(torch.as_tensor, (found.predictions, found.label_ids))),
            callbacks=[*([self._noise_callback] if self._noise_callback else []), *(callbacks or [])],
            optimizers=(optimizer, None),
        )
        self._memory = BackOff(self.args, self._train.ids, self._train.batch)
        checks.check_plugins(deepspeed=self.is_deepspeed_enabled)
        assert self.is_fsdp_enabled == (self._ordinary is not None)
        if args.world_size > 1:
            checks.check_same_settings(gather_object([{**self.resume_settings(), **self._start()}]))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Like `Trainer.get_eval_dataloader`, but with `eval_rows` by default."""
        checks.check_eval_rows(self.eval_dataset if eval_dataset is None else eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create AdamW (or plain SGD) over M, which is not decayed, B and the trained heads, but not G."""
        self.optimizer = self.optimizer or self._given
        if self.optimizer is None:
            module = self.model if model is None else model
            assert isinstance(module, nn.Module)
            decayed = set(self.get_decay_parameter_names(module))
            layers, decay = self._gaussian.values(), self.args.weight_decay
            groups = parameter_groups(module, layers, decayed=decayed, weight_decay=decay)
            optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = optimizer_class(groups, **settings)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        assert self.args.data_seed is not None
        return LengthGrouped(self._train.lengths, batch_size=rows, seed=self.args.data_seed)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], int]:
        """Return the micro-batches of one update and the number of their rows over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._memory.start_update()
        rows = sum(len(batch[ROW]) for batch in batches)
        if self.args.world_size > 1:
            gathered = self.accelerator.gather(torch.tensor(rows, device=device))
            assert isinstance(gathered, Tensor)
            rows = int(gathered.sum())
        return batches, rows

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return this micro-batch's share of the update's mean NLL, in nats (of the MAP objective with `prior_std`).

        ``processes / (K rows) * sum_k sum_i -log p(y_i | x_i, theta_ki)``, where `num_items_in_batch` is the rows of
        the update over all processes (default: those of `inputs`); DDP averages the gradients over processes.
        With `return_outputs` the NLLs, [K, rows], are returned too.
        """
        batch = dict(inputs)
        index = batch.pop(ROW)
        draws, rows = self.train_draws, len(index)
        if draws > 1:
            batch = {name: tensor.repeat(draws, *[1] * (tensor.dim() - 1)) for name, tensor in batch.items()}
        if self._noise is not None:
            self._noise.rows = draws * rows
        try:
            nll = self.task.loss(model, batch).view(draws, rows)
        finally:
            if self._noise is not None:
                self._noise.rows = None
        problem = nonfinite_rows(nll, index, self._train.ids)
        if problem is not None:
            raise self._stopped("nll", problem, advice="look at that row, or lower the learning rate")
        total = rows if num_items_in_batch is None else int(num_items_in_batch)
        processes = 1 if num_items_in_batch is None else self.args.world_size
        loss = nll.sum() * (processes / (draws * total))
        if self.prior_std is not None:
            trained = [sharding.whole(parameter) for parameter in model.parameters() if parameter.requires_grad]
            share = processes * rows / (total * len(self._train.ids))
            loss = loss + gaussian_penalty(trained, self.prior_std) * share
        return (loss, nll) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Like `Trainer.training_step`, but on as many rows at once as memory allows."""
        run = super().training_step
        loss = self._memory.run(
            inputs,
            lambda rows: run(model, rows, num_items_in_batch),
            lambda: self._undo_update(model),
            step=self.state.global_step,
            shared=isinstance(model, (DistributedDataParallel, FSDPModule)),
        )
        if self.accelerator.sync_gradients:
            self._check_gradient(num_items_in_batch)
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the mean NLL, the task's outputs [rows, columns] and the labels [rows] of a batch, at the mean."""
        batch = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = outputs_in_parts(self.task, model, {k: value for k, value in batch.items() if k != ROW})
        loss = self.task.row_loss(outputs.double(), batch).mean()
        return (loss, None, None) if prediction_loss_only else (loss, outputs.detach(), batch["labels"])

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Like `Trainer.evaluation_loop`, but with `task.metrics` and their NLL as `loss`; restores training modes."""
        assert self.model is not None
        modes = [(module, module.training) for module in self.model.modules()]
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                output = super().evaluation_loop(*args, **kwargs)
        finally:
            for module, training in modes:
                module.training = training
            sharding.reshard(self.model)
        assert output.metrics is not None
        # Trainer's own loss is a mean of batch means, in which the rows of a short last batch count more.
        output.metrics.update(
            {k.removesuffix("nll") + "loss": v for k, v in output.metrics.items() if k.endswith("_nll")}
        )
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Like `Trainer.log`, with `nll` (the MAP objective with `prior_std`), `kl`, both in nats, and mean `std`."""
        if "loss" in logs:
            logs = {**logs, "nll": logs["loss"], **posterior_summary(self._gaussian.values())}
        super().log(logs, start_time)

    def resume_settings(self) -> dict[str, Any]:
        """Like `SafeTrainer.resume_settings`, with the rows, the draws and the KL weight of this step."""
        settings = {
            **super().resume_settings(),
            "train_draws": self.train_draws,
            "rows": len(self._train.ids),
            "row_sha256": self._train.sha256,
            "prior_std": self.prior_std,
            "optimizer": self._optimizer_settings,
        }
        if self.kl is not None:
            settings["kl_cycle"], settings["kl_learning_rate"] = self.kl.cycle, self.kl.learning_rate
            settings["kl_weight"] = self.kl.schedule(self.state.global_step, self.kl.cycle)
        return settings

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        assert self.model is not None
        bad = first_nonfinite({name: p for name, p in self.model.named_parameters() if p.requires_grad})
        if bad is not None:
            problem = f"{bad[0]} ({bad[1]} parameters in all) is not finite after the update"
            raise self._stopped("weights", problem, advice="lower the learning rate")
        super()._save_checkpoint(model, trial)

    def _undo_update(self, model: nn.Module) -> None:
        """Discard the gradients of this update and go back to its first noise."""
        model.zero_grad()
        if self._noise_callback is not None:
            self._noise_callback.rewind()

    def _gradients(self) -> dict[str, Tensor]:
        assert self.model is not None
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def _check_gradient(self, num_items_in_batch: Tensor | int | None) -> None:
        # Squared, as in AdamW's second moment: a square that overflows would freeze its parameter.
        bad = first_nonfinite(self._gradients(), squared=True)
        if bad is None:
            return
        rows = self._memory.rows
        apart = self._ordinary is None  # sharded processes can only run rows together
        guilty = [row for row in rows if apart and self._spoils_gradient(row, num_items_in_batch)]
        source = f"{'from' if guilty else 'from one of'} {listed([self._train.ids[row] for row in guilty or rows])}"
        problem = f"the NLL gradient of {bad[0]} ({bad[1]} parameters in all) is not finite, {source}"
        raise self._stopped("gradient", problem, advice="look at that row, lower the learning rate, or use float32")

    def _spoils_gradient(self, row: int, num_items_in_batch: Tensor | int | None) -> bool:
        """Return whether the gradient of this row alone, in this process, is not finite."""
        assert self.model is not None
        self._undo_update(self.model)
        super().training_step(self.model, self._train.batch([row]), num_items_in_batch)
        return not all(gradient.square().isfinite().all() for gradient in self._gradients().values())

    def _stopped(self, quantity: Quantity, problem: str, *, advice: str) -> TrainingError:
        rate = self.args.learning_rate if self.lr_scheduler is None else self._get_learning_rate()
        step, output = self.state.global_step, self.args.output_dir
        return stopped(quantity, problem, step=step, learning_rate=rate, output=output, advice=advice)
