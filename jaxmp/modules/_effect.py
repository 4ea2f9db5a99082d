"""Says so where a half policy changes nothing."""

from typing import Any


def watching(layer: Any) -> Any:
    return None


def check_layers(layers: Any, application: Any) -> None:
    return None
