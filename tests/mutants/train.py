"""Defects of training when memory runs out, numbers are not finite, or several processes train."""

from mutants.defect import Defect

TRAINER, MEMORY, KL = "training/trainer.py", "training/memory.py", "training/kl.py"
FIRST = "training/test_memory.py first_update"

DEFECTS = (
    Defect(
        name="a part of a failed update reaches the optimiser",
        path=TRAINER,
        before="        model.zero_grad()\n",
        after="",
        tests=FIRST,
    ),
    Defect(
        name="a failed try advances the noise",
        path=TRAINER,
        before="            self._noise_callback.rewind()\n",
        after="            pass\n",
        tests=FIRST,
    ),
    Defect(
        name="a failed try advances the generators",
        path=MEMORY,
        before="            self._restore_generators()\n",
        after="",
        tests=FIRST,
    ),
    Defect(
        name="only the micro-batch that failed is run again",
        path=MEMORY,
        before="todo, before = self._batches, self._loss",
        after="todo, before = [batch], 0.0",
        tests=FIRST,
    ),
    Defect(
        name="a smaller forward normalised by its own rows",
        path=TRAINER,
        before="lambda rows: run(model, rows, num_items_in_batch)",
        after="lambda rows: run(model, rows, num_items_in_batch if rows is inputs else None)",
        tests=FIRST,
    ),
    Defect(
        name="the smaller size is forgotten after the update",
        path=MEMORY,
        before="        self._batches: list[dict[str, Any]] = []\n",
        after="        self._batches: list[dict[str, Any]] = []\n"
        "        self.rows_at_once = self._args.per_device_train_batch_size\n",
        tests=FIRST,
    ),
    Defect(
        name="one of several processes makes its forwards smaller",
        path=MEMORY,
        before="        if shared:\n",
        after="        if False:\n",
        tests="training/test_memory.py several_processes",
    ),
    Defect(
        name="evaluation in halves loses their order",
        path=MEMORY,
        before="for half in halves])",
        after="for half in reversed(halves)])",
        tests="training/test_memory.py evaluation",
    ),
    Defect(
        name="prediction in halves loses rows",
        path="inference/predict.py",
        before="todo[:0] = [places[:half], places[half:]]",
        after="todo[:0] = [places[:half]]",
        tests="inference/test_predict.py R01",
    ),
    Defect(
        name="a loss that is not finite is trained on",
        path=TRAINER,
        before='        if problem is not None:\n            raise self._stopped("nll"',
        after='        if False:\n            raise self._stopped("nll"',
        tests="training/test_finite.py row_that",
    ),
    Defect(
        name="a row whose loss is not finite is left out",
        path=TRAINER,
        before="(model, batch, draws * rows).view(draws, rows)",
        after="(model, batch, draws * rows).view(draws, rows).nan_to_num(0.0, 0.0)",
        tests="training/test_finite.py row_that",
    ),
    Defect(
        name="a gradient that AdamW cannot square",
        path=TRAINER,
        before="first_nonfinite(self._gradients(), squared=True)",
        after="first_nonfinite(self._gradients())",
        tests="training/test_finite.py row_that",
    ),
    Defect(
        name="a KL weight that is not finite",
        path="training/kl_callback.py",
        before="        if math.isfinite(self._rate * self._weight):\n",
        after="        if True:\n",
        tests="training/test_finite.py kl",
    ),
    Defect(
        name="a KL gradient that is not finite",
        path="training/kl_callback.py",
        before="            if bad is None:\n",
        after="            if True:\n",
        tests="training/test_finite.py kl",
    ),
    Defect(
        name="broken weights are saved",
        path=TRAINER,
        before='        if bad is not None:\n            problem = f"{bad[0]}',
        after='        if False:\n            problem = f"{bad[0]}',
        tests="training/test_finite.py weights",
    ),
    Defect(
        name="the last checkpoint is not named",
        path="training/finite.py",
        before="last = None if output is None else last_complete(Path(output))",
        after="last = None",
        tests="training/test_finite.py row_that",
    ),
    Defect(
        name="the KL once a process",
        path="training/kl_callback.py",
        before="self._weight = self.settings.schedule(state.global_step, self.settings.cycle)",
        after="self._weight = args.world_size * self.settings.schedule(state.global_step, self.settings.cycle)",
        tests="training/test_processes.py R06",
    ),
    Defect(
        name="the gradient divided by the processes twice",
        path=TRAINER,
        before="processes = 1 if num_items_in_batch is None else self.args.world_size",
        after="processes = 1",
        tests="training/test_processes.py R06",
    ),
    Defect(
        name="processes share their noise",
        path="training/noise_callback.py",
        before="args.seed, args.process_index",
        after="args.seed, 0",
        tests="training/test_processes.py R06",
    ),
    Defect(
        name="processes with other rows train together",
        path="training/checks.py",
        before="if own.get(name) != first.get(name):",
        after="if False:",
        tests="training/test_processes.py other_settings",
    ),
)
