"""Time and memory of a training step of BLoB, of plain LoRA, and of the released code's algorithm.

    python benchmarks/train_step.py [--shape llama-4x128] [--device cpu] [--checkpointing] [--json FILE]

Prints one JSON object: "ratio" is the median over rounds of BLoB's time by plain LoRA's, "reference_ratio" that of
`looped_reference.py`, "control_ratio" that of a second plain LoRA: how far it is from 1 is the machine's doing. A step
is forward, backward, AdamW and, for BLoB, noise and KL, as `BayesTrainer` takes them. "memory" is each way's peak in
each of three processes of its own (resident, with an allocator that gives memory back at once), or in one (allocated
by CUDA), and "memory_ratio" the median of BLoB's, less G and its gradient, by that of plain LoRA's.
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
"""For glibc: without, the peak is that of what it keeps, which differs from run to run by more than BLoB takes."""
WAYS, CONTROL = ("lora", "blob", "reference"), "lora_again"


def main() -> None:
    made = parser(__doc__, pairs=40)
    add_machine(made, shape="llama-4x128", gpu_shape="llama7b-4x300", warmup=5)
    made.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    made.add_argument("--memory-of", choices=WAYS, help="print the peak memory, in bytes, of a few steps, no more")
    options = made.parse_args()
    shape = Shape.of(options.shape or ("llama7b-4x300" if options.device.startswith("cuda") else "llama-4x128"))
    if options.memory_of:
        print(peak(step_of(options.memory_of, shape, options), options.device))
        return
    processes = 1 if options.device.startswith("cuda") else PROCESSES  # what CUDA allocates is the same in each
    # Before this process takes memory of its own.
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
