"""assets/results.md, and tables of other documents, made of assets/results/*.json."""

import re
import statistics

from workbench.settings import flag
from workbench.studies import records
from workbench.studies.action import Action
from workbench.studies.budget import released_table, small_table
from workbench.studies.cost import Cost
from workbench.studies.credit import Credit
from workbench.studies.critical import Critical
from workbench.studies.folders import Emoji, Letters, Mnist
from workbench.studies.gpu import gpu_table
from workbench.studies.gpu_time import epochs_table, time_table
from workbench.studies.gsim import Gsim
from workbench.studies.heads import Heads, MnistHeads
from workbench.studies.official import Official
from workbench.studies.records import command, read_result
from workbench.studies.schedule import Schedule
from workbench.studies.speed import Bench, Speed
from workbench.studies.story import Distil, Story
from workbench.studies.study import Study
from workbench.studies.temperature import Temperature
from workbench.studies.variance import Variance

DOCUMENTS = (records.ROOT / "README.md", records.ASSETS / "training.md")
STUDIES = {
    study.name: study
    for study in (
        *(Story(), Distil(), Heads(), Gsim(), Variance(), Action(), Critical(), Credit()),
        *(Schedule(), Temperature(), Cost(), Speed(), Bench(), Official()),
        *(Mnist(), MnistHeads(), Emoji(), Letters()),
    )
}
DECIMALS = {  # of the figures in a table
    **dict.fromkeys(("best_batch", "transformer", "head", "graph_mb", "seconds", "updates"), 0),
    **dict.fromkeys(("steps", "ms", "image_ms", "train_minutes", "tokens"), 1),
    **dict.fromkeys(("frechet", "nearest", "drift", "best_ms", "faster"), 2),
    **dict.fromkeys(("correlation", "critical", "first", "random", "best"), 2),
    **dict.fromkeys(("held_out_critical", "frac_not_prefix"), 2),
    **dict.fromkeys(("accuracy", "precision", "recall", "diversity", "kl", "image_kl"), 3),
    **dict.fromkeys(("quality", "gained", "held_out", "reward"), 3),
    **dict.fromkeys(("margin", "margin_error", "total"), 4),
    "vector": None,  # text
}
TITLES = {  # of columns that are not called as the figure
    "frechet": "Fréchet distance",
    "accuracy": "class accuracy",
    "drift": "times the distance at the start",
    "held_out": "held-out reward",
    "steps": "iterations",
    "image_ms": "ms per image",
    "best_ms": "ms in the best batch",
    "best_batch": "batch",
    "transformer": "transformer, %",
    "head": "head, %",
    "faster": "times as fast",
    "train_minutes": "minutes of training",
    "kl": "KL",
    "image_kl": "KL of the image",
    "frac_not_prefix": "not simply the first",
    "graph_mb": "graph, MB",
    "seconds": "seconds of RL",
    "vector": "counts",
    "margin_error": "its error",
    "total": "variance, all steps",
    "held_out_critical": "critical, held-out reward",
}
HEADER = """# Results

Made by `python -m workbench.studies` from `assets/results/*.json`; do not edit. The command under a
title measures that study again. Figures are medians, with the range in brackets if there is more
than one seed; data, judge, weights and noise all differ between seeds.

*Fréchet distance*: FID's formula on the features of a classifier that nothing trains on, so that
only numbers of this page compare; *precision* and *recall* by 3 nearest neighbours; *diversity*
within classes and *nearest*, the distance to the nearest training image: 1 is as real held-out
images. *Quality*: by the reward network, which RL climbs; *reward*: quality × speed^0.3; *held-out
reward*: the exact fit to a shape of the class, on which nothing trains. *ms per image*: in batches
of 32.
"""


def median(runs: dict, key: str) -> float:
    """The median of a figure over {seed: figures}; KeyError if there is none."""
    values = [figures[key] for figures in runs.values() if key in figures]
    if not values:
        raise KeyError(key)
    return statistics.median(values)


