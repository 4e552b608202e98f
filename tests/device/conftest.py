"""What device memory loads lazily is loaded before tests count mappings and descriptors."""

from __future__ import annotations

import numpy

from prefault.device import launch, maps, server, serving

LOADED = (numpy, launch, maps, server, serving)
