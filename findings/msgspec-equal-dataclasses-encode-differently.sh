#!/usr/bin/env bash
# msgspec 0.23.0: two equal instances of one standard dataclass are encoded differently, if one came from
# `msgspec.convert` or a decoder: a field that the input left out is not written again, though it has a default.
#
# A default that is immutable lives on the class. msgspec makes the instance without `__init__` and sets what the input
# had, so `__dict__` lacks the field: `==`, `repr` and `dataclasses.asdict` find it by attribute, but `vars()` and
# msgspec's own encoder and `to_builtins` go by `__dict__`. A `default_factory` field is set, and so written. So a file that
# is read and written again loses fields that the writer of the class would have put there, and a digest of the encoded
# object depends on where the object came from. A `msgspec.Struct` has no such difference; nor has a dataclass with slots.
#
# Seen (2026-12-01, Python 3.11):
#   equal: True
#   made:      {"a":1,"b":null,"c":[]}    vars: ['a', 'b', 'c']
#   converted: {"a":1,"c":[]}    vars: ['a', 'c']
#   asdict of the converted: {'a': 1, 'b': None, 'c': []}
#   with slots: {"a":1,"b":null}
#   Struct:     {"a":1,"b":null}
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet msgspec==0.23.0
cat > "$folder/encode.py" <<'PY'
import dataclasses

import msgspec


@dataclasses.dataclass
class Plain:
    a: int
    b: int | None = None
    c: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(slots=True)
class Slots:
    a: int
    b: int | None = None


class Struct(msgspec.Struct):
    a: int
    b: int | None = None


def encoded(value):
    return msgspec.json.encode(value).decode()


made, converted = Plain(1), msgspec.convert({"a": 1}, Plain)
print("equal:", made == converted)
print("made:     ", encoded(made), "   vars:", sorted(vars(made)))
print("converted:", encoded(converted), "   vars:", sorted(vars(converted)))
print("asdict of the converted:", dataclasses.asdict(converted))
print("with slots:", encoded(msgspec.convert({"a": 1}, Slots)))
print("Struct:    ", encoded(msgspec.convert({"a": 1}, Struct)))
assert made == converted and repr(made) == repr(converted)
assert encoded(made) == '{"a":1,"b":null,"c":[]}'
assert encoded(converted) == '{"a":1,"c":[]}' == encoded(msgspec.json.decode(b'{"a": 1}', type=Plain))
assert msgspec.to_builtins(converted) == {"a": 1, "c": []}
assert dataclasses.asdict(converted) == {"a": 1, "b": None, "c": []}
assert encoded(msgspec.convert({"a": 1}, Slots)) == encoded(msgspec.convert({"a": 1}, Struct)) == '{"a":1,"b":null}'
PY
"$folder/venv/bin/python" "$folder/encode.py"
echo "as described"