class Figures:
    """What a verdict may quote of rows {row name: {seed: figures}}, as text:

    {0[A][ms]}      the median, with the decimals of the table
    {0[A / B][ms]}  the ratio of the medians
    {0[A - B][ms]}  the mean of the paired differences over the seeds, ± its standard error
    {0[A < B][ms]}  on how many seeds it is lower in A than in B, as "2 of 3"; A > B: higher"""

    def __init__(self, rows: dict):
        self.rows = rows

    def __getitem__(self, name: str) -> "Quoted":
        left, sign, right = re.fullmatch(r"(.+?)(?: ([-/<>]) (.+))?", name).groups()
        return Quoted(self.rows[left], sign, self.rows[right] if sign else None)


class Quoted:
    """One row of Figures, or two that are compared."""

    def __init__(self, a: dict, sign: str | None, b: dict | None):
        self.a, self.sign, self.b = a, sign, b

    def __getitem__(self, key: str) -> str:
        if self.sign is None:
            return f"{median(self.a, key):.{DECIMALS[key]}f}"
        if self.sign == "/":
            return f"{median(self.a, key) / median(self.b, key):.1f}"
        seeds = self.a.keys() & self.b.keys()
        pairs = [(self.a[seed][key], self.b[seed][key]) for seed in seeds]
        if self.sign == "-":
            differences = [a - b for a, b in pairs]
            text = f"{statistics.mean(differences):+.{DECIMALS[key]}f}".replace("-", "−")
            if len(differences) > 1:
                error = statistics.stdev(differences) / len(differences) ** 0.5
                text += f" ± {error:.{DECIMALS[key]}f}"
            return text
        count = sum(a < b if self.sign == "<" else a > b for a, b in pairs)
        return f"{count} of {len(seeds)}"


def sentences(verdict: tuple[str, ...], rows: dict) -> list[str]:
    """The sentences of a verdict, figures filled in; without those whose rows are not measured."""
    said = []
    for sentence in verdict:
        try:
            said.append(sentence.format(Figures(rows)))
        except KeyError:
            continue
    return said


