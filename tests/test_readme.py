"""Every reference of the README to a line of code is right. `python tests/test_readme.py` renews the line numbers."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[`([\w.]+)`\]\(([\w/]+\.py)#L(\d+)\)")


def line_of(name, file):
    """Number of the line that defines `name` (a function, class or constant; Class.method) in `file`."""
    lines, start = (ROOT / file).read_text().splitlines(), 0
    for part in name.split("."):
        start = next(i for i in range(start, len(lines)) if re.match(rf"\s*((def|class) {part}\b|{part} =)", lines[i])) + 1
    return start


def test_every_link_points_to_what_it_names():
    links = LINK.findall((ROOT / "README.md").read_text())
    assert len(links) > 20
    wrong = [f"{name}: {file}#L{n}, is at {line_of(name, file)}" for name, file, n in links if line_of(name, file) != int(n)]
    assert not wrong, f"{wrong}\npython tests/test_readme.py renews them"


def test_every_file_and_option_that_the_readme_names_exists():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\(((?:assets|tests)/[\w./]+|[\w]+\.(?:py|ipynb))\)", text):
        assert (ROOT / path).exists(), path
    known = (ROOT / "maskrl.py").read_text() + "".join((ROOT / f).read_text() for f in ("train_rl.py", "train_distill.py", "sample.py", "tests/study.py"))
    ours = "\n".join(line for line in text.splitlines() if "jupyter" not in line)
    for option in set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", ours)):
        name = option.removeprefix("no-").replace("-", "_")
        assert f"    {name}: " in known or f'"--{option}"' in known or option == "help", f"--{option}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(LINK.sub(lambda m: f"[`{m[1]}`]({m[2]}#L{line_of(m[1], m[2])})", readme.read_text()))
