"""Tiny pipelines of diffusers, built offline: each gives `(pipeline, the keyword arguments of a call)`.

`PIPELINES` has them by name. Components are in eval mode, float32, always with the same random weights.
"""

from collections.abc import Callable, Mapping
from typing import Any

from tests.pipelines.images import IMAGES
from tests.pipelines.latent import LATENT
from tests.pipelines.videos import VIDEOS

Build = Callable[[], tuple[Any, dict[str, Any]]]
PIPELINES: Mapping[str, Build] = {**LATENT, **IMAGES, **VIDEOS}