def table(rows: dict, columns) -> str:
    """Markdown: median and range over the seeds of {row name: {seed: figures}}."""
    seeds = {name: [str(len(runs))] for name, runs in rows.items()}
    titles = ["seeds", *(TITLES.get(key, key) for key in columns)]
    if len({len(runs) for runs in rows.values()}) == 1:  # all rows have as many
        seeds, titles = dict.fromkeys(rows, []), titles[1:]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (1 + len(titles)) + "|"]
    for name, runs in rows.items():
        cells = [name, *seeds[name], *(cell(runs, key) for key in columns)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(runs: dict, key: str) -> str:
    values = [figures[key] for figures in runs.values() if key in figures]
    if not values:
        return ""
    decimals = DECIMALS[key]
    if decimals is None:
        return "; ".join(sorted(set(values)))
    low, middle, high = (
        f"{value:.{decimals}f}" for value in (min(values), statistics.median(values), max(values))
    )
    return middle if low == high else f"{middle} ({low}–{high})"


def as_option(name: str, value) -> str:
    """A setting as it is given on the command line."""
    if isinstance(value, bool):
        return flag(name) if value else flag(name).replace("--", "--no-", 1)
    return f"{flag(name)} {value:g}" if isinstance(value, float) else f"{flag(name)} {value}"


def section(study: Study, content: dict) -> str:
    """A study in results.md."""
    rows, settings = content["rows"], content["settings"]
    origin = [
        f"`{command(study.name, rows)}`",
        content["hardware"],
        f"torch {content['versions']['torch']}",
        f"commit {content['commit']}",
        f"{content['minutes']:.0f} minutes",
    ]
    different = ", ".join(f"`{as_option(name, value)}`" for name, value in settings.items())
    parts = [f"## {study.title}", study.question, " · ".join(origin)]
    parts += [f"Other than in the demo: {different}."] if different else []
    parts += [table(rows, study.columns), " ".join(sentences(study.verdict, rows)), study.note]
    if study.picture and (records.ASSETS / study.picture[0]).exists():
        file, caption = study.picture
        parts.append(f"![{study.title}]({file})\n\n*{caption[0].upper()}{caption[1:]}.*")
    return "\n\n".join(part for part in parts if part)


def results_markdown() -> str:
    """All of results.md."""
    contents = {name: read_result(name) for name in STUDIES}
    sections = [section(STUDIES[name], content) for name, content in contents.items() if content]
    return "\n\n".join([HEADER.strip(), *sections]) + "\n"


# In DOCUMENTS, what stands between <!-- NAME --> and <!-- /NAME --> is made here

README_ROWS = (
    *("real", "teacher", "one-step start", "student", "policy"),
    *(f"policy's generator, K = {K}" for K in (8, 6, 4)),
)
README_COLUMNS = ("frechet", "precision", "recall", "held_out", "reward", "steps", "image_ms")
README_VERDICTS = {  # study: what it says of a paper
    "story": (
        "- **MARVAL**: one step in place of 100 makes an image "
        "{0[teacher / student][image_ms]} times as fast. From teacher to student the distance "
        "changes by {0[student - teacher][frechet]}, recall by {0[student - teacher][recall]}, "
        "precision by {0[student - teacher][precision]}, the held-out reward by "
        "{0[student - teacher][held_out]}.",
        "- **RL on z**, both in 8 iterations and as cool: from student to policy quality changes "
        "by {0[policy's generator, K = 8 - student, K = 8, as cool][quality]}, the held-out reward "
        "by "
        "{0[policy's generator, K = 8 - student, K = 8, as cool][held_out]}, the distance by "
        "{0[policy's generator, K = 8 - student, K = 8, as cool][frechet]}, recall by "
        "{0[policy's generator, K = 8 - student, K = 8, as cool][recall]}.",
    ),
    "critical": (
        "- **MaskFocus**, six iterations, two of them optimised: the quality after RL on critical "
        "steps differs from that on all steps by {0[critical - all][quality]}, on random ones by "
        "{0[critical - random][quality]}, on the first two by {0[critical - first][quality]}: "
        "choosing the first two is as good.",
    ),
    "schedule": (
        "- **Speed-RL**: the learned schedule takes {0[learned][steps]} of 16 iterations for a "
        "reward that differs from that of the best fixed counts by "
        "{0[learned - vector][reward]}; what it sees after two iterations would allow "
        "{0[foreseen - vector][margin]}. From the student in 16 the distance changes by "
        "{0[learned - student][frechet]}, recall by {0[learned - student][recall]}.",
    ),
    "temperature": (
        "- **A third of the iterations**: five, by fixed counts and cooled, change the distance of "
        "16 uncooled ones by {0[1-2-2-3-8, annealed to 0.4 - K = 16][frechet]} and recall "
        "by {0[1-2-2-3-8, annealed to 0.4 - K = 16][recall]}.",
    ),
    "official": (
        "- **The official MAR code** (one run, random weights, size of `small`, batch 1): our "
        "teacher is {0[small, teacher][faster]} times as fast, the student "
        "{0[small, student][faster]}, with cache and a quarter of the iterations "
        "{0[small, student, fewer, cache][faster]}.",
    ),
}


def readme_results() -> str:
    """The README's table of results, and what came of each paper; without what is not measured."""
    parts, story = [], read_result("story")
    if story:
        shown = {name: story["rows"][name] for name in README_ROWS if name in story["rows"]}
        parts += [table(shown, README_COLUMNS), ""]
        parts += ["Paired differences over the seeds, ± their standard errors:", ""]
    for name, verdict in README_VERDICTS.items():
        content = read_result(name)
        parts += sentences(verdict, content["rows"]) if content else []
    return "\n".join(parts)


BLOCKS = {
    "results": readme_results,
    "budget of small": small_table,
    "budget of MAR": released_table,
    "time of updates": time_table,
    "epochs of MAR-B": epochs_table,
    "GPU": gpu_table,
}


def with_tables(text: str) -> str:
    """A document with those of the BLOCKS that it marks as they now are."""
    for name, make in BLOCKS.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if begin in text:
            before, rest = text.split(begin)
            _, after = rest.split(end)
            text = f"{before}{begin}{make()}\n{end}{after}"
    return text


def render() -> None:
    """Write all documents."""
    (records.ASSETS / "results.md").write_text(results_markdown())
    for path in DOCUMENTS:
        path.write_text(with_tables(path.read_text()))
    print(f"{records.ASSETS / 'results.md'}, and the tables of {', '.join(map(str, DOCUMENTS))}")
