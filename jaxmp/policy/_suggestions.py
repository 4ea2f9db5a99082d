"""Guesses what an unknown policy name was meant to be."""

import difflib
import re
from collections.abc import Iterable

_MIXED = ("mixed", "amp", "mp", "autocast")
_PURE = ("true", "pure", "full", "only", "all")
_OF_DTYPE = {
    "bfloat16": ("bf16", "bfloat16", "bfloat"),
    "float16": ("16", "f16", "fp16", "float16", "half", "float"),
    "float32": ("32", "f32", "fp32", "float32", "single"),
    "float64": ("64", "f64", "fp64", "float64", "double"),
}
_QUANTIZED = {
    "mixed_fp8": ("f8", "fp8", "float8", "e4m3", "e4m3fn"),
    "mixed_int8": ("i8", "int8"),
}
_ELSEWHERE = {
    "amp": "mixed_float16",
    "o1": "mixed_float16",
    "o2": "mixed_float16",
    "mixed": "mixed_bfloat16",
    "mixed_precision": "mixed_bfloat16",
    "tf32": "float32,matmul=tf32",
    "tensorfloat32": "float32,matmul=tensorfloat32",
}
_MIXED_NAME = {"bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}
_PURE_NAME = {"bfloat16": "bf16-true", "float16": "16-true"}


def near_value(text: str, allowed: Iterable[str]) -> str:
    """Returns `Did you mean 'bf16'?` for the nearest of some values, or nothing."""
    by_lower = {name.lower(): name for name in allowed}
    near = difflib.get_close_matches(text.lower(), by_lower, n=1)
    return f"Did you mean {by_lower[near[0]]!r}?" if near else ""


def near_policy(text: str, names: Iterable[str]) -> str:
    """Returns which policy a misspelt name may stand for, as a question.

    Half precision everywhere is suggested only where the name asks for it: most names
    with "16" in them mean float32 parameters and half arithmetic.
    """
    names = tuple(names)
    words = re.findall(r"[a-z0-9]+", text.lower())
    if "_".join(words) in _ELSEWHERE:
        return f"Did you mean {_ELSEWHERE['_'.join(words)]!r}?"
    for name, spellings in _QUANTIZED.items():
        if any(word in spellings for word in words):
            variants = [variant for variant in names if variant.startswith(name)]
            near = difflib.get_close_matches(text.lower(), variants, n=1)
            return f"Did you mean {(near or [name])[0]!r}?"
    dtype = _dtype(words)
    if dtype in _MIXED_NAME and any(word in _MIXED for word in words):
        return f"Did you mean {_MIXED_NAME[dtype]!r}?"
    if dtype in _PURE_NAME and any(word in _PURE for word in words):
        return f"Did you mean {_PURE_NAME[dtype]!r}, without any float32?"
    if dtype is not None and len(words) == 1:
        return _of_dtype(dtype, text.lower() if text.lower() in names else dtype)
    near = difflib.get_close_matches(text.lower(), names, n=1)
    if not near:
        return ""
    return _of_dtype(_dtype([near[0]]), near[0])


def _dtype(words: list[str]) -> str | None:
    for dtype, spellings in _OF_DTYPE.items():
        if any(word in spellings for word in words):
            return dtype
    return None


def _of_dtype(dtype: str | None, name: str) -> str:
    mixed = _MIXED_NAME.get(dtype or "")
    if mixed is None:
        return f"Did you mean {name!r}?"
    return (
        f"Did you mean {mixed!r}, which keeps float32 parameters, or {name!r} for "
        "everything?"
    )
