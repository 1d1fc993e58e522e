"""Damage to checkpoints, drawn at random.

A folder is a dict from file names to bytes, which a function changes. It returns `(clues, tensor)`: texts of which an
error must hold one, names of files or, where a file or a tensor is gone, words; and the name of the tensor that the
error must hold too, or None where the damage is not inside one tensor.
"""

import json
import math

INDEX, CONFIG = "model.safetensors.index.json", "config.json"
JSON_FILES = (CONFIG, INDEX, "model.weights.json")
# What no field of a checkpoint's JSON may be.
ABSURD = (
    *(-1, 0, 1, 3, 2**31, 2**63, 10**30, 10**400, -(10**400), 0.5, 1e308, -0.0, float("nan"), float("inf")),
    *("", "0", "128", "sliding_attention", "../x", "\0", "\ud800", "x" * 10_000),
    *(None, True, False, [], {}, [[]], [None], [-1, 2**70], {"a": {}}, [[[[1]]]], ["sliding_attention"] * 1000),
)
# As text, since Python's own JSON writes none of it.
GARBAGE = (
    *(b"", b" ", b"null", b"[]", b"3", b'"text"', b"{", b"}", b'{"a":1,}', b"\xff\xfe\xfd", b"\0" * 64, b"NaN"),
    *(b"[" * 100_000, b'{"a":' * 100_000, b'{"a":' + b"9" * 100_000 + b"}", b'{"model_type": "t5gemma"}'),
    *(b'{"model_type": ' + b"[" * 5000 + b"]" * 5000 + b"}", b'\xef\xbb\xbf{"model_type": "t5gemma"}', b"{}"),
)

# Beside the weights in every folder; but for the one that is missing, and a pipe, a symbolic link may lead there.
STRANGE_FILES = tuple(f"{kind}.safetensors" for kind in ("missing", "loop", "text", "device", "folder", "pipe"))


def weight_files(folder):
    return sorted(name for name in folder if name.endswith((".safetensors", ".h5")))


def pick(generator, options):
    return options[int(generator.integers(len(options)))]


def split(data):
    """The header of a safetensors file, parsed, and its data."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def join(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _edit_header(folder, generator, edit):
    """Lets `edit(header, names)` change a header; it returns the tensor's name, or None."""
    file = pick(generator, weight_files(folder))
    header, data = split(folder[file])
    tensor = edit(header, [name for name in header if name != "__metadata__"])
    folder[file] = join(header, data)
    return [file], tensor


def flip_data(folder, generator):
    """One bit of one tensor."""
    file = pick(generator, weight_files(folder))
    header, data = split(folder[file])
    at, flipped = int(generator.integers(len(data))), bytearray(folder[file])
    flipped[len(flipped) - len(data) + at] ^= 1 << int(generator.integers(8))
    folder[file] = bytes(flipped)
    ranges = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return [file], next(name for name, (begin, end) in ranges.items() if begin <= at < end)


def blank_data(folder, generator):
    """A tensor's data become zeros, as after a crash that left a hole."""
    file = pick(generator, weight_files(folder))
    header, data = split(folder[file])
    name = pick(generator, [name for name in header if name != "__metadata__"])
    begin, end = header[name]["data_offsets"]
    folder[file] = join(header, data[:begin] + bytes(end - begin) + data[end:])
    return [file], name


def swap_data(folder, generator):
    """Two tensors of one size change places, in the data or by their offsets."""
    file = pick(generator, weight_files(folder))
    header, data = split(folder[file])
    sizes = {}
    for name, entry in header.items():
        if name != "__metadata__":
            sizes.setdefault(entry["data_offsets"][1] - entry["data_offsets"][0], []).append(name)
    alike = [names for names in sizes.values() if len(names) > 1]
    if alike:
        one, other = generator.permutation(pick(generator, alike))[:2]
        header[one]["data_offsets"], header[other]["data_offsets"] = (
            header[other]["data_offsets"],
            header[one]["data_offsets"],
        )
    folder[file] = join(header, data)
    return [file], None


