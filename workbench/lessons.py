"""What tutorial.ipynb says and measures with, and the upkeep of the notebook:

python -m workbench.lessons refresh    bring its listings of functions up to date
python -m workbench.lessons short      write short.ipynb, the short path alone
python -m workbench.lessons words      count the words of both paths
"""

import importlib
import inspect
import json
import operator
import re
import sys
import textwrap
from pathlib import Path

import torch
from torch import Tensor

import maskrl
from workbench.timing import clock

CPU = torch.device("cpu")
NOTEBOOK = Path(__file__).parents[1] / "tutorial.ipynb"
RESULTS = Path(__file__).parents[1] / "assets" / "results"
LISTING = r"From `(maskrl|workbench\.\w+)\.([\w.]+)`:\n```python\n(.*)\n```"

# Words --------------------------------------------------------------------------------------------


def markdown(text: str) -> None:
    from IPython.display import Markdown, display  # only a notebook has it

    display(Markdown(text))


def verdict(text: str) -> None:
    markdown(f"**Verdict.** {text}")


def table(head, rows) -> None:
    lines = [head, ["---"] * len(head), *rows]
    markdown("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines))


def check(answer, right) -> None:
    """Say whether the answer of an exercise is right; None is no answer yet."""
    if answer is None:
        print("no answer yet: replace None, and run this cell again")
        return
    assert right(answer), "not right yet"
    print("right")


def mean_std(values, digits=2) -> str:
    """Repeated measurements as text: their mean ± their standard deviation."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return f"{values.mean():.{digits}f} ± {values.std():.{digits}f}"


def versus(a, b) -> str:
    """How the repeated measurements a compare with b: "no different from" if their means lie within
    two standard errors of each other."""
    a, b = (torch.as_tensor(v, dtype=torch.float64) for v in (a, b))
    error = (a.var() / len(a) + b.var() / len(b)).sqrt()
    difference = a.mean() - b.mean()
    if difference.abs() <= 2 * error:
        return "no different from"
    return "higher than" if difference > 0 else "lower than"


def paired(a, b, digits=3) -> str:
    """The mean of the differences a - b, seed by seed, ± its standard error."""
    difference = torch.as_tensor(a, dtype=torch.float64) - torch.as_tensor(b, dtype=torch.float64)
    error = difference.std() / len(difference) ** 0.5
    return f"{difference.mean():+.{digits}f} ± {error:.{digits}f}".replace("-", "−")


def results(study: str, row: str, key: str) -> list:
    """What a study measured, from assets/results: the figure `key` of a row, seed by seed."""
    rows = json.loads((RESULTS / f"{study}.json").read_text())["rows"]
    return [seed[key] for seed in rows[row].values()]


class Clock:
    """Notes when each section begins; `report` prints how long they took."""

    def __init__(self):
        self.starts = {}

    def begin(self, section: str) -> None:
        self.starts[section] = clock(CPU)

    def report(self) -> None:
        names, times = list(self.starts), [*self.starts.values(), clock(CPU)]
        for name, start, end in zip(names, times, times[1:]):
            print(f"{name:26}{end - start:6.1f} s")
        threads = torch.get_num_threads()
        print(f"{'together':26}{times[-1] - times[0]:6.1f} s; threads: {threads}")


# Measurements -------------------------------------------------------------------------------------


def patches(rows: Tensor, settings) -> Tensor:
    """Tokens [N, D] as images of one patch each [N, 3, p, p]."""
    return maskrl.to_images(rows[:, None], settings)


def hide(x: Tensor, mask: Tensor, settings) -> Tensor:
    """The images of tokens x [B, L, D] with those under the mask [B, L] in light grey."""
    grey = (0.5 - settings.mean) * settings.scale
    return maskrl.to_images(torch.where(mask[..., None], grey, x), settings)


@torch.no_grad()
def walk(head, c: Tensor, z: Tensor, settings) -> tuple[Tensor, Tensor]:
    """Every x_t [n + 1, N, D] and estimate of x_0 [n, N, D] along a teacher's chain, for noise z
    [N, D] and contexts c [N, W]."""
    chain, limits = maskrl.Diffusion(settings.denoise_steps), maskrl.x_0_limits(settings)
    generator, xs, estimates = maskrl.rng("walk"), [z], []
    for i in reversed(range(settings.denoise_steps)):
        out = head(xs[-1], torch.full((len(z),), int(chain.times[i])), c)  # [N, 2D]
        eps, _ = out.chunk(2, -1)  # [N, D]
        x_0 = (xs[-1] - chain.sigma[i].float() * eps) / chain.alpha[i].float()
        estimates.append(x_0.clamp(*limits))
        noise = torch.randn(z.shape, generator=generator)
        xs.append(chain.step(i, xs[-1], out, noise, limits=limits))
    return torch.stack(xs), torch.stack(estimates)


def milliseconds(model, sampling=None, repeats=3, n=9) -> list[float]:
    """Times per image of `repeats` batches of n."""
    times, labels = [], torch.arange(n) % model.num_classes
    for _ in range(repeats):
        start = clock(CPU)
        maskrl.generate(model, labels, sampling)
        times.append(1000 * (clock(CPU) - start) / n)
    return times


# Upkeep -------------------------------------------------------------------------------------------


def listing(thing) -> str:
    code = textwrap.dedent(inspect.getsource(thing)).rstrip()
    return f"From `{thing.__module__}.{thing.__qualname__}`:\n```python\n{code}\n```"


def source(thing) -> None:
    """Show the whole source of a function or class."""
    markdown(listing(thing))


def read() -> dict:
    return json.loads(NOTEBOOK.read_text())


def refresh(notebook: dict) -> list[str]:
    """Replace the listings in the outputs by the present sources; the names of those that changed.

    AttributeError if a listed function is gone: then the prose about it needs a new one."""
    changed = []
    outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", ())]
    for output in outputs:
        data = output.get("data", {})
        shown = re.fullmatch(LISTING, "".join(data.get("text/markdown", "")), re.S)
        if shown:
            module, name, _ = shown.groups()
            present = listing(operator.attrgetter(name)(importlib.import_module(module)))
            if present != shown.group():
                changed.append(name)
                data["text/markdown"] = present.splitlines(keepends=True)
    return changed


def is_short(cell: dict) -> bool:
    return "short" in cell["metadata"].get("tags", ())


def words(cells) -> int:
    return sum(len("".join(cell["source"]).split()) for cell in cells)


def write(notebook: dict, path: Path) -> None:
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def main(task: str) -> None:
    notebook = read()
    short = [cell for cell in notebook["cells"] if is_short(cell)]
    if task == "refresh":
        print("changed:", ", ".join(refresh(notebook)) or "none")
        write(notebook, NOTEBOOK)
    elif task == "short":
        write(notebook | {"cells": short}, NOTEBOOK.with_name("short.ipynb"))
    elif task == "words":
        print(f"short path {words(short)} of {words(notebook['cells'])} words, code included")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:2] or [""])
