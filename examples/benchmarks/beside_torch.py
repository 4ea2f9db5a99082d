"""Times a training step of GPT-2 small in PyTorch, beside `machine_steps.py`'s.

The same layers, batch and AdamW (`gpt2_sizes.py`) with `torch.compile`: in float32 with
TensorFloat-32 matmuls, as XLA runs them, and under `torch.autocast` in bfloat16.
PyTorch is not among jaxmp's dependencies, so it gets an environment of its own:

    python3 -m venv out/torch && out/torch/bin/pip install -q torch numpy
    out/torch/bin/python examples/benchmarks/beside_torch.py

Softmax is written out, as it is in the Flax model; `--attention sdpa` takes PyTorch's
fused attention. Records go beside those of `machine_steps.py`, and its page shows them
in the table of GPT-2. With `--tiny` a small model runs, on any machine.
"""

import argparse
import pathlib
import time
from typing import Any

import machine_records
from gpt2_sizes import SMALL, TINY, AdamW, Sizes
from machine_records import Machine, Record
from rounds import measured, warm_up

WAYS = ("float32", "bfloat16 autocast")
ATTENTION = {"written": "softmax written out", "sdpa": "fused attention"}


def read_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--way", action="append", choices=WAYS)
    parser.add_argument("--attention", choices=list(ATTENTION), default="written")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="steps in a round")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--tiny", action="store_true", help="a small model, for tests")
    parser.add_argument(
        "--records", type=pathlib.Path, default=machine_records.FOLDER, metavar="FOLDER"
    )
    return parser.parse_args()


def name(way: str, arguments: argparse.Namespace) -> str:
    """What a row is called in the table."""
    eager = ", not compiled" if arguments.eager else ""
    return f"{way}, {ATTENTION[arguments.attention]}{eager}"


def optimizer_options(numbers: AdamW, *, fused: bool) -> dict[str, Any]:
    """The arguments of `torch.optim.AdamW`."""
    return {
        "lr": numbers.rate,
        "betas": (numbers.b1, numbers.b2),
        "eps": numbers.eps,
        "weight_decay": numbers.weight_decay,
        "fused": fused,
    }


def describe(torch: Any) -> Machine:
    """Where PyTorch runs: the first GPU, else the CPU."""
    if torch.cuda.is_available():
        device, platform = torch.cuda.get_device_name(0), "gpu"
    else:
        device, platform = "cpu", "cpu"
    return Machine(device, platform, f"torch {torch.__version__}")


def measure(way: str, sizes: Sizes, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains one way; returns the fields of its record."""
    import torch
    from torch_gpt2 import GPT2

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # TensorFloat-32
    model = GPT2(sizes, fused=arguments.attention == "sdpa").to(device)
    count = sum(weight.numel() for weight in model.parameters())
    assert count == sizes.parameters, f"{count} parameters, not {sizes.parameters}"
    optimizer = torch.optim.AdamW(
        model.parameters(), **optimizer_options(AdamW(), fused=on_gpu)
    )
    shape = sizes.batch, sizes.length + 1
    tokens = torch.randint(sizes.vocabulary, shape, device=device)
    in_half = torch.autocast(device.type, torch.bfloat16, enabled="bfloat16" in way)
    loss_of = model if arguments.eager else torch.compile(model)
    loss = None

    def start() -> None:
        nonlocal loss
        optimizer.zero_grad(set_to_none=True)
        with in_half:
            loss = loss_of(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    began = time.perf_counter()
    start()
    wait()
    seconds = time.perf_counter() - began
    first_loss = float(loss.detach())
    warm_up(start, wait)
    if on_gpu:  # what tuning took is no part of a step
        torch.cuda.reset_peak_memory_stats()
    times = measured(start, wait, rounds=arguments.rounds, steps=arguments.steps)
    return {
        **times,
        "allocated": torch.cuda.max_memory_allocated() if on_gpu else None,
        "compile_seconds": seconds,
        "loss": first_loss,
    }


def main() -> None:
    arguments = read_flags()
    try:
        import torch
    except ImportError:
        raise SystemExit(
            "PyTorch is not installed here. Make an environment for it:\n"
            "python3 -m venv out/torch && out/torch/bin/pip install -q torch numpy"
        ) from None
    sizes = TINY if arguments.tiny else SMALL
    machine = describe(torch)
    print(f"{machine.device}, {machine.software}, {sizes.shape}")
    if machine.platform == "cpu":
        print("The CPU emulates half precision: its times say nothing of a GPU.")
    for way in arguments.way or WAYS:
        torch.compiler.reset()
        try:
            fields = measure(way, sizes, arguments)
        except RuntimeError as error:  # out of memory is one: a row that says so
            text = " ".join(str(error).split())[:300]
            fields = {"error": f"{type(error).__name__}: {text}"}
        record = Record(
            model="GPT-2 small",
            way=name(way, arguments),
            machine=machine,
            shape=sizes.shape,
            tiny=arguments.tiny,
            **fields,
        )
        machine_records.add(record, arguments.records / machine_records.TORCH)
        print(line(record), flush=True)


def line(record: Record) -> str:
    if record.error:
        return f"{record.way:40} {record.error}"
    memory = f", {record.allocated / 2**30:.2f} GiB" if record.allocated else ""
    return (
        f"{record.way:40} {record.median:8.2f} ms ({min(record.ms):.2f} to "
        f"{max(record.ms):.2f}){memory}, first step {record.compile_seconds:.1f} s"
    )


if __name__ == "__main__":
    main()
