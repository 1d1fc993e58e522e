"""Checks of the rows of `results/`: each has the fields of its topic, in their types."""

import datetime

from topics import BY_NAME

_TEXT, _NOTHING = str, type(None)
REQUIRED = {
    "date": _TEXT,
    "topic": _TEXT,
    "program": _TEXT,
    "backend": (_TEXT, _NOTHING),
    "commit": (_TEXT, _NOTHING),
    "machine": dict,
    "versions": (dict, _NOTHING),
    "command": (_TEXT, _NOTHING),
    "peer": list,
    "aim": list,
    "idle": (bool, _NOTHING),
}
MACHINE = {"cpu": (_TEXT, _NOTHING), "cores": (int, _NOTHING), "gpu": (_TEXT, _NOTHING)}
OPTIONAL = {"note": _TEXT}


def problems(row, file):
    """The errors in a row of a file, as a list of texts."""
    found = [f"`{name}` is missing or of the wrong type" for name, kind in REQUIRED.items() if not _is(row, name, kind)]
    found += [
        f"`{name}` is of the wrong type" for name, kind in OPTIONAL.items() if name in row and not _is(row, name, kind)
    ]
    if found:
        return found
    if row["topic"] not in BY_NAME or BY_NAME[row["topic"]].file != file:
        return [f"{row['topic']!r} is no topic of {file}.jsonl"]
    topic = BY_NAME[row["topic"]]
    try:
        datetime.date.fromisoformat(row["date"])
    except ValueError:
        found.append(f"{row['date']!r} is no date")
    if set(row["machine"]) != set(MACHINE) or not all(_is(row["machine"], *item) for item in MACHINE.items()):
        found.append("`machine` has `cpu`, `cores` and `gpu`")
    if row["versions"] is not None and not all(isinstance(value, str) for value in row["versions"].values()):
        found.append("`versions` are texts")
    own = topic.fields()
    known = own | set(REQUIRED) | set(OPTIONAL)
    found += [f"`{name}` is no field of {topic.name!r}" for name in row if name not in known]
    found += [f"`{name}` is missing" for name in own if name not in row]
    numbers = {column.field for column in topic.measured if column.form}
    for one in (row, *row["peer"]):
        found += [f"`{name}` is no number, nor a list of some" for name in numbers if not _is_number(one.get(name))]
    for peer in row["peer"]:
        if not _is(peer, "program", _TEXT) or not numbers & set(peer):
            found.append("a peer has a `program` and a number")
    for aim in row["aim"]:
        bounds = {"at_most", "at_least"} & set(aim)
        if len(bounds) != 1 or aim.get("field") not in numbers or set(aim) - bounds != {"field", "of"}:
            found.append("an aim has `field`, `of` and one of `at_most` and `at_least`")
    return found


def _is(row, name, kind):
    return name in row and isinstance(row[name], kind) and not (kind is int and isinstance(row[name], bool))


def _is_number(value):
    if isinstance(value, list):
        return all(_is_number(one) and one is not None for one in value)
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
