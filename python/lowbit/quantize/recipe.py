"""The recipe: what every module of a model becomes.

A recipe holds the defaults for the linear layers of the blocks, the width of the head and of the embedding,
and ordered rules that override them by module name. A rule is a regular expression matched from the start of
the full module name (`re.match`); the first rule that matches decides. The rules of GPTQModel's `dynamic` are
valid here: a `+:` prefix (or none) overrides, `-:` leaves the module alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

TRIT_BITS = 1.6  # five trits in a byte
BITS = (TRIT_BITS, 2, 3, 4, 8, 16)
TIED_BITS = 8  # of a table that is head and embedding, unless asked otherwise: what 4 bits cost it shows
KINDS = ("linear", "head", "embedding", "other")
METHODS = ("gptq", "rtn", "exact")
ORDERS = ("none", "act", "gar")
GRIDS = ("updated", "static")
CORRECTIONS = ("none", "least_squares")
SCALE_DTYPES = ("float16", "bfloat16", "float32")
ACTIVATIONS = ("float", "int8")

# GPTQModel's, AutoGPTQ's and AWQ's spellings of our fields; `desc_act` needs its value translated as well.
_SYNONYMS = {
    "sym": "symmetric",
    "w_bit": "bits",
    "wbits": "bits",
    "q_group_size": "group_size",
    "damp_percent": "damp",
    "dynamic": "rules",
}


@dataclass(frozen=True)
class ModuleSpec:
    """How one module is quantized: the recipe's defaults with the matching rule applied.

    `correction` is None where it is made if calibration allows it, without a reason being owed if not. `rule` is the
    pattern that decided, or None when the defaults did.
    """

    bits: int | float
    group_size: int
    per_tensor: bool
    symmetric: bool
    scale_dtype: str
    order: str
    grids: str
    clip: bool
    damp: float
    correction: str | None
    activations: str
    method: str
    rule: str | None = None

    @property
    def format(self) -> str:
        return "trit" if self.bits == TRIT_BITS else f"int{self.bits}"

    def group_size_for(self, cols: int) -> int:
        """The group size for a matrix of `cols` columns: one group a row when groups would be as wide as the
        row.

        A group size that does not divide `cols` stays: the last group of each row is then the shorter one.
        """
        return cols if self.group_size == -1 or self.group_size >= cols else self.group_size


_SPEC_FIELDS = tuple(f.name for f in fields(ModuleSpec) if f.name != "rule")


@dataclass
class Recipe:
    """The choices of a quantization run. All fields are checked when the recipe is made.

    bits           2, 3, 4, 8 or "trit" (ternary, 1.6 bits) for the linear layers inside the blocks; 16 leaves them as
                   they are
    group_size     columns that share a scale: a multiple of 16, or -1 for one scale a row. A group wider than
                   a row becomes the row; one that does not divide the row leaves a shorter last group
    per_tensor     one scale for a whole ternary matrix, mean|w| in float32, as ternary models are trained; method "rtn"
    symmetric      zero point 2^(bits-1) everywhere; False stores a zero point for every group
    scale_dtype    "float16", "bfloat16" or "float32"
    order          column order of the solver: "none", "act" (by decreasing diagonal of the Hessian) or "gar"
                   (the same inside groups and among groups). Only "act" with updated grids has to store a
                   permutation
    grids          where a group's grid comes from: "updated" (its weights with every correction so far) or
                   "static" (the original weights)
    clip           search the clipping of each group that minimises sum |error|^2.4. None: for widths up to 4 bits; at
                   8 bits it costs time and gains nothing. Ternary: search the scale; rounded to nearest, None is the
                   mean that ternary models are trained with
    damp           share of the Hessian's mean diagonal that is added to its diagonal, in (0, 1]
    correction     "none", or "least_squares": before a module is solved, its weights are moved to those that come
                   nearest to the original network's outputs on the inputs that the quantized one has. It takes 4096
                   tokens or more, and a second network to run: the original. None: for widths up to 4 bits, where
                   there are as many tokens
    head_bits, embed_bits    width of the output head and of the token embedding; 16 leaves them. A table that both
                   share stays one table: give both the same width, or one alone. None: 8 for a table that both
                   share, 16 for tables of their own (and for all where `bits` is 16 or the method "exact")
    tied_damp      `damp` of a table that both share, which is solved for the head's inputs: the more, the nearer its
                   rows stay to the embeddings that they were (docs/algorithms.md)
    embed_from_head    whether the token embedding of a model with two tables gives its own up for the head's; refused
                   where the KL divergence that this alone costs, measured on the calibration text, is above embed_bound
    rules          ordered {pattern: change}; a change is a width, "skip", "8:g64" (see `parse_change`) or a
                   dict of fields of this class. A list of pairs or of "pattern=change" strings is accepted
                   too
    activations    "float" or "int8": how the quantized layers represent their inputs
    method         "gptq", or "rtn" (round to nearest: needs no calibration); for ternary also "exact": packs what is
                   ternary already, its nonzero |w| all one number, and leaves everything else. Such a matrix is packed
                   exactly by the other methods too, so nothing is ternarized twice
    true_sequential    calibrate each stage of a block on inputs that went through the quantized stages before
                       it

    Modules outside the blocks other than the head and the token embedding are quantized only when a rule
    gives their bits. Raises ValueError or TypeError naming the field, what was expected and what was given.
    """

    bits: int | float | str = 4
    group_size: int = 128
    per_tensor: bool = False
    symmetric: bool = True
    scale_dtype: str = "float16"
    order: str = "gar"
    grids: str = "updated"
    clip: bool | None = None
    damp: float = 0.01
    correction: str | None = None
    head_bits: int | float | str | None = None
    embed_bits: int | float | str | None = None
    tied_damp: float = 0.3
    embed_from_head: bool = False
    embed_bound: float = 0.1
    rules: Any = field(default_factory=dict)
    activations: str = "float"
    method: str = "gptq"
    true_sequential: bool = True

    def __post_init__(self) -> None:
        for name in ("bits", "head_bits", "embed_bits"):
            setattr(self, name, _width(getattr(self, name)))
        for name in _SPEC_FIELDS:
            _check(name, name, getattr(self, name))
        for name in ("head_bits", "embed_bits"):
            if getattr(self, name) is not None:
                _check("bits", name, getattr(self, name))
        _check("damp", "tied_damp", self.tied_damp)
        for name in ("true_sequential", "embed_from_head"):
            _check_bool(name, getattr(self, name))
        if not isinstance(self.embed_bound, int | float) or not self.embed_bound >= 0:
            raise ValueError(f"embed_bound: expected a KL divergence of at least 0, got {self.embed_bound!r}")
        self.rules = _normalise_rules(self.rules)

    def for_module(self, name: str, kind: str = "linear", tied: bool = False) -> ModuleSpec | None:
        """The specification of one module, or None when it stays as it is.

        name: the full module name; kind: "linear" (inside a block), "head", "embedding" or "other"; tied: whether its
        weight is head and token embedding at once.
        """
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        both_open = tied and self.head_bits is None and self.embed_bits is None
        both_open &= self.bits != 16 and self.method != "exact"  # which is to lose nothing
        table_bits = TIED_BITS if both_open else 16
        defaults = {
            "linear": self.bits,
            "head": table_bits if self.head_bits is None else self.head_bits,
            "embedding": table_bits if self.embed_bits is None else self.embed_bits,
            "other": 16,
        }
        spec = ModuleSpec(**{n: getattr(self, n) for n in _SPEC_FIELDS})
        spec = replace(spec, bits=defaults[kind])
        pattern, change = self.rule_for(name)
        if change == "skip":
            return None
        if change is not None:
            # A rule that names no width means to change how a module is quantized, not whether it is.
            spec = replace(spec, **change, rule=pattern)
        spec = _resolved(spec, name)
        if spec.correction is None and spec.bits > 4:
            spec = replace(spec, correction="none")
        return spec if spec.bits != 16 else None

    def rule_for(self, name: str) -> tuple[str | None, dict[str, Any] | str | None]:
        """The first rule that matches a module name: (pattern, change), or (None, None)."""
        for pattern, change in self.rules.items():
            if re.match(rule_regex(pattern), name):
                return pattern, change
        return None, None

    @property
    def needs_calibration(self) -> bool:
        """Whether any module could be solved with a Hessian."""
        methods = {c.get("method", self.method) for c in self.rules.values() if c != "skip"}
        return self.embed_from_head or "gptq" in methods | {self.method}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON; `from_dict` gives an equal recipe back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """A recipe from a mapping, with GPTQModel's names of fields accepted beside ours (`sym`, `desc_act`,
        `damp_percent`, `dynamic`). An unknown field is a ValueError."""
        if not isinstance(values, Mapping):
            raise TypeError(f"recipe: expected a mapping, got {type(values).__name__}")
        return cls(**_rename("recipe", values, {f.name for f in fields(cls)}))


def parse_rule(text: str) -> tuple[str, dict[str, Any] | str]:
    """A rule written as on a command line: `PATTERN=CHANGE`, for example `embed_tokens=8`,
    `.*down_proj=8:g64`, `lm_head=skip`. Returns (regular expression, change).

    A pattern of plain dotted names stands for every module whose name holds those parts in a row, and for
    everything below it (`embed_tokens` means `model.embed_tokens`, `self_attn` its four projections); any
    other pattern is a regular expression matched from the start of the full name.
    """
    if not isinstance(text, str):
        raise TypeError(f"rule: expected text, got {type(text).__name__}")
    pattern, equals, change = text.rpartition("=")
    if not equals or not pattern.strip():
        raise ValueError(f"rule: expected PATTERN=CHANGE such as 'embed_tokens=8' or 'lm_head=skip', got {text!r}")
    pattern = pattern.strip()
    prefix = pattern[:2] if pattern[:2] in ("+:", "-:") else ""
    bare = pattern[len(prefix) :]
    if re.fullmatch(r"\w+(\.\w+)*", bare):
        bare = r"(?:.*\.)?" + bare.replace(".", r"\.") + r"(?:\..*)?$"
    pattern = prefix + bare
    return pattern, _normalise_change(pattern, change)


def parse_change(text: str) -> dict[str, Any] | str:
    """The right side of a rule: `skip`, or parts joined by colons: a width (`8`, `int8`, `trit`), `g64` (group size;
    `g-1` for whole rows, `tensor` for a whole ternary matrix), `sym`/`asym`, a column order (`order-act`), a method
    (`rtn`, `gptq`, `exact`), `clip`/`noclip`."""
    flags: dict[str, dict[str, Any]] = {
        "sym": {"symmetric": True},
        "asym": {"symmetric": False},
        "clip": {"clip": True},
        "noclip": {"clip": False},
        "tensor": {"per_tensor": True, "group_size": -1},
        **{m: {"method": m} for m in METHODS},
        **{f"order-{o}": {"order": o} for o in ORDERS},
    }
    text = text.strip()
    if text == "skip":
        return "skip"
    change: dict[str, Any] = {}
    for part in text.split(":"):
        if width := re.fullmatch(r"(?:int)?(\d+)|trit|1\.6", part):
            new: dict[str, Any] = {"bits": int(width[1]) if width[1] else TRIT_BITS}
        elif group := re.fullmatch(r"g(-?\d+)", part):
            new = {"group_size": int(group[1])}
        elif part in flags:
            new = flags[part]
        else:
            raise ValueError(
                f"rule: expected skip, a width (8, int8 or trit), g64 or one of {', '.join(flags)}, "
                f"got {part!r} in {text!r}"
            )
        if new.keys() & change.keys():
            raise ValueError(f"rule: {', '.join(new)} given twice in {text!r}")
        change |= new
    return change


def rule_regex(pattern: str) -> str:
    """The regular expression of a rule, without its `+:` or `-:`."""
    return pattern[2:] if pattern[:2] in ("+:", "-:") else pattern


def _normalise_rules(rules: Any) -> dict[str, dict[str, Any] | str]:
    if rules is None:
        pairs: Iterable[Any] = ()
    elif isinstance(rules, Mapping):
        pairs = rules.items()
    elif isinstance(rules, Iterable) and not isinstance(rules, str | bytes):
        pairs = [parse_rule(r) if isinstance(r, str) else r for r in rules]
    else:
        raise TypeError(f"rules: expected a mapping or a list of rules, got {type(rules).__name__}")
    normal: dict[str, dict[str, Any] | str] = {}
    for pair in pairs:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise TypeError(f"rules: expected (pattern, change) pairs, got {pair!r}")
        pattern, change = pair
        if pattern in normal:
            raise ValueError(f"rules: pattern {pattern!r} given twice")
        try:
            re.compile(rule_regex(pattern))
        except re.error as e:
            raise ValueError(f"rules: {pattern!r} is not a regular expression ({e})") from e
        normal[pattern] = _normalise_change(pattern, change)
    return normal


def _normalise_change(pattern: str, change: Any) -> dict[str, Any] | str:
    if pattern.startswith("-:"):
        return "skip"
    if isinstance(change, str):
        change = parse_change(change)
    elif isinstance(change, int) and not isinstance(change, bool):
        change = {"bits": change}
    if change == "skip":
        return "skip"
    if not isinstance(change, Mapping):
        raise TypeError(f"rules[{pattern!r}]: expected a width, 'skip' or a mapping, got {change!r}")
    change = _rename(f"rules[{pattern!r}]", change, {*_SPEC_FIELDS, "format", "skip"})
    if "skip" in change:
        _check_bool(f"rules[{pattern!r}].skip", change["skip"])
        if change.pop("skip"):
            return "skip"
    if "format" in change:
        named = change.pop("format")
        widths = {"trit": TRIT_BITS, **{f"int{bits}": bits for bits in (2, 3, 4, 8)}}
        if named not in widths or _width(change.get("bits", widths[named])) != widths[named]:
            raise ValueError(f"rules[{pattern!r}].format: expected {', '.join(widths)} (as bits), got {named!r}")
        change["bits"] = widths[named]
    if "bits" in change:
        change["bits"] = _width(change["bits"])
    for name, value in change.items():
        _check(name, f"rules[{pattern!r}].{name}", value)
    return change


def _rename(where: str, values: Mapping[str, Any], allowed: set[str]) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        name = _SYNONYMS.get(key, key)
        if key == "desc_act":
            _check_bool(f"{where}.desc_act", value)
            name, value = "order", "act" if value else "none"
        if name not in allowed:
            raise ValueError(f"{where}: unknown field {key!r}; expected one of {', '.join(sorted(allowed))}")
        if name in renamed:
            raise ValueError(f"{where}: {name} given twice ({key!r} is another name for it)")
        renamed[name] = value
    return renamed


def _width(bits: Any) -> Any:
    """A width as a number: "trit" becomes 1.6; anything else is left to the checks."""
    return TRIT_BITS if bits == "trit" else bits


def _resolved(spec: ModuleSpec, name: str) -> ModuleSpec:
    """The defaults that depend on other fields, and the combinations that mean nothing."""
    ternary = spec.bits == TRIT_BITS
    if ternary:
        spec = replace(spec, symmetric=True)  # -s, 0, s
    if ternary and spec.per_tensor and (spec.group_size != -1 or spec.clip or spec.method == "gptq"):
        raise ValueError(
            f"{name}: per_tensor: expected group_size -1, method rtn and no clip, "
            f"got {spec.group_size}, {spec.method} and clip={spec.clip}"
        )
    if not ternary:
        spec = replace(spec, per_tensor=False)
    elif spec.per_tensor:
        spec = replace(spec, scale_dtype="float32")  # one number: nothing is saved by rounding it
    if not ternary and spec.bits != 16 and spec.method == "exact":
        raise ValueError(f"{name}: method: expected gptq or rtn at {spec.bits} bits, got exact (for trit)")
    if spec.clip is None:
        spec = replace(spec, clip=spec.method == "gptq" if ternary else spec.bits <= 4)
    return spec


def _check_bool(label: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{label}: expected True or False, got {value!r}")


def _check(name: str, label: str, value: Any) -> None:
    """Checks one field of a module's specification; `label` is how the message calls it."""
    choices = {
        "scale_dtype": SCALE_DTYPES,
        "order": ORDERS,
        "grids": GRIDS,
        "correction": CORRECTIONS,
        "activations": ACTIVATIONS,
        "method": METHODS,
    }
    if name == "correction" and value is None:
        return
    if name in choices:
        if value not in choices[name]:
            raise ValueError(f"{label}: expected one of {', '.join(choices[name])}, got {value!r}")
    elif name in ("symmetric", "per_tensor", "clip"):
        if name != "clip" or value is not None:
            _check_bool(label, value)
    elif name == "damp":
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"{label}: expected a number, got {value!r}")
        if not 0 < value <= 1:
            raise ValueError(f"{label}: expected a share in (0, 1], got {value!r}")
    elif name == "bits":
        if not isinstance(value, int | float | str) or isinstance(value, bool):
            raise TypeError(f"{label}: expected a number of bits or 'trit', got {value!r}")
        if value not in BITS:
            raise ValueError(f"{label}: expected one of trit, {', '.join(map(str, BITS[1:]))}, got {value!r}")
    else:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{label}: expected an integer, got {value!r}")
        if name == "group_size" and value != -1 and (value <= 0 or value % 16):
            raise ValueError(f"{label}: expected a multiple of 16 or -1, got {value}")
