"""From the start of a process to its first predictions: ``python -m benchmarks.cold_start MODEL``.

MODEL is a .safetensors file with its export beside it (`cosmic model export`); 64 rows lie in a
.pt file. The reference is the plain model in torch, fed by a DataLoader that holds the whole file.
All take turns; medians, and their ratios to the reference.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.utils.data import TensorDataset

ROOT = Path(__file__).parents[1]
ROWS = 64

REFERENCE = """
import sys
import torch
from torch.utils.data import DataLoader, TensorDataset
from lambda_worker.model import load_model
_, data, model = sys.argv
with torch.serialization.safe_globals([TensorDataset]):
    rows = torch.load(data)
module = load_model(model)
with torch.no_grad():
    for images, magnitudes, _ in DataLoader(rows, batch_size=64):
        print(len(module(images, magnitudes)))
"""
OURS = """
import sys
from pathlib import Path
from lambda_worker import dataset
from lambda_worker.engine import open_engine
from lambda_worker.shard import Piece
_, data, model, engine = sys.argv
rows = dataset.Shard([Piece(data, 0, 64)], Path(data).parent)
predict = open_engine(Path(model), engine=engine)
print(len(predict(*rows.batch(0, 64)[:2])))
"""


def seconds(script: str, *words: str) -> float:
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", script, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()  # what comes after the first predictions does not count
        taken = time.perf_counter() - began
    if first.strip() != str(ROWS):
        raise SystemExit("a process failed; see above")
    return taken


def main(
    model: Annotated[Path, typer.Argument(help="A .safetensors file.")],
    rounds: Annotated[int, typer.Option(help="How often each is started.")] = 7,
) -> None:
    """Print the table that stands in docs/engines.md."""
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/rows.pt"
        parts = torch.rand(ROWS, 5, 32, 32), 17 + torch.rand(ROWS, 5), torch.rand(ROWS)
        torch.save(TensorDataset(*parts), data)
        place = str(model.absolute())
        cases = {
            "reference": (REFERENCE, data, place),
            "import torch": (f"import torch; print({ROWS})",),
            **{name: (OURS, data, place, name) for name in ("torch", "onnx", "openvino")},
        }
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(rounds):
            for name, case in cases.items():
                times[name].append(seconds(*case))
    base = statistics.median(times["reference"])
    print("| | seconds, median | least | to the reference |\n|---|---|---|---|")
    for name, values in times.items():
        middle = statistics.median(values)
        print(f"| {name} | {middle:.2f} | {min(values):.2f} | {middle / base:.2f} |")


if __name__ == "__main__":
    typer.run(main)
