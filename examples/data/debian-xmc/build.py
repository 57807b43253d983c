"""Rebuild this folder from a Debian machine's own package lists. Standard library only.

    apt-get -o Acquire::Languages=en update      # Packages and Translation-en of bookworm
    python examples/data/debian-xmc/build.py --lists /var/lib/apt/lists --out rebuilt

A point is a binary package: its text is `name: short description. long description`, its labels
are the packages named in Depends, Recommends or Suggests (every alternative; versions left out).
Sources go to the test part by a hash of their name, so binaries of one source never straddle the
split. The text itself is not written: only counts of hashed words are.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import hashlib
import io
import re
import subprocess
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

TOKEN = re.compile(r"[a-z0-9+#]+")
PACKAGE = re.compile(r"^\s*([a-z0-9][a-z0-9+.\-]*)", re.IGNORECASE)
FEATURES = 1 << 16
MIN_TRAIN_COUNT = 2
TEST_PERMILLE = 200


class Package(NamedTuple):
    """One binary package of the index."""

    name: str
    source: str
    text: str
    labels: frozenset[str]


def main() -> None:
    """Read the two index files and write the parts, label names, source groups and provenance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lists", type=Path, default=Path("/var/lib/apt/lists"), metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args()
    names = ("binary-amd64_Packages", "i18n_Translation-en")
    paths = [the_list(options.lists, f"*_dists_bookworm_main_{name}*") for name in names]
    index, translation = (index_text(path) for path in paths)
    packages = read_packages(index, translation)
    options.out.mkdir(parents=True, exist_ok=True)
    write_parts(packages, options.out)
    release = the_list(options.lists, "*_dists_bookworm_InRelease").read_text("utf-8", "replace")
    fields = re.compile(r"^(?:Origin|Suite|Version|Codename|Date|Description):.*$", re.MULTILINE)
    lines = [
        f"bookworm main {name.replace('_', ' ')}  sha256 of the uncompressed text "
        f"{hashlib.sha256(text.encode()).hexdigest()}"
        for name, text in zip(names, (index, translation))
    ]
    write_text(options.out / "PROVENANCE.txt", lines + fields.findall(release))


def the_list(folder: Path, pattern: str) -> Path:
    """The one index file that matches, security updates apart."""
    found = sorted(path for path in folder.glob(pattern) if "security" not in path.name)
    if len(found) != 1:
        sys.exit(f"{folder}: one file named {pattern} is needed, found {len(found)}. See --help.")
    return found[0]


def index_text(path: Path) -> str:
    """The index as text, whatever way apt keeps it compressed."""
    command = ["/usr/lib/apt/apt-helper", "cat-file", str(path)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.decode("utf-8")


def stanzas(text: str) -> Iterator[dict[str, str]]:
    """The paragraphs of a Debian control file, as fields."""
    for block in text.split("\n\n"):
        fields: dict[str, str] = {}
        key = ""
        for line in block.split("\n"):
            if line[:1] in (" ", "\t"):
                if key:
                    fields[key] += "\n" + line
            elif ":" in line:
                key, value = line.split(":", 1)
                fields[key] = value.strip()
        if "Package" in fields:
            yield fields


def read_packages(index: str, translation: str) -> list[Package]:
    """Every package, ordered by source, then name; of a name listed twice the last is kept."""
    long = {s.get("Description-md5"): s.get("Description-en", "") for s in stanzas(translation)}
    packages = {}
    for fields in stanzas(index):
        description = long.get(fields.get("Description-md5"), fields["Description"])
        first, *rest = description.split("\n")
        body = " ".join("" if line.strip() == "." else line.strip() for line in rest)
        name = fields["Package"]
        short = " ".join(first.split()).rstrip(".")
        named = [fields.get(key, "") for key in ("Depends", "Recommends", "Suggests")]
        packages[name] = Package(
            name=name,
            source=fields.get("Source", name).split(" ")[0],
            text=" ".join(f"{name}: {short}. {body}".split()),
            labels=frozenset(dependencies(named)) - {name},
        )
    return sorted(packages.values(), key=lambda package: (package.source, package.name))


def dependencies(fields: Iterable[str]) -> Iterator[str]:
    """The package names in dependency fields, all alternatives, without versions."""
    for field in fields:
        for alternative in re.split(r"[,|]", field.replace("\n", " ")):
            if match := PACKAGE.match(alternative):
                yield match.group(1)


def is_test(source: str) -> bool:
    """Whether a source package's binaries are test points: a fifth are, by hash."""
    digest = hashlib.sha256(f"debian-xmc/1:{source}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 1000 < TEST_PERMILLE


def write_parts(packages: list[Package], out: Path) -> None:
    """Both parts and the label names; points left without a label are dropped."""
    parts = {
        "trn": [p for p in packages if not is_test(p.source)],
        "tst": [p for p in packages if is_test(p.source)],
    }
    count = collections.Counter(label for p in parts["trn"] for label in p.labels)
    kept = [label for label in count if count[label] >= MIN_TRAIN_COUNT]
    labels = sorted(kept, key=lambda label: (-count[label], label))
    number = {label: i for i, label in enumerate(labels)}
    write_gz(out / "labels.txt.gz", labels)
    for part, members in parts.items():
        points = [p for p in members if not number.keys().isdisjoint(p.labels)]
        rows = (xmlrepo_row(p, number) for p in points)
        header = f"{len(points)} {FEATURES} {len(labels)}"
        write_gz(out / f"{part}_xmlrepo.txt.gz", [header, *rows])
        sources = {source: i for i, source in enumerate(dict.fromkeys(p.source for p in points))}
        write_gz(out / f"{part}_groups.txt.gz", (str(sources[p.source]) for p in points))


def xmlrepo_row(package: Package, number: dict[str, int]) -> str:
    """`l1,l2 f:count f:count`, both ascending."""
    labels = sorted(number[label] for label in package.labels if label in number)
    words = TOKEN.findall(package.text.lower())
    counts = collections.Counter(zlib.crc32(word.encode()) % FEATURES for word in words)
    features = " ".join(f"{feature}:{counts[feature]}" for feature in sorted(counts))
    return f"{','.join(map(str, labels))} {features}"


def write_gz(path: Path, lines: Iterable[str]) -> None:
    """Compressed lines; no name and no time inside, so that the same lines give the same bytes."""
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as text,
    ):
        text.writelines(line + "\n" for line in lines)


def write_text(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