def flip_header(folder, generator):
    """One bit of the header or of its length."""
    file = pick(generator, weight_files(folder))
    flipped = bytearray(folder[file])
    flipped[int(generator.integers(len(flipped) - len(split(folder[file])[1])))] ^= 1 << int(generator.integers(8))
    folder[file] = bytes(flipped)
    return [file], None


def change_header_length(folder, generator):
    file = pick(generator, weight_files(folder))
    length = int.from_bytes(folder[file][:8], "little")
    lengths = (0, 1, length - 1, length + 1, length - 8, length + 8, 2**20, 99_999_999, 2**31, 2**63, 2**64 - 1)
    folder[file] = pick(generator, lengths).to_bytes(8, "little") + folder[file][8:]
    return [file], None


def replace_header(folder, generator):
    file = pick(generator, weight_files(folder))
    folder[file] = join(pick(generator, GARBAGE), split(folder[file])[1])
    return [file], None


def truncate(folder, generator):
    file = pick(generator, weight_files(folder))
    folder[file] = folder[file][: int(generator.integers(len(folder[file])))]
    return [file], None


def empty(folder, generator):
    file = pick(generator, weight_files(folder))
    folder[file] = pick(
        generator, (b"", b"\0" * len(folder[file]), folder[file][:8], (2).to_bytes(8, "little") + b"{}")
    )
    # An empty header is that of a whole file without tensors, which the folder then has not enough of.
    return [file, "only 0 tensors"], None


def extend(folder, generator):
    file = pick(generator, weight_files(folder))
    folder[file] += generator.bytes(int(generator.integers(1, 5000)))
    return [file], None


def remove_file(folder, generator):
    file = pick(generator, weight_files(folder))
    del folder[file]
    return [file, "holds neither"], None


def swap_shards(folder, generator):
    one, other = generator.permutation(weight_files(folder))[:2]
    folder[one], folder[other] = folder[other], folder[one]
    return [one, other], None


def copy_shard(folder, generator):
    one, other = generator.permutation(weight_files(folder))[:2]
    folder[one] = folder[other]
    return [one, other], None


def change_shape(folder, generator):
    def edit(header, names):
        name = pick(generator, names)
        shape = header[name]["shape"]
        new = (
            shape[::-1],
            [math.prod(shape)],
            [*shape, 1],
            shape[:-1],
            [size + 1 for size in shape],
            [-size for size in shape],
            [float(size) for size in shape],
            [2**62, 4, *shape],
            [0, *shape],
            pick(generator, ABSURD),
            [pick(generator, ABSURD), *shape[1:]],
        )
        header[name]["shape"] = pick(generator, new)

    return _edit_header(folder, generator, edit)


def change_dtype(folder, generator):
    def edit(header, names):
        dtypes = (
            "F64",
            "F32",
            "F16",
            "BF16",
            "I32",
            "U8",
            "F8_E4M3",
            "BOOL",
            "f32",
            "float32",
            pick(generator, ABSURD),
        )
        header[pick(generator, names)]["dtype"] = pick(generator, dtypes)

    return _edit_header(folder, generator, edit)


def change_offsets(folder, generator):
    def edit(header, names):
        entry = header[pick(generator, names)]
        begin, end = entry["data_offsets"]
        step = int(generator.integers(1, 64))
        new = (
            [begin + step, end + step],
            [begin - step, end - step],
            [begin, end + step],
            [begin, end - step],
            [end, begin],
            [begin, begin],
            [0, end - begin],
            [begin + 2**63, end + 2**63],
            [float(begin), float(end)],
            [begin, end, end],
            [begin],
            pick(generator, ABSURD),
            [pick(generator, ABSURD), end],
        )
        entry["data_offsets"] = pick(generator, new)

    return _edit_header(folder, generator, edit)


def change_entry(folder, generator):
    """An entry dropped, renamed, replaced, without one of its fields."""

    def edit(header, names):
        name, how = pick(generator, names), int(generator.integers(4))
        if how == 0:
            del header[name]
        elif how == 1:
            header[pick(generator, (name + "x", "", "__metadata__", "lm_head.weight", "\ud800", name.upper()))] = (
                header.pop(name)
            )
        elif how == 2:
            header[name] = pick(generator, ABSURD)
        else:
            del header[name][pick(generator, list(header[name]))]

    return _edit_header(folder, generator, edit)


