"""Defects of the objective of training."""

from mutants.defect import Defect

TRAINER = "training/trainer.py"

DEFECTS = (
    Defect(
        name="sum of the NLLs instead of their mean",
        path=TRAINER,
        before="loss = nll.sum() * (processes / (draws * total))",
        after="loss = nll.sum() * processes",
        tests="training/test_gradient.py S17",
    ),
    Defect(
        name="micro-batches averaged by their number",
        path=TRAINER,
        before="total = rows if num_items_in_batch is None else int(num_items_in_batch)",
        after="total = rows * self.args.gradient_accumulation_steps",
        tests="training/test_gradient.py S17",
    ),
    Defect(
        name="G among AdamW's parameters too",
        path="training/optimizer.py",
        before="rhos, means = {id(layer.rho) for layer in layers}, ",
        after="rhos, means = set[int](), ",
        tests="training/test_trainer.py N09",
    ),
    Defect(
        name="evaluation leaves the model in evaluation mode",
        path=TRAINER,
        before="                module.training = training\n",
        after="                pass\n",
        tests="training/test_trainer.py S18",
    ),
    Defect(
        name="the prior of the MAP counted once a row",
        path=TRAINER,
        before="share = processes * rows / (total * len(self._train.ids))",
        after="share = processes * rows / total",
        tests="training/test_prior.py",
    ),
)
