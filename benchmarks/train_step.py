"""Measure time and memory of a training step of BLoB, of plain LoRA, and of the released code's algorithm.

    python benchmarks/train_step.py [--shape llama-4x128] [--device cpu] [--checkpointing] [--json FILE]

Prints one JSON object. "ratio" is the median over rounds of BLoB's time divided by plain LoRA's. "reference_ratio" is
the same for `looped_reference.py`, and "control_ratio" for a second plain LoRA; its distance from 1 is noise. A step
is forward, backward, AdamW and, for BLoB, noise and KL, as `BayesTrainer` takes them. "memory" is the peak of each
variant: on a CPU the resident memory of three processes, with an allocator that returns freed memory immediately, and
on a GPU what CUDA allocated in one process. "memory_ratio" is the median peak of BLoB without G and its gradient,
divided by that of plain LoRA.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
from looped_reference import ReferenceTraining
from options import add_machine, parser, publish
from pairs import peak_memory, ratio, seconds, spread
from peft import PeftModel
from shapes import Answers, Shape

from bayestune.adapters import gaussian_layers, training_noise
from bayestune.functional import paper_kl_weight
from bayestune.training.kl import kl_step

CYCLE, PROCESSES = 100, 3
GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
"""Settings that make glibc return freed memory. What it keeps by default varies more than BLoB's memory."""
WAYS, CONTROL = ("lora", "blob", "reference"), "lora_again"


def main() -> None:
    made = parser(__doc__, pairs=40)
    add_machine(made, shape="llama-4x128", gpu_shape="llama7b-4x300", warmup=5)
    made.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    made.add_argument("--memory-of", choices=WAYS, help="only print the peak memory, in bytes, of a few steps")
    options = made.parse_args()
    shape = Shape.of(options.shape or ("llama7b-4x300" if options.device.startswith("cuda") else "llama-4x128"))
    if options.memory_of:
        print(peak(step_of(options.memory_of, shape, options), options.device))
        return
    processes = 1 if options.device.startswith("cuda") else PROCESSES  # CUDA allocates the same in every process
    # Measured before this process takes memory of its own.
    peaks = {way: [memory_of(way, shape.name, options) for _ in range(processes)] for way in WAYS}
    steps = {way: step_of(way, shape, options) for way in (*WAYS, CONTROL)}
    times = seconds(steps, pairs=options.pairs, warmup=options.warmup, device=options.device)
    memory = {way: statistics.median(found) for way, found in peaks.items()}
    extra = extra_bytes(shape)
    found = {
        "ratio": ratio(times["blob"], times["lora"]),
        "reference_ratio": ratio(times["reference"], times["lora"]),
        "control_ratio": ratio(times[CONTROL], times["lora"]),
        "pairs": options.pairs,
        "shape": shape.name,
        "checkpointing": options.checkpointing,
        "quartiles": spread(times["blob"], times["lora"]),
        "milliseconds": {way: 1000 * torch.tensor(t).median().item() for way, t in times.items()},
        "memory": peaks,
        "memory_ratio": (memory["blob"] - extra) / memory["lora"],
        "extra_bytes": extra,
    }
    publish(found, options, device=options.device)


def step_of(way: str, shape: Shape, options: argparse.Namespace) -> Callable[[], None]:
    """Return a closure that takes one training step."""
    model = shape.adapted(options.device, bayesian=way == "blob").train()
    if options.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    task, batch = Answers(shape), shape.batch(options.device)

    def loss(model: PeftModel) -> torch.Tensor:
        return task.loss(model, batch).mean()

    if way == "reference":
        training = ReferenceTraining(model, loss)
        return lambda: training.step(paper_kl_weight(0, CYCLE))
    return bayestune_step(model, loss) if way == "blob" else plain_step(model, loss)


def plain_step(model: PeftModel, loss: Callable[[PeftModel], torch.Tensor]) -> Callable[[], None]:
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, eps=1e-6, weight_decay=0.0)

    def step() -> None:
        loss(model).backward()
        adam.step()
        adam.zero_grad()

    return step


def bayestune_step(model: PeftModel, loss: Callable[[PeftModel], torch.Tensor]) -> Callable[[], None]:
    layers, noise = list(gaussian_layers(model).values()), training_noise(model)
    rhos = {id(layer.rho) for layer in layers}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in rhos]
    adam = torch.optim.AdamW(others, lr=1e-4, eps=1e-6, weight_decay=0.0)

    def step() -> None:
        noise.step, noise.micro = noise.step + 1, 0
        loss(model).backward()
        adam.step()
        kl_step(layers, rate=0.01, weight=paper_kl_weight(noise.step, CYCLE), along_nll=True)
        model.zero_grad()

    return step


def peak(step: Callable[[], None], device: str) -> int:
    for _ in range(3):
        step()
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return peak_memory()


def memory_of(way: str, shape: str, options: argparse.Namespace) -> int:
    """Return the peak memory of a variant in a separate process, in bytes."""
    command = [sys.executable, __file__, "--memory-of", way, "--shape", shape, "--device", options.device]
    command += ["--checkpointing"] if options.checkpointing else []
    environment = {**os.environ, **GIVING_BACK}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout.split()[-1])


def extra_bytes(shape: Shape) -> int:
    """Return the bytes of G and its gradient."""
    model = shape.adapted("meta" if shape.causal else "cpu", bayesian=True)
    return sum(2 * layer.rho.numel() * layer.rho.element_size() for layer in gaussian_layers(model).values())


if __name__ == "__main__":
    main()
