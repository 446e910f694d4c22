"""Recipes: plain values checked against dataclasses before anything runs.

    raw = read_raw(find_recipe("quickstart"), ["seeds=[0,1]", "arms.vdm.weight=0.5"])
    recipe = build(EnhanceRecipe, raw)             # enhancer.jobs.load_recipe does both

A job's schema is a plain dataclass whose fields are made with `option`: the default, what the
key does, and its limits stand in one place, so checking and the key reference use the same text.
Every error of a recipe is collected and reported in one RecipeError, never only the first.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import re
import types
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vdm_priors.errors import RecipeError


def option(default: Any = MISSING, help: str = "", *, min: float | None = None, max: float | None = None,
           choices: tuple | None = None, pattern: str | None = None) -> Any:
    """A recipe key: its default (none = required), its effect in words, and its limits."""
    metadata = {"help": help, "min": min, "max": max, "choices": choices, "pattern": pattern}
    if isinstance(default, (list, dict, set)) or dataclasses.is_dataclass(default):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def nearest_name(key: str, known: list[str]) -> str | None:
    """The known name most like a misspelt one, or None."""
    match = difflib.get_close_matches(key.lower(), [k.lower() for k in known], n=1, cutoff=0.5)
    return next((k for k in known if match and k.lower() == match[0]), None)


# ---- checking against a schema -----------------------------------------------------------------

def build(schema: type, raw: dict, source: str = "the recipe") -> Any:
    """An instance of the dataclass `schema` from plain values; raises one RecipeError with all faults."""
    problems: list[str] = []
    recipe = _build(schema, raw, "", problems)
    if not problems and hasattr(recipe, "check"):
        problems += recipe.check()
    if problems:
        count = f"{len(problems)} errors" if len(problems) > 1 else "1 error"
        raise RecipeError(f"{source} has {count}:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return recipe


def _build(schema: type, raw: dict, path: str, problems: list[str]) -> Any:
    hints = get_type_hints(schema)
    fields = {f.name: f for f in dataclasses.fields(schema) if f.init}
    before = len(problems)
    values = {}
    if hasattr(schema, "of_mode"):  # one name for several keys
        try:
            raw = schema.of_mode(raw)
        except RecipeError as error:
            problems.append(f"{path.rstrip('.') or 'recipe'}: {error}")
            raw = {key: value for key, value in raw.items() if key != "mode"}
    for key, value in raw.items():
        dotted = f"{path}{key}"
        if key not in fields:
            nearest = nearest_name(str(key), list(fields))
            hint = f"did you mean '{path}{nearest}'?" if nearest else f"known here: {', '.join(fields)}"
            problems.append(f"{dotted}: unknown key; {hint}")
            continue
        values[key] = _value(schema, fields[key], hints[key], value, dotted, problems)
    for name, f in fields.items():
        required = f.default is NO_DEFAULT and f.default_factory is NO_DEFAULT or f.default == MISSING
        if required and name not in raw:
            problems.append(f"{path}{name}: required, but missing ({_help(f) or 'no default'})")
    if len(problems) > before:
        return None
    try:
        return schema(**values)
    except ValueError as error:  # a lower layer's settings class refuses a combination
        problems.append(f"{path.rstrip('.') or 'recipe'}: {error}")
        return None


def _value(schema: type, f: dataclasses.Field, hint: Any, value: Any, dotted: str, problems: list[str]) -> Any:
    nested, optional, is_list = _nested_schema(hint)
    if nested and value is None and optional:
        return None
    if nested and is_list:
        if not isinstance(value, list):
            problems.append(f"{dotted}: must be a list of mappings, not {_shown(value)}")
            return None
        return [_mapping(nested, item, f"{dotted}.{_label(item, i)}", problems) for i, item in enumerate(value)]
    if nested:
        return _mapping(nested, value, dotted, problems)
    try:  # OmegaConf converts and checks the type of one value against the field's annotation
        node = OmegaConf.merge(OmegaConf.structured(_only(schema, f, hint)), {f.name: value})
        converted = OmegaConf.to_container(node)[f.name]
    except OmegaConfBaseException:
        problems.append(f"{dotted}: must be {_type_name(hint)}, not {_shown(value)}")
        return None
    if isinstance(converted, list) and _is_tuple(hint):
        converted = tuple(converted)
    problems += [f"{dotted}: {fault}" for fault in _limit_faults(f, converted)]
    return converted


def _mapping(schema: type, value: Any, dotted: str, problems: list[str]) -> Any:
    if not isinstance(value, dict):
        problems.append(f"{dotted}: must be a mapping of keys, not {_shown(value)}")
        return None
    return _build(schema, value, f"{dotted}.", problems)


def _only(schema: type, f: dataclasses.Field, hint: Any) -> type:
    """A one-field dataclass, so that OmegaConf judges this value alone."""
    return dataclasses.make_dataclass(schema.__name__, [(f.name, hint, field(default=MISSING))])


def _nested_schema(hint: Any) -> tuple[type | None, bool, bool]:
    """(dataclass inside the annotation, may be None, is a list of it)."""
    arguments = [a for a in get_args(hint) if a is not type(None)]
    if get_origin(hint) in (Union, types.UnionType) and len(arguments) == 1:
        nested, _, is_list = _nested_schema(arguments[0])
        return nested, True, is_list
    if get_origin(hint) in (list, tuple) and arguments and dataclasses.is_dataclass(arguments[0]):
        return arguments[0], False, True
    return (hint, False, False) if dataclasses.is_dataclass(hint) else (None, False, False)


def _is_tuple(hint: Any) -> bool:
    return get_origin(hint) is tuple or any(get_origin(a) is tuple for a in get_args(hint))


def _limit_faults(f: dataclasses.Field, value: Any) -> list[str]:
    limits, faults = f.metadata, []
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    for item in items:
        if item is None:
            continue
        if limits.get("choices") and item not in limits["choices"]:
            nearest = nearest_name(str(item), [str(c) for c in limits["choices"]])
            hint = f"; did you mean '{nearest}'?" if nearest else ""
            faults.append(f"must be one of {', '.join(str(c) for c in limits['choices'])}, not {_shown(item)}{hint}")
        if isinstance(item, float) and not math.isfinite(item):
            faults.append(f"must be a finite number, not {item}")
        elif isinstance(item, (int, float)) and not isinstance(item, bool):
            low, high = limits.get("min"), limits.get("max")
            if (low is not None and item < low) or (high is not None and item > high):
                faults.append(f"must be {_range_text(low, high)}, not {item}")
        if limits.get("pattern") and isinstance(item, str) and not re.fullmatch(limits["pattern"], item):
            faults.append(f"must match {limits['pattern']}, not {_shown(item)}")
    return faults


def _range_text(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f"between {low:g} and {high:g}"
    return f"at least {low:g}" if low is not None else f"at most {high:g}"


def _label(item: Any, i: int) -> str:
    return str(item["name"]) if isinstance(item, dict) and isinstance(item.get("name"), str) else str(i)


def _shown(value: Any) -> str:
    text = "a mapping" if isinstance(value, dict) else repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def _type_name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if hint in names:
        return names[hint]
    if get_origin(hint) in (list, tuple):
        inner = {int: "whole numbers", float: "numbers", str: "texts"}.get(get_args(hint)[0], "values")
        return f"a list of {inner}"
    if get_origin(hint) is dict:
        return "a mapping of names to values"
    return " or ".join(_type_name(a) for a in get_args(hint)) or str(hint)


def _help(f: dataclasses.Field) -> str:
    return f.metadata.get("help", "")


# ---- writing and describing --------------------------------------------------------------------

def to_plain(recipe: Any) -> dict:
    """The resolved recipe as nested plain values, every default included."""
    return OmegaConf.to_container(OmegaConf.create(_plain(dataclasses.asdict(recipe))))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def to_yaml(recipe: Any) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(to_plain(recipe), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class KeyHelp:
    """One row of the key reference."""

    path: str
    type: str
    default: str
    limits: str
    help: str


def describe(schema: type, path: str = "") -> list[KeyHelp]:
    """The reference of all keys of a schema, nested ones by their dotted path."""
    rows, hints = [], get_type_hints(schema)
    for f in dataclasses.fields(schema):
        nested, _, is_list = _nested_schema(hints[f.name])
        dotted = f"{path}{f.name}"
        if nested:
            rows += describe(nested, f"{dotted}{'.<name>' if is_list else ''}.")
            continue
        limits = ", ".join(str(c) for c in f.metadata.get("choices") or ())
        low, high = f.metadata.get("min"), f.metadata.get("max")
        if not limits and (low is not None or high is not None):
            limits = _range_text(low, high)
        rows.append(KeyHelp(dotted, _type_name(hints[f.name]), _default_text(f), limits, _help(f)))
    return rows


def _default_text(f: dataclasses.Field) -> str:
    value = f.default_factory() if f.default_factory is not NO_DEFAULT else f.default
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()  # as YAML writes them
    return "(required)" if value is NO_DEFAULT or value == MISSING else str(value)


def differences(old: dict, new: dict, path: str = "") -> list[str]:
    """Dotted lines `key: old -> new` for all values in which two plain recipes differ."""
    lines = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{path}{key}.")
        elif a != b:
            lines.append(f"{path}{key}: {_shown(a)} -> {_shown(b)}")
    return lines
