"""Seeded answers and a short training in this process, in a forked one and in a spawned one. See test_workers.py.

    workers.py FOLDER

Prints, as JSON, the SHA-256 of the answers of each process, and of the weights each ends training with.
"""

import hashlib
import json
import multiprocessing
import random
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from bayestune.adapters import gaussian_layers
from bayestune.inference import draw, predict
from bayestune.training import BayesTrainer, KLSettings
from inference.cases import Letters
from inference.cases import rows as questions
from probes import double_llama
from training.toys import TASK, arguments, double_blob, rows, trained


def digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()


def states() -> tuple[object, ...]:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def answer() -> str:
    """Answers and drawn weights, which must not move any global state; a seed of its own stands in each process."""
    model = double_llama()
    before = states()
    found = predict(model, Letters(), questions(4), draws=3, seed=7).draw_log_probs
    with draw(model, index=1, seed=7), torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert states() == before
    return digest(found, logits)


def train(folder: Path) -> str:
    model = double_blob()
    trainer = BayesTrainer(
        model, task=TASK, args=arguments(folder, max_steps=4), train_rows=rows(12), kl=KLSettings(cycle=4)
    )
    trainer.train()
    assert gaussian_layers(model)
    return digest(*(tensor for _, tensor in sorted(trained(model).items())))


def work(seed: int, folder: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
    pipe.send({"answer": answer(), "trained": train(folder)})


def main(folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    found = {"here": {"answer": answer(), "trained": train(Path(folder) / "here")}}
    for seed, method in enumerate(("fork", "spawn"), start=2):
        context = multiprocessing.get_context(method)
        ours, theirs = context.Pipe()
        worker = context.Process(target=work, args=(seed, Path(folder) / method, theirs))
        worker.start()
        theirs.close()
        found[method] = ours.recv()
        worker.join()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
