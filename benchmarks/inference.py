"""Our engines beside the reference's inference loop: ``python -m benchmarks.inference``.

The published model's size with random weights. In each round each loop runs in each layout, in
random order, in processes of its own: one process with a thread for each core, and one process of
one thread for each core, all at once. Beside them large matrix products (sgemm), which bound
what float32 can reach. Writes inference.json and inference.md; --write FILE puts the table between
the marks in a document.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import inference_report, loops
from benchmarks.start import ROOT, about, say

ENGINES = ("torch-fp32", "torch-bf16", "onnx-fp32", "openvino-fp32", "openvino-bf16")
MARKS = "<!-- inference -->\n", "<!-- /inference -->\n"
PACKAGES = ("torch", "numpy", "onnxruntime", "openvino")

Record = dict[str, Any]


def main(
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "16,32,64,128,256,512",
    engines: Annotated[str, typer.Option(help="Some of: " + ", ".join(ENGINES))] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Times that everything is repeated.")] = 5,
    rows: Annotated[int, typer.Option(min=16, help="Rows of a measurement and process.")] = 256,
    out: Annotated[Path, typer.Option(help="Folder for the two files.")] = Path("results/bench"),
    write: Annotated[Path | None, typer.Option(help="Document to put the table into.")] = None,
) -> None:
    """Compare inference loops; with five rounds and all engines some twelve minutes."""
    sizes = [int(word) for word in batches.split(",")]
    out.mkdir(parents=True, exist_ok=True)
    document: Record = {"about": about(*PACKAGES), "records": []}
    with tempfile.TemporaryDirectory() as folder:
        _prepare(Path(folder))
        names = [e for e in engines.split(",") if e] or _available(folder)
        for number in range(rounds):
            slots = _slots(["sgemm", "reference", *names])
            random.shuffle(slots)
            for name, ranks, threads in slots:
                say(f"round {number + 1} of {rounds}: {name}, {ranks} x {threads}")
                place = {"round": number, "loop": name, "ranks": ranks, "threads": threads}
                document["records"].append(place | measure(place, folder, sizes, rows))
            document["records"].append({"round": number, "cold": cold_starts(names, folder)})
            (out / "inference.json").write_text(json.dumps(document, indent=1) + "\n")
    table = inference_report.table(document)
    (out / "inference.md").write_text(table)
    if write:
        _write(write, table)
    print(table)
    say(f"written: {out}/inference.json and .md")


def _slots(names: list[str]) -> list[tuple[str, int, int]]:
    """Loop, processes, and threads of each."""
    cores = len(os.sched_getaffinity(0))
    layouts = {(1, cores), (cores, 1)}
    slots = [(name, *layout) for name in names for layout in layouts]
    alone = [(name, 1, 1) for name in names if name.endswith(("fp32", "reference")) and cores > 1]
    return [*slots, *alone, ("profiled", 1, cores)]


def _prepare(folder: Path) -> None:
    """Write the rows, and the model in our format and as the pickle that the reference loads."""
    import torch
    from torch.utils.data import TensorDataset

    from lambda_worker.engine import EngineError
    from lambda_worker.model_file import save_model
    from workflow.export import export

    torch.manual_seed(0)
    model = random_model()
    save_model(model, folder / loops.MODEL_FILE)
    torch.save(model, folder / loops.PLAIN_FILE)
    count = loops.FIRST_ROWS
    try:
        export(folder / loops.MODEL_FILE, step=say)
    except EngineError as error:
        say(f"without an export: {error}")
    parts = 3 * torch.rand(count, 5, 32, 32), 17 + 5 * torch.rand(count, 5), torch.rand(count)
    torch.save(TensorDataset(*parts), folder / loops.ROWS_FILE)


def random_model() -> Any:
    """The published size, with statistics in its BatchNorms that a fold cannot leave out."""
    import torch

    from lambda_worker.model import AstroMAE

    model = AstroMAE()
    for name, value in model.named_buffers():
        if name.endswith("running_mean"):
            value.normal_(0, 0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2)
    with torch.no_grad():
        model.cls_token.normal_(0, 0.02)
        model.pos_embed.normal_(0, 0.02)
    return model.eval()


def _available(folder: str) -> list[str]:
    found = []
    for name in ENGINES:
        with ExitStack() as stack:
            try:
                stack.enter_context(started(name, 1, folder))
                found.append(name)
            except RuntimeError as error:
                say(f"without {name}: {error}")
    return found


# -------------------------------------------------------------------------- measuring
def measure(place: Record, folder: str, sizes: list[int], rows: int) -> Record:
    """Seconds of each batch size (of the slowest process), memory and values of one slot."""
    name, ranks, threads = place["loop"], place["ranks"], place["threads"]
    if name in ("sgemm", "profiled"):
        sizes = [128]
    with ExitStack() as stack:
        processes = [stack.enter_context(started(name, threads, folder)) for _ in range(ranks)]
        rates = {}
        for size in sizes:
            seconds = ask(processes, f"rate {size} {max(rows, size)}")
            rates[str(size)] = ranks * max(rows, size) / max(seconds)
        found: Record = {"rates": rates}
        if name != "sgemm":
            found["private_mb"] = max(ask(processes, "memory 128"))
            found["values"] = ask(processes[:1], "values")[0]
    return found


def cold_starts(names: list[str], folder: str) -> dict[str, float]:
    """Seconds from the start of a process to its first 64 predictions, on one thread."""
    found = {}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    found["import torch"] = time.perf_counter() - start
    for name in ["profiled", "reference", *names]:
        start = time.perf_counter()
        with started(name, 1, folder):
            found[name] = time.perf_counter() - start
    return found


@contextmanager
def started(name: str, threads: int, folder: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has made its first predictions.

    Raises:
        RuntimeError: it ended before; with the last line of its error.
    """
    command = [sys.executable, "-m", "benchmarks.loops", name, str(threads), folder]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=pipe, stdout=pipe, stderr=log
        ) as process,
    ):
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                log.seek(0)
                raise RuntimeError((log.read().strip().splitlines() or ["no answer"])[-1])
            yield process
        finally:
            process.kill()


def ask(processes: list[subprocess.Popen[str]], command: str) -> list[Any]:
    """Give all processes a command at once; returns their answers."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(command + "\n")
        process.stdin.flush()
    return [json.loads(process.stdout.readline()) for process in processes if process.stdout]


def _write(document: Path, table: str) -> None:
    before, rest = document.read_text().split(MARKS[0])
    _, after = rest.split(MARKS[1])
    document.write_text(f"{before}{MARKS[0]}\n{table.rstrip()}\n\n{MARKS[1]}{after}")


if __name__ == "__main__":
    typer.run(main)
