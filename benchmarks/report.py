"""Writes README.md's tables from the newest row per configuration of `results/*.jsonl`, and its list of `log/`.

    python benchmarks/report.py             # rewrites the part between the markers
    python benchmarks/report.py --check     # exits with 1 if README.md is outdated

Needs only the standard library.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from topics import TOPICS

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"
RESULTS = FOLDER / "results"
START, END = "<!-- tables: python benchmarks/report.py -->\n", "<!-- end of tables -->\n"


def rows(file):
    """All rows of a file, in its order."""
    return [json.loads(line) for line in (RESULTS / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()]


def newest(topic):
    """`[(row, newer row or None)]` for each configuration: see README.md. Of rows with one date the last is newest."""
    groups = {}
    for row in sorted(rows(topic.file), key=lambda row: row["date"]):
        if row["topic"] == topic.name and (row["program"] == "keras-t5gemma" or topic.shows("program")):
            groups.setdefault(topic.key(row), []).append(row)
    found = []
    for key in sorted(groups) if topic.is_sorted else groups:
        last = groups[key][-1]
        shown = next((row for row in reversed(groups[key]) if has_peers(topic, row)), last)
        found.append((shown, last if shown is not last else None))
    return found


def has_peers(topic, row):
    """Whether all that the row's aims compare with was measured."""
    return all(aim["of"] is None or peers_numbers(topic, row, aim) for aim in row["aim"])


def peers_numbers(topic, row, aim):
    """The numbers that an aim compares with."""
    column = next(column for column in topic.measured if column.field == aim["field"])
    if aim["of"] == "best peer":
        peers = [peer for peer in row["peer"] if peer["program"] != "floor"]
    else:
        peers = [peer for peer in row["peer"] if peer["program"] == aim["of"]]
    return [number for peer in peers if (number := column.number(peer))]


def peer_text(topic, row):
    """The peers' numbers, each with its unit."""
    texts = []
    for peer in row["peer"]:
        more = [str(peer[name]) for name in ("backend", "dtype") if name in peer and peer[name] != row.get(name)]
        name = peer["program"] + (f" ({', '.join(more)})" if more else "")
        texts.append(f"{name} {numbers_text(topic, peer)}")
    return "; ".join(texts)


def numbers_text(topic, row):
    """All numbers of a row or peer, with units."""
    known = [column for column in topic.measured if column.form and row.get(column.field) is not None]
    return ", ".join(column.text_with_unit(row) for column in known)


def when(topic, row, newer, notes):
    """The date of a row, its notes' numbers, and the newer numbers that were measured without its peers."""
    text = row["date"] + (", busy" if row["idle"] is False else "")
    text += f" ({notes.index(row['note']) + 1})" if "note" in row else ""
    return (
        text
        if newer is None
        else f"{text}; newer, alone: {numbers_text(topic, newer)}, {when(topic, newer, None, notes)}"
    )


def aim_text(topic, row):
    """Each aim, and whether it is met."""
    return "; ".join(_one_aim(topic, row, aim) for aim in row["aim"])


def _one_aim(topic, row, aim):
    column = next(column for column in topic.measured if column.field == aim["field"])
    value = column.number(row)
    if aim["of"] is not None:
        others = peers_numbers(topic, row, aim)
        if value is None or not others:
            return f"{column.heading}: {aim['of']} not measured beside it"
        value /= min(others)
        text = f"{value:.2f} of {aim['of']}"
    else:
        text = column.text(row) if value is not None else "not measured"
    bound, word = (aim["at_most"], "at most") if "at_most" in aim else (aim["at_least"], "at least")
    if value is None:
        return f"{column.heading}: {text}"
    # Rounded as it is shown, so that a reader finds the verdict in the numbers.
    shown = round(value, 2) if aim["of"] else value
    met = shown <= bound if "at_most" in aim else shown >= bound
    return f"{column.heading}: {text}, {word} {bound:,g}: {'met' if met else '**missed**'}"


def machine_text(machine):
    """E.g. "2 cores, AMD EPYC (Zen 4)"."""
    cores = f"{machine['cores']} cores" if machine["cores"] else None
    return ", ".join(filter(None, (machine["gpu"], cores, machine["cpu"]))) or "unknown"


def table(topic):
    """A topic's heading and table."""
    with_newer = newest(topic)
    found = [row for row, _ in with_newer]
    columns = [c for c in (*topic.configuration, *topic.measured) if any(c.text(row) for row in found)]
    headings = [column.heading for column in columns]
    cells = [[column.text(row) for column in columns] for row in found]
    right = [column.form != "" for column in columns]
    for heading, text in (("beside", peer_text), ("aim", aim_text)):
        if any(text(topic, row) for row in found):
            headings.append(heading)
            right.append(False)
            for line, row in zip(cells, found, strict=True):
                line.append(text(topic, row))
    machines = dict.fromkeys(machine_text(row["machine"]) for row in found)
    if len(machines) > 1:
        headings.append("machine")
        right.append(False)
        for line, row in zip(cells, found, strict=True):
            line.append(machine_text(row["machine"]))
    headings.append("measured")
    right.append(False)
    notes = list(dict.fromkeys(row["note"] for pair in with_newer for row in pair if row and "note" in row))
    for line, (row, newer) in zip(cells, with_newer, strict=True):
        line.append(when(topic, row, newer, notes))
    about = [f"{topic.about} " if topic.about else ""]
    about += [f"Machine: {next(iter(machines))}."] if len(machines) == 1 else []
    lines = [f"### {topic.name}", "", "".join(about).strip(), ""]
    lines += [_line(headings), _line("---:" if one else "---" for one in right), *map(_line, cells)]
    if notes:
        lines += ["", "; ".join(f"({i}) {note}" for i, note in enumerate(notes, 1)) + "."]
    return "\n".join(lines) + "\n"


def _line(cells):
    return "| " + " | ".join(cells) + " |"


def log():
    """A line per experiment, the newest day first."""
    lines = ["## Experiments", ""]
    for path in sorted(
        (FOLDER / "log").glob("*.md"), key=lambda path: (-int(path.name[:10].replace("-", "")), path.name)
    ):
        title = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        lines.append(f"- [{title}](log/{path.name})")
    return "\n".join(lines) + "\n"


def report():
    """README.md as it should be."""
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return before + START + "\n" + "\n".join([*map(table, TOPICS), log()]) + "\n" + END + after


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Write nothing; exit with 1 if README.md is outdated.")
    arguments = parser.parse_args()
    text = report()
    if not arguments.check:
        README.write_text(text, encoding="utf-8")
    elif text != README.read_text(encoding="utf-8"):
        sys.exit("benchmarks/README.md is stale: run `python benchmarks/report.py`.")


if __name__ == "__main__":
    main()