def duplicate_entry(folder, generator):
    """A header in which a name comes twice, of which most parsers keep one in silence."""
    file = pick(generator, weight_files(folder))
    header, data = split(folder[file])
    name = pick(generator, list(header))
    twice = json.dumps({name: header[name]})[1:-1]
    folder[file] = join(json.dumps(header)[:-1].encode() + b"," + twice.encode() + b"}", data)
    return [file], None


def change_metadata(folder, generator):
    def edit(header, names):
        metadata = header["__metadata__"]
        if "xxh3_64" in metadata and generator.integers(2):
            checksums = json.loads(metadata["xxh3_64"])
            name = pick(generator, names)
            changed = (checksums[name][::-1] + "0", "0" * 16, pick(generator, ABSURD))
            metadata["xxh3_64"] = json.dumps(
                pick(
                    generator,
                    (
                        {**checksums, name: pick(generator, changed)},
                        {other: value for other, value in checksums.items() if other != name},
                        {**checksums, "other": "0" * 16},
                        pick(generator, ABSURD),
                    ),
                )
            )
        elif generator.integers(2):
            metadata["xxh3_64"] = pick(generator, ABSURD)
        else:
            header["__metadata__"] = pick(generator, ABSURD)

    return _edit_header(folder, generator, edit)


def change_index(folder, generator):
    """An entry of the index dropped, renamed, or pointing to another shard or out of the folder."""
    index = json.loads(folder[INDEX])
    names = index["weight_map"]
    name, files = pick(generator, list(names)), weight_files(folder)
    how = int(generator.integers(4))
    if how == 0:
        del names[name]
    elif how == 1:
        names[pick(generator, (name + "x", "", "lm_head.weight", "\ud800"))] = names.pop(name)
    elif how == 2:
        names[name] = pick(
            generator,
            (
                *files,
                f"../{names[name]}",
                f"/tmp/{names[name]}",
                f"./{names[name]}",
                "..",
                "C:model.safetensors",
                "\ud800.safetensors",
                "\0.safetensors",
                "x" * 5000 + ".safetensors",
                *STRANGE_FILES,
                pick(generator, ABSURD),
            ),
        )
    else:
        index["weight_map"] = pick(generator, ABSURD)
    folder[INDEX] = json.dumps(index).encode()
    return [INDEX, *files, *STRANGE_FILES, "missing"], None


def duplicate_in_index(folder, generator):
    index = json.loads(folder[INDEX])
    name = pick(generator, list(index["weight_map"]))
    twice = f'"weight_map": {{"{name}": "{pick(generator, weight_files(folder))}", '
    folder[INDEX] = json.dumps(index).replace('"weight_map": {', twice).encode()
    return [INDEX], None


def replace_json(folder, generator):
    """A JSON file cut short, with a flipped bit, replaced by garbage or gone."""
    file = pick(generator, [name for name in JSON_FILES if name in folder])
    how = int(generator.integers(4))
    if how == 0:
        folder[file] = folder[file][: int(generator.integers(len(folder[file])))]
    elif how == 1:
        flipped = bytearray(folder[file])
        flipped[int(generator.integers(len(flipped)))] ^= 1 << int(generator.integers(8))
        folder[file] = bytes(flipped)
    elif how == 2:
        folder[file] = pick(generator, GARBAGE)
    else:
        del folder[file]
    # A flipped bit in an index may show in the shard that it does not fit, or name one that is not there.
    return [file, "holds neither", "missing", "cannot be read", *(weight_files(folder) if file != CONFIG else [])], None


def change_config(folder, generator):
    """One field, of any depth, absurd or gone."""
    config = json.loads(folder[CONFIG])
    values, name = pick(generator, list(_fields(config)))
    if generator.integers(4):
        values[name] = pick(generator, ABSURD)
    else:
        del values[name]
    folder[CONFIG] = json.dumps(config).encode()
    # Sizes that are possible but not these tensors' are found in the weights.
    return [CONFIG, *weight_files(folder), "missing", "by its config"], None


def _fields(values):
    for name, value in values.items():
        yield values, name
        if isinstance(value, dict):
            yield from _fields(value)
