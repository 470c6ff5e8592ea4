"""Two folders of images that nobody drew for us, as train_rl.py takes them: 64 x 64 pixels.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python -m workbench.studies.make_folders emoji runs/folders/emoji emoji-datasource-*-16.0.0.tgz
    python -m workbench.studies.make_folders letters runs/folders/letters /usr/share/fonts
    python -m workbench.studies emoji         # teacher, student and policy of the first, judged

Emoji are Google's Noto Emoji (Apache 2.0) and Twitter's Twemoji (CC-BY 4.0), in five classes made
of Unicode's own categories. Letters are those of every font below a folder; ours were the 1,582
that differ in Debian 12's packages fonts-* of at most 3 MB. They need `pip install fonttools`."""

import hashlib
import json
import sys
import tarfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

LETTERS = "ABEGKMRS"
SIZE = 64
SUBCATEGORIES = {
    "people": ("person", "person-role", "person-gesture"),
    "animals": ("animal-mammal", "animal-bird", "cat-face", "monkey-face"),
}


def emoji_class(entry: dict) -> str | None:
    """The class of an entry of emoji.json; None for one that is left out."""
    kind = entry["subcategory"]
    if kind.startswith("face-"):
        return "faces"
    if entry["category"] == "Flags" and kind != "flag":
        return "flags"
    if kind.startswith("hand") and kind != "hand-prop":
        return "hands"
    return next((name for name, kinds in SUBCATEGORIES.items() if kind in kinds), None)


def make_emoji(folder, *archives) -> None:
    """folder/<class>/<vendor>-<code>.png of npm's archives emoji-datasource-<vendor>."""
    for archive in archives:
        vendor = Path(archive).name.split("-")[2]
        with tarfile.open(archive) as tar:
            entries = json.load(tar.extractfile("package/emoji.json"))
            members = {member.name: member for member in tar.getmembers()}
            for entry in tqdm(entries, vendor):
                name = emoji_class(entry)
                skins = [skin["image"] for skin in entry.get("skin_variations", {}).values()]
                for image in [entry["image"], *skins]:
                    member = members.get(f"package/img/{vendor}/{SIZE}/{image}")
                    if name and member:
                        path = Path(folder, name, f"{vendor}-{image}")
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_bytes(tar.extractfile(member).read())


def draw_letters(file) -> list[Image.Image] | None:
    """LETTERS in one font, each in the middle of a square; None if it does not have them all."""
    from fontTools.ttLib import TTFont

    characters = TTFont(file, lazy=True).getBestCmap() or {}
    if any(ord(letter) not in characters for letter in LETTERS):
        return None
    font, images = ImageFont.truetype(str(file), 96), []
    for letter in LETTERS:
        left, top, right, bottom = font.getbbox(letter)
        width, height = right - left, bottom - top
        if min(width, height) < 8:
            return None
        image = Image.new("L", (max(width, height) + 24,) * 2, "white")
        corner = (image.width - width) / 2 - left, (image.height - height) / 2 - top
        ImageDraw.Draw(image).text(corner, letter, fill="black", font=font)
        images.append(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    differ = len({image.tobytes() for image in images}) == len(LETTERS)
    return images if differ else None  # else boxes, or signs in place of letters


def make_letters(folder, fonts) -> None:
    """folder/<letter>/<font>-<digest>.png of every font below `fonts`, equal ones once."""
    files = [p for p in sorted(Path(fonts).rglob("*")) if p.suffix.lower() in (".ttf", ".otf")]
    seen = set()
    for file in tqdm(files, "fonts"):
        try:
            images = draw_letters(file)
        except Exception as error:  # fonts are broken in many ways
            print(f"left out: {file}: {error}", file=sys.stderr)
            continue
        digest = hashlib.md5(b"".join(image.tobytes() for image in images or [])).hexdigest()
        if images is None or digest in seen:
            continue
        seen.add(digest)
        for letter, image in zip(LETTERS, images):
            path = Path(folder, letter, f"{file.stem}-{digest[:6]}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    print(f"{len(seen)} fonts")


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    {"emoji": make_emoji, "letters": make_letters}[command](*rest)
